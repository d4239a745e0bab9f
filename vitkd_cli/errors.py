"""The one exception that a user may see: what is wrong, and what to do about it.

Whatever takes what a person wrote raises it where that is wrong; the docstrings do not say so again.
"""

import errno
import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class UserError(Exception):
    """A mistake or a circumstance that the user can mend; anything else keeps its traceback.

    Args:
        message: what is wrong, one line, naming the key, file, model or path concerned.
        hint: what to do about it, one line; printed below the message.
        exit_code: the process's exit status (docs/exit-codes.md): 2 for a wrong request,
            3 for a run that had to stop.
        details: lines printed between the two, such as every file that is concerned.

    Attributes:
        told_by_another: another one of several processes has the same to say, and says it; None where they
            did not ask each other.
    """

    told_by_another: bool | None = None

    def __init__(self, message: str, hint: str = "", exit_code: int = 2, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.exit_code = exit_code
        self.details = tuple(details)

    @property
    def facts(self) -> dict[str, Any]:
        """What it is made of, as JSON has it."""
        return {key: getattr(self, key) for key in ("message", "hint", "exit_code", "details")}

    def __str__(self) -> str:
        told = "\n  ".join((self.message, *self.details))
        return f"{told} ({self.hint})" if self.hint else told


def first_line(error: BaseException) -> str:
    """What an exception says first, or its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def require(extra: str, *packages: str, purpose: str) -> None:
    """Refuse what needs an optional package before any work is done for it.

    Args:
        extra: of pyproject.toml, which brings the packages.
        purpose: what needs them, as a person would say it, such as ``--to onnx``.
    """
    for package in packages:
        if find_spec(package) is None:
            raise UserError(f"{purpose} needs the package {package}", f'pip install "vitkd[{extra}]"')


def expanded(path: str | Path) -> Path:
    """A path as a person types it, with ``~`` for a home; refused where the system cannot look."""
    try:
        place = Path(path).expanduser()
        place.exists()
    except (OSError, RuntimeError) as problem:
        shown = str(path) if len(str(path)) < 80 else f"{str(path)[:80]}…"
        reason = getattr(problem, "strerror", None) or str(problem)
        raise UserError(f"cannot look at {shown}: {reason.rstrip('.').lower()}", "check the path") from None
    return place


def writable(path: str | Path, flag: str) -> Path:
    """A place for a file, tried before any work is done for it; the folders above it are made."""
    path = expanded(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            if not path.is_dir():
                return path
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    except OSError as problem:
        raise UserError(
            f"{flag}: cannot write {path}: {problem.strerror}", "name a place that you may write to"
        ) from None
