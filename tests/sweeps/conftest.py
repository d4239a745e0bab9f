"""Sweeps whose runs go on in this process: an import of torch for each would take longer than they do."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from vitkd_cli.sweeps import run as sweeps
from vitkd_cli.sweeps.children import StoppedBySignal, last_words


def run_here(tasks: Any, ended: Any, running: Any, stop_after: int | None) -> None:
    from vitkd_cli.cli import main

    for number, task in enumerate(tasks):
        if number == stop_after:
            raise StoppedBySignal(15)
        assert task.ready()
        running([task.name])
        code: Any = 0
        with pytest.MonkeyPatch.context() as words, open(task.log, "w") as log:
            words.setattr(sys, "argv", ["vitkd", *task.command[3:]])
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                try:
                    main()
                except SystemExit as stop:
                    code = stop.code
        ended(task, last_words(task.log) if code else "")


@pytest.fixture(scope="session")
def here() -> Callable[..., Any]:
    """While the block lasts, points run in this process; after some, they stop as by a signal."""

    @contextlib.contextmanager
    def patched(stop_after: int | None = None) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            run_all = lambda tasks, places, ended, running: run_here(tasks, ended, running, stop_after)  # noqa: E731
            patch.setattr(sweeps, "run_all", run_all)
            yield

    return patched
