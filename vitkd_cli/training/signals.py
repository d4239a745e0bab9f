"""SIGTERM and SIGINT between updates: the run saves itself and ends."""

import signal
import time
from pathlib import Path
from typing import Any, Self

from vitkd_cli.data.keyed import abandon_workers
from vitkd_cli.errors import UserError
from vitkd_cli.text import resuming

AGAIN = 0.25  # seconds; a signal that comes sooner is the same one, passed on by who started us


class Stopped(UserError):
    """The run was told to stop, saved itself and can go on."""

    def __init__(self, signum: int, update: int, run: Path, saved: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after update {update}; saved in {saved}",
            f"go on with: {resuming(run)}",
            exit_code=128 + signum,
        )


class Signals:
    """Keep the last signal for the loop, which reads it between updates; a second SIGINT ends at once.

    The current update may never end: it may wait for an image from a disk that does not answer.

    Attributes:
        received: on this process; 0 if there was none.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.received = 0
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: whoever called us handles signals
                break
        return self

    def _note(self, number: int, frame: Any) -> None:
        again = number == self.received == signal.SIGINT
        if again and time.monotonic() - self._since > AGAIN:
            abandon_workers()
            raise KeyboardInterrupt
        self.received, self._since = number, self._since if again else time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise UserError(
                "stopped at once by a second SIGINT: the updates since the last checkpoint are lost",
                f"go on from it with: {resuming(self.run)}",
                exit_code=130,
            ) from None
