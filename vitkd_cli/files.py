"""Files that are whole or not there, what they hash to, and the system's refusals in words.

Every file that vitkd writes goes through :func:`whole_file`, or through :func:`saving` where a library
writes it by itself.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any
from uuid import uuid4

from vitkd_cli.errors import UserError

MANIFEST = "manifest.json"
_PART, _OLD = ".part-", ".old-"  # before a name: half written or half deleted; what is being replaced
_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "its folder is gone",
    errno.EEXIST: "a file lies there",
    errno.ENOTDIR: "a file lies where a folder should be",
}
# safetensors, torch and matplotlib wrap the system's error in their own.
_IN_WORDS = {
    "No space left": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,  # torch's own writer, when a write came back short
    "quota exceeded": errno.EDQUOT,  # a path may speak of a quota, too
    "os error 122": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "os error 30": errno.EROFS,
    "Permission denied": errno.EACCES,
    "os error 13": errno.EACCES,
}


def statuses(paths: Sequence[str]) -> Iterator[tuple[int, int] | None]:
    """Size in bytes and time of change in ns of each file; None of one that is not there.

    Sixteen are asked about at once, as a network's disk takes long to answer, and answers many.
    """

    def look(start: int) -> list[tuple[int, int] | None]:
        return [_status(path) for path in paths[start : start + 500]]

    with ThreadPoolExecutor(16) as pool:
        yield from chain.from_iterable(pool.map(look, range(0, len(paths), 500)))


def _status(path: str) -> tuple[int, int] | None:
    with suppress(OSError):
        found = os.stat(path)
        return found.st_size, found.st_mtime_ns
    return None


class CannotWrite(UserError):
    """The system refused to write; whoever knows how to go on afterwards may replace the hint."""

    def __init__(self, message: str, hint: str = "make room or name another place, and try again") -> None:
        super().__init__(message, hint, exit_code=3)


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a line that names ``path``."""
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        number = getattr(problem, "errno", None)
        if number not in _REFUSALS:
            number = next((number for words, number in _IN_WORDS.items() if words in str(problem)), None)
        if number is None:
            raise
        path = Path(str(path).replace(_PART, ""))  # where it was to be
        free = f" ({free_bytes(path) / 2**20:.0f} MiB free)" if number == errno.ENOSPC else ""
        raise CannotWrite(f"cannot write {path}: {_REFUSALS[number]}{free}") from None


def check_room(path: Path, size: int) -> None:
    """Refuse to begin a file or folder of ``size`` bytes that the disk cannot hold."""
    if (free := free_bytes(path)) < size:
        raise CannotWrite(
            f"cannot write {path}: it takes {size / 2**20:.0f} MiB, and {free / 2**20:.0f} MiB are free"
        )


def free_bytes(path: Path) -> int:
    """Free on the disk where a file or folder is, or would be."""
    place = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    return shutil.disk_usage(place).free


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name; :func:`repair` deletes what a crash left there."""
    return path.with_name(_PART + path.name)


def _own_part_of(path: Path) -> Path:
    """One that no other process, which may write the same file, has."""
    return path.with_name(f"{_PART}{uuid4().hex[:8]}-{path.name}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, renamed into it at the end: a reader sees the old file or the new.

    The file gets the permissions that the umask leaves, whatever wrote it.
    """
    beside = _own_part_of(path)
    try:
        with saving(path):
            beside.touch()
            mode = beside.stat().st_mode
            yield beside
            os.chmod(beside, mode)  # safetensors 0.8 writes 0600
            flush(beside)
            os.replace(beside, path)
    except BaseException:
        _forget(beside)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to fill, renamed into it at the end, in place of what is there.

    A crash leaves the old folder or the new one, perhaps under a name that :func:`repair` sets right.
    """
    beside, old = _own_part_of(path), path.with_name(_OLD + path.name)
    try:
        with saving(path):
            beside.mkdir()
            yield beside
            for file in [*beside.rglob("*"), beside]:
                flush(file)
            if path.exists():
                remove(old)
                os.replace(path, old)
            os.replace(beside, path)
            flush(path.parent)
            remove(old)
    except BaseException:
        if old.exists() and not path.exists():
            with suppress(OSError):
                os.replace(old, path)
        _forget(beside)
        raise


def remove(path: Path) -> None:
    """Delete a file or a folder; of a folder half of it is never seen under its own name."""
    with saving(path):
        if path.is_dir() and not path.is_symlink():
            if not path.name.startswith(_PART):
                half = part_of(path)
                remove(half)
                os.replace(path, half)
                path = half
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def repair(folder: Path) -> None:
    """Set right what a crash left half done in a folder by the functions above."""
    for path in folder.glob(f"{_PART}*"):
        remove(path)
    for old in folder.glob(f"{_OLD}*"):
        path = old.with_name(old.name.removeprefix(_OLD))
        if path.exists():
            remove(old)
        else:  # the crash came between the two names
            os.replace(old, path)


def is_leftover(name: str) -> bool:
    """Is this a name that only a crash leaves?"""
    return name.startswith((_PART, _OLD))


def _forget(path: Path) -> None:
    with suppress(OSError, UserError):
        remove(path)


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file; NaN and infinity, which JSON does not have, are a bug of the caller."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON object with the digest of its own content, which :func:`read_sealed` verifies."""
    write_json(path, {**content, "sha256": _seal(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """A JSON object as it was written; one without a digest is taken as it is.

    Raises:
        ValueError: it is not what was written.
        OSError: it cannot be read.
    """
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("is no JSON object")
    if content.pop("sha256", None) not in (None, _seal(content)):
        raise ValueError("does not have the content that was written")
    return content


def _seal(content: dict[str, Any]) -> str:
    # Through JSON, in which a tuple is a list.
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def flush(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, names: Iterable[str]) -> None:
    """Write ``manifest.json``, last of a folder's files: ``{name: SHA-256}`` of the files named."""
    write_json(folder / MANIFEST, {name: sha256_of(folder / name) for name in sorted(names)})


def damaged(folder: Path) -> dict[str, str]:
    """File name → what is wrong, of each file that does not fit the folder's manifest.

    A folder without a manifest was written before there were any: nothing can be said of it.
    """
    try:
        promised = json.loads((folder / MANIFEST).read_bytes())
        assert isinstance(promised, dict) and all(isinstance(value, str) for value in promised.values())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AssertionError):
        return {MANIFEST: "is no manifest"}
    wrong = {}
    for name, digest in promised.items():
        try:
            if sha256_of(folder / Path(name).name) != digest:
                wrong[name] = "does not have the content that was written"
        except OSError as problem:
            wrong[name] = (problem.strerror or "cannot be read").lower()
    return wrong
