"""Before processes are joined: what one of them is refused, all are, and one says it.

Each leaves what it found in the store through which torch's processes find each other, and the first one
reads them all. A process that is refused alone would end otherwise, while the others wait for it.
"""

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.processes import LostProcess, is_launched

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
