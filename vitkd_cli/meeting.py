"""What one of several processes is refused, all are, and one says it.

A process that is refused alone would end otherwise, while the others wait for it. Before they are joined,
each leaves what it found in the store through which torch's processes find each other, and the first one
reads them all.
"""

import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.processes import LostProcess, be_found, is_launched

Made = TypeVar("Made")

_TO_START = 600  # seconds that the processes of a scoring wait for each other
_PATIENCE = 60  # seconds that a process which has been refused waits for the others, to tell them
_stores: list[Any] = []  # of all meetings: the first process serves them to the others while it lives


@contextmanager
def refused_together() -> Iterator[None]:
    """Tell the other processes, who are about to :func:`meet`, of a refusal."""
    try:
        yield
    except UserError as refusal:
        if not is_launched():
            raise
        try:
            _meet(refusal.facts, "", _PATIENCE)
        except LostProcess:
            raise refusal from None


def meet(finds: str, patience: int) -> None:
    """Wait for the other processes, and refuse what any of them was refused.

    Args:
        finds: what must be the same for all, in words: "a run that is finished in runs/x".
        patience: seconds to wait.
    """
    if is_launched():
        _meet(None, finds, patience)


def _meet(refused: dict[str, Any] | None, finds: str, patience: int) -> None:
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    told = {"refused": refused, "finds": finds, "host": platform.node()}
    try:
        served, own, size = next(rendezvous("env://", timeout=timedelta(seconds=patience)))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"vitkd/{attempt}/{len(_stores)}", served)
        _stores.append(store)
        store.set(f"{own}", json.dumps(told))
        if not own:
            store.set("verdict", json.dumps(_verdict([json.loads(store.get(f"{n}")) for n in range(size)])))
        verdict = json.loads(store.get("verdict"))
        store.set(f"{own} heard", "")
        if not own:  # who leaves now takes the store along
            store.wait([f"{n} heard" for n in range(size)])
    except RuntimeError as problem:
        raise LostProcess(
            f"waited {patience} s for the other processes: {first_line(problem)}",
            "start all of them; --dist-timeout SECONDS is how long each waits",
            exit_code=3,
        ) from None
    if verdict:
        teller, facts = verdict
        refusal = UserError(**facts)
        refusal.told_by_another = own != teller
        raise refusal from None


def _verdict(told: list[dict[str, Any]]) -> tuple[int, dict[str, Any]] | None:
    """Who says what is refused, and what it is; None if nothing is.

    Args:
        told: by each process.
    """
    refused = [number for number, one in enumerate(told) if one["refused"]]
    if refused:
        teller = refused[0]
        facts, host = told[teller]["refused"], told[teller]["host"]
        others = {one["host"] for number, one in enumerate(told) if number not in refused}
        alone = f" (on {host}, and not on {', '.join(sorted(others))})" if others - {host} else ""
        return teller, {**facts, "message": facts["message"] + alone}
    for number, one in enumerate(told):
        if one["finds"] != told[0]["finds"]:
            return 0, {
                "message": f"the first process, on {told[0]['host']}, finds {told[0]['finds']}, "
                f"and process {number}, on {one['host']}, {one['finds']}",
                "hint": "name a folder on a disk that all machines share",
            }
    return None


@contextmanager
def joined(device: str | None) -> Iterator[Any]:
    """The processes that a launcher started, as an ``accelerate.Accelerator``; None if this is the only one.

    They leave when they are done with each other, which is the caller's to see to.

    Args:
        device: what ``--device`` says.
    """
    if not is_launched():
        yield None
        return
    with refused_together():
        from accelerate import Accelerator

        from vitkd_cli.device import device_named

        cpu = device_named(device).type == "cpu"
    meet("", _TO_START)
    be_found()
    accelerator = Accelerator(cpu=cpu)
    yield accelerator
    accelerator.end_training()


def agreed(accelerator: Any, act: Callable[[], Made]) -> Made:
    """What ``act`` makes in every process, unless one of them is refused.

    Args:
        act: says no word to the others, or is refused in all alike.
        accelerator: of processes that are joined; None for one alone.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return act()
    from accelerate.utils import gather_object

    refused: dict[str, Any] | None = None
    try:
        made = act()
    except UserError as problem:
        refused = problem.facts
    for rank, told in enumerate(gather_object([refused])):
        if told is not None:
            refusal = UserError(**told)
            refusal.told_by_another = rank != accelerator.process_index
            raise refusal
    return made
