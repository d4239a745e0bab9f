"""What a person sees while a run goes on: one live line in a terminal, plain lines elsewhere."""

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Self, SupportsFloat, TypeVar

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from vitkd_cli.terminal import Terminal

EVERY = 20.0  # seconds between two lines where there is no bar
Batch = TypeVar("Batch")
NARROWEST = 6  # columns that the bar itself wants


@dataclass(frozen=True)
class Stage:
    """A model to train: a part of the whole job.

    Attributes:
        title: what a person calls it, such as ``student 3 of 6``.
        updates: its length.
        cost: of an update, in the same unit for every stage.
    """

    title: str
    updates: int
    cost: float


@dataclass
class _Bar:
    """One thing that goes on."""

    title: str
    total: int
    done: int
    values: str = ""
    per_epoch: int = 0  # updates; 0: this is no training
    images: int = 0  # an update
    loss: SupportsFloat | None = None
    began: float = field(default_factory=time.monotonic)
    before: int = 0
    steps: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=20))

    @property
    def pace(self) -> float | None:
        """Seconds for one, breaks for validation included; None before the first."""
        made = self.done - self.before
        return (time.monotonic() - self.began) / made if made > 0 else None

    @property
    def rate(self) -> float | None:
        """Images per second over the last updates."""
        if len(self.steps) < 2:
            return None
        (since, first), (until, last) = self.steps[0], self.steps[-1]
        return (last - first) * self.images / max(until - since, 1e-9)


class Reporter:
    """Speaks for rank 0; on the other ranks, and with ``quiet``, it says nothing.

    Rich obeys NO_COLOR and knows whether there is a terminal.
    """

    def __init__(self, console: Terminal | None = None, *, silent: bool = False) -> None:
        self.console = console or Terminal(quiet=silent)
        self.silent = silent
        self.stages: Sequence[Stage] = ()  # of the whole job, in order
        self.stage = 0  # the one in hand
        self._bars: list[_Bar] = []  # the innermost is shown
        self._said = time.monotonic()

    @property
    def live(self) -> bool:
        """Is there a terminal with a line that moves?"""
        return not self.silent and self.console.is_terminal

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
    def bar(
        self, title: str, total: int, done: int = 0, *, per_epoch: int = 0, images: int = 0
    ) -> Iterator[Self]:
        """A bar while the block runs, where there is a terminal.

        Args:
            per_epoch: updates, where this is a training.
            images: of an update.
        """
        shown = Live(get_renderable=self._line, console=self.console, transient=True, refresh_per_second=8)
        outermost = self.live and not self._bars  # one live display at a time
        self._bars.append(_Bar(title, total, done, per_epoch=per_epoch, images=images, before=done))
        try:
            with shown if outermost else nullcontext():
                yield self
        finally:
            self._bars.pop()
            if self._bars:
                self._bars[-1].steps.clear()  # this was a break for the one around it

    def advance(
        self,
        done: int,
        values: str | None = None,
        total: int | None = None,
        loss: SupportsFloat | None = None,
    ) -> None:
        """Move the bar; what is not given stays as it is.

        Args:
            values: further facts, two spaces apart.
            loss: read whenever the line is drawn, so a tensor on the CPU may be filled later.
        """
        if not self._bars:
            return
        bar, now = self._bars[-1], time.monotonic()
        bar.done, bar.total = done, bar.total if total is None else total
        bar.values, bar.loss = bar.values if values is None else values, bar.loss if loss is None else loss
        bar.steps.append((now, done))
        if not self.live and not self.silent and not bar.per_epoch and bar.total and now - self._said > EVERY:
            self._said = now
            self.say(f"{bar.title}: {bar.values} {done:,} of {bar.total:,}".replace(":  ", ": "))

    def line(self, text: str) -> None:
        """A log line where there is no bar to show it."""
        if not self.live:
            self.say(text)

    def left(self) -> float | None:
        """Seconds until the whole job is done; None while that is not known."""
        training = next((bar for bar in self._bars if bar.per_epoch), None)
        bar = training or self._bars[-1]
        if bar.pace is None:
            return None
        seconds = bar.pace * (bar.total - bar.done)
        if training and self.stage < len(self.stages):
            cost = self.stages[self.stage].cost
            rest = self.stages[self.stage + 1 :]
            seconds += sum(bar.pace * stage.updates * stage.cost / cost for stage in rest)
        return seconds

    def _line(self) -> RenderableType:
        if not self._bars:
            return Text()
        bar, width = self._bars[-1], self.console.width
        training = next((one for one in self._bars if one.per_epoch), None)
        stage = self.stages[self.stage].title if training and self.stage < len(self.stages) else ""
        left, outer = self.left(), training or bar
        rate = outer.rate if training else None
        facts = {
            "title": stage or outer.title,
            "what": _epoch(training) if training else bar.values,
            "break": bar.title if training and bar is not training else "",
            "share": f"{bar.done / bar.total:.0%}" if bar.total else "",
            "count": "" if training or not bar.total else f"{bar.done:,}/{bar.total:,}",
            "left": "" if left is None else f"{_clock(left)} left",
            "loss": "" if outer.loss is None else f"loss {float(outer.loss):.3f}",
            "rate": "" if rate is None else f"{rate:.0f} images/s",
        }
        # Where it is narrow, words go before facts do.
        for name, change in (
            ("", ""),
            ("share", ""),
            ("rate", facts["rate"].replace(" images", "")),
            ("title", facts["title"].replace("student ", "").replace(" of ", "/")),
            ("count", ""),
        ):
            facts[name] = change
            room = width - sum(len(fact) + 1 for fact in facts.values() if fact) - 1
            if room >= NARROWEST:
                break
        grid = Table.grid(padding=(0, 1, 0, 0))
        before = " ".join(filter(None, (facts["title"], facts["what"], facts["break"])))
        after = " ".join(
            filter(None, (facts["share"], facts["count"], facts["left"], facts["loss"], facts["rate"]))
        )
        meter = ProgressBar(
            total=bar.total or None, completed=bar.done, width=max(1, min(room, 40)), pulse=not bar.total
        )
        grid.add_row(Text(before, no_wrap=True), meter, Text(after, no_wrap=True))
        if not outer.per_epoch or not outer.values or self.console.height < 3:
            return grid
        return Group(grid, Text(_fitting(outer.values, width), style="dim", no_wrap=True))


