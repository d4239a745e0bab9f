"""What a call came to: accepted, refused in a line, or a traceback."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from vitkd_cli.cli import main
from vitkd_cli.errors import UserError

ACCEPTED, REFUSED, TRACEBACK = "accepted", "refused", "TRACEBACK"
SECONDS = 60


class Hang(BaseException):
    """Longer than :data:`SECONDS`."""


@contextlib.contextmanager
def no_longer_than(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(call: Callable[[], Any]) -> tuple[str, str]:
    """The kind of outcome, and what was said or the traceback."""
    try:
        with no_longer_than(SECONDS):
            call()
    except UserError as refusal:
        return (REFUSED, str(refusal)) if refusal.message.strip() else (TRACEBACK, "an empty message")
    except (Exception, Hang):
        return TRACEBACK, traceback.format_exc()
    return ACCEPTED, ""


def command(arguments: list[str]) -> tuple[int | None, str]:
    """``vitkd ARGUMENTS`` in this process: its exit code and all that it prints; None for a traceback."""
    said = io.StringIO()
    argv, columns = sys.argv, os.environ.get("COLUMNS")
    sys.argv, os.environ["COLUMNS"] = ["vitkd", *arguments], "200"
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), no_longer_than(SECONDS):
            main()
        return 0, said.getvalue()
    except SystemExit as stop:
        return int(stop.code or 0), said.getvalue()
    except (Exception, Hang):
        return None, said.getvalue() + traceback.format_exc()
    finally:
        sys.argv = argv
        os.environ.pop("COLUMNS") if columns is None else os.environ.update(COLUMNS=columns)


def asked(about: str | None, count: int) -> argparse.Namespace:
    """A script's ``--count`` and ``--seed``."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--count", type=int, default=count)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def leave(failures: list[str]) -> NoReturn:
    """Print what failed, and exit with 1 if anything did."""
    for text in failures:
        print(f"\n{text}")
    raise SystemExit(bool(failures))
