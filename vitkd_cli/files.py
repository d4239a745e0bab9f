"""Files that are whole or not there, what they hash to, and the system's refusals in words.

Every file that vitkd writes goes through :func:`whole_file`, or through :func:`saving` where a library
writes it by itself.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitkd_cli.errors import UserError

MANIFEST = "manifest.json"
_REFUSALS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENOENT: "its folder is gone",
}
# safetensors, torch and matplotlib wrap the system's error in their own.
_IN_WORDS = {
    "No space left": errno.ENOSPC,
    "os error 28": errno.ENOSPC,
    "unexpected pos": errno.ENOSPC,  # torch's own writer, when a write came back short
    "quota": errno.EDQUOT,
    "os error 122": errno.EDQUOT,
    "Read-only file system": errno.EROFS,
    "os error 30": errno.EROFS,
    "Permission denied": errno.EACCES,
    "os error 13": errno.EACCES,
}


@contextmanager
def saving(path: Path, hint: str = "make room or name another place, and try again") -> Iterator[None]:
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
        free = ""
        if number == errno.ENOSPC:
            place = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
            free = f" ({shutil.disk_usage(place).free / 2**20:.0f} MiB free)"
        raise UserError(f"cannot write {path}: {_REFUSALS[number]}{free}", hint, exit_code=3) from None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to, renamed into it at the end: a reader sees the old file or the new.

    The file gets the permissions that the umask leaves, whatever wrote it.
    """
    beside = path.with_name(f".{path.name}")
    try:
        with saving(path):
            beside.unlink(missing_ok=True)
            beside.touch()
            mode = beside.stat().st_mode
            yield beside
            os.chmod(beside, mode)  # safetensors 0.8 writes 0600
            flush(beside)
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a whole UTF-8 file."""
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a whole JSON file; NaN and infinity, which JSON does not have, are a bug of the caller."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False))


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