def _epoch(bar: _Bar) -> str:
    epochs = -(-bar.total // bar.per_epoch)
    return f"epoch {min(bar.done // bar.per_epoch + 1, epochs)}/{epochs}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _fitting(values: str, width: int) -> str:
    """As many whole parts as the line holds."""
    lines = accumulate(values.split("  "), "{}  {}".format)
    return next(reversed([line for line in lines if len(line) <= width]), "")


class Pace:
    """How fast a training goes, and how much of its time goes by waiting for images."""

    def __init__(self) -> None:
        self.images, self.waited = 0, 0.0
        self.since = time.perf_counter()
        self.began: float | None = None  # when the first batch was there: it had waited for the workers
        self._waited_before = 0.0

    def add(self, images: int) -> None:
        self.images += images

    def next(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time that it takes to come counts."""
        start = time.perf_counter()
        batch = next(batches)
        if self.began is None:
            self.began = time.perf_counter()
        else:
            self.waited += time.perf_counter() - start
        return batch

    def told(self) -> tuple[float, float]:
        """Images per second, and the share of the time that went by waiting, since it was last asked."""
        now = time.perf_counter()
        spent = max(now - self.since, 1e-9)
        told = self.images / spent, self.waited / spent
        self._waited_before += self.waited
        self.images, self.waited, self.since = 0, 0.0, now
        return told

    @property
    def share(self) -> float:
        """Of the time since the first batch, how much went by waiting."""
        if self.began is None:
            return 0.0
        return (self._waited_before + self.waited) / max(time.perf_counter() - self.began, 1e-9)
