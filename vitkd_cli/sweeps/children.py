"""Runs as processes of their own, some at once; what stops us stops them, and each saves itself first."""

import contextlib
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError
from vitkd_cli.processes import PARENT
from vitkd_cli.recipe import Recipe

_TAIL = 2**16  # bytes of a log in which its last words are sought


@dataclass(frozen=True)
class Task:
    """One run to start.

    Attributes:
        command: its words, the program first.
        log: takes what it prints.
        ready: may it start yet?
        never: its last words if what it waits for has failed.
    """

    name: str
    command: Sequence[str]
    log: Path
    ready: Callable[[], bool] = lambda: True
    never: str = "not begun: what it waits for failed"


class StoppedBySignal(Exception):
    """We were told to stop, and all that ran has ended."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def places_of(recipe: Recipe, jobs: int) -> list[dict[str, str]]:
    """The environment of each place where a run may go on: its GPUs, or its share of the cores.

    Raises:
        UserError: runs of several processes want more GPUs than there are.
    """
    if jobs == 1:
        return [{}]
    each = recipe.num_processes
    if device_named(recipe.device).type != "cuda":
        threads = max(1, (os.cpu_count() or 1) // (jobs * each))
        return [{"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}] * jobs
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    gpus = visible.split(",")
    if each > 1 and jobs * each > len(gpus):
        raise UserError(
            f"--jobs {jobs} of {each} processes each want {jobs * each} GPUs, and {len(gpus)} are there",
            f"--jobs {max(1, len(gpus) // each)}",
        )
    shares = ([gpus[(place * each + own) % len(gpus)] for own in range(each)] for place in range(jobs))
    return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]


def run_all(
    tasks: Sequence[Task],
    places: Sequence[Mapping[str, str]],
    ended: Callable[[Task, str], None],
    running: Callable[[list[str]], None],
) -> None:
    """Run every task, as many at once as there are places; one that fails does not end the others.

    Args:
        places: environment variables of each.
        ended: told when one has ended, and its last words if it failed.
        running: told again and again which go on.

    Raises:
        StoppedBySignal: by SIGTERM or SIGINT; a second one kills.
    """
    waiting, free = deque(tasks), list(range(len(places)))
    going: dict[subprocess.Popen[bytes], tuple[Task, int]] = {}
    with _signals() as received:
        try:
            while waiting or going:
                if received:
                    _stop(going, received)
                    raise StoppedBySignal(received[0])
                while free and (task := next((t for t in waiting if t.ready()), None)):
                    waiting.remove(task)
                    place = free.pop(0)
                    going[_started(task, places[place])] = task, place
                if waiting and not going:  # what it waits for has failed
                    for task in waiting:
                        ended(task, task.never)
                    return
                for process in [process for process in going if process.poll() is not None]:
                    task, place = going.pop(process)
                    free.insert(0, place)
                    ended(task, last_words(task.log) if process.returncode else "")
                running([task.name for task, _ in going.values()])
                time.sleep(0.1)
        finally:
            for process in going:
                process.kill()


def _started(task: Task, place: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    with open(task.log, "wb") as log:
        return subprocess.Popen(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **place, PARENT: str(os.getpid())},
            start_new_session=True,  # what a terminal sends goes to us alone, and once from us to them
        )


def _stop(going: Mapping["subprocess.Popen[bytes]", object], received: list[int]) -> None:
    for process in going:
        process.terminate()
    while any(process.poll() is None for process in going):
        if len(received) > 1:
            return  # they are killed
        time.sleep(0.05)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that came; none outside of the main thread, which alone may hear them."""
    received: list[int] = []
    before = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def last_words(log: Path) -> str:
    """The error that a log ends with, or its last line."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return "it left no log"
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (told or [line for line in lines if line] or ["it ended without a word"])[-1]
