"""What a person sees while a run goes on: one live bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vitkd_cli.terminal import Terminal

EVERY = 20.0  # seconds between two lines where there is no bar


class Reporter:
    """Speaks for rank 0; on the other ranks, and with ``quiet``, it says nothing.

    Rich obeys NO_COLOR and knows whether there is a terminal.
    """

    def __init__(self, console: Terminal | None = None, *, silent: bool = False) -> None:
        self.console = console or Terminal(quiet=silent)
        self.silent = silent
        self._bar: Progress | None = None
        self._title, self._said = "", time.monotonic()  # where there is no bar, a line from time to time
        self._task: TaskID | None = None

    def say(self, text: str = "", style: str | None = None) -> None:
        """One line."""
        self.console.say(text, style)

    def warn(self, text: str) -> None:
        self.say(f"note: {text}", style="yellow")

    def show(self, renderable: Any) -> None:
        """A table, or lines of text."""
        if isinstance(renderable, str):
            for line in renderable.splitlines():
                self.say(line)
        else:
            self.console.print(renderable)

    @contextmanager
    def bar(self, title: str, total: int, done: int = 0) -> Iterator[Reporter]:
        """A bar while the block runs, where there is a terminal."""
        if self.silent or not self.console.is_terminal:
            self._title, self._said = title, time.monotonic()
            yield self
            return
        progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[values]}"),
            console=self.console,
            transient=True,
        )
        outer = (self._bar, self._task)
        if outer[0] is not None:  # a validation inside the training: one live display at a time
            outer[0].stop()
        try:
            with progress:
                self._bar = progress
                self._task = progress.add_task(title, total=total, completed=done, values="")
                yield self
        finally:
            self._bar, self._task = outer
            if self._bar is not None:
                self._bar.start()

    def advance(self, done: int, values: str | None = None, total: int | None = None) -> None:
        """Move the bar; values and total stay as they are unless given."""
        if self._bar is not None and self._task is not None:
            shown = {} if values is None else {"values": values}
            self._bar.update(self._task, completed=done, total=total, **shown)  # type: ignore[arg-type]
        elif total and not self.silent and time.monotonic() - self._said > EVERY:
            self._said = time.monotonic()
            self.say(f"{self._title}: {values or ''} {done:,} of {total:,}".replace(":  ", ": "))

    def line(self, text: str) -> None:
        """A log line where there is no bar to show it."""
        if self._bar is None:
            self.say(text)


class Pace:
    """Images per second since it was last asked."""

    def __init__(self) -> None:
        self.images = 0
        self.since = time.perf_counter()

    def add(self, images: int) -> None:
        self.images += images

    def rate(self) -> float:
        now = time.perf_counter()
        rate = self.images / max(now - self.since, 1e-9)
        self.images, self.since = 0, now
        return rate
