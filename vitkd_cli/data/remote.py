"""Files at addresses that fsspec knows (``s3://``, ``gs://``, ``https://``), copied whole when they are read.

Copies are kept on a local disk, as many as its share holds; the one that was used longest ago goes first. All
processes of a machine share them.
"""

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.files import is_leftover, part_of, saving

_STALE = 3600.0  # seconds after which nobody writes to half a copy any more
# What changes with a file's content; the first one that its storage tells counts.
_CHANGES = ("ETag", "etag", "md5Hash", "Last-Modified", "LastModified", "mtime", "updated", "created")
_PAUSES = (1, 5, 0)  # seconds after each time that a network broke down
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "http": "aiohttp", "https": "aiohttp"}
_RIGHTS = {
    "s3": "AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, say who reads it",
    "gs": "gcloud auth application-default login",
}


def user_cache() -> Path:
    """Where vitkd keeps what it can make again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vitkd"


def is_address(place: str) -> bool:
    return "://" in place


@dataclass(frozen=True)
class Remote:
    """A file at an address.

    Args:
        room: bytes that the copies of all files may take.
    """

    address: str
    room: int

    def __str__(self) -> str:
        return self.address

    @property
    def name(self) -> str:
        return self.address.partition("?")[0].rpartition("/")[2]

    def looks(self) -> dict[str, Any]:
        """What tells it from itself after a change, as far as its storage says it."""
        with _asked(self.address) as (system, place):
            facts = system.info(place)
        if facts["size"] is None:
            raise UserError(f"{self.address}: its server does not say its size", "copy it to a disk")
        told = [_plain(facts[key]) for key in _CHANGES if facts.get(key)]
        return {"size": facts["size"], "facts": told[:1]}

    def open(self, looks: dict[str, Any]) -> int:
        """Open the copy of what looked like this, which is made if there is none."""
        while True:
            with suppress(FileNotFoundError):  # another process took it away in between
                return os.open(self._copy(looks), os.O_RDONLY)

    def _copy(self, looks: dict[str, Any]) -> Path:
        folder = user_cache() / "copies"
        key = hashlib.sha256(repr((self.address, *looks.values())).encode()).hexdigest()
        path = folder / f"{key[:16]}-{self.name}"
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        with saving(path):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"):
                if not path.exists():
                    self._make_room(folder, looks["size"])
                    self._fetch(part_of(path), looks)
                    os.replace(part_of(path), path)
                    with FileLock(folder / "room.lock"):  # others may have been copied meanwhile
                        self._make_room(folder, 0)
        return path

    def _fetch(self, part: Path, looks: dict[str, Any]) -> None:
        for pause in _PAUSES:
            try:
                with _asked(self.address) as (system, place):
                    system.get_file(place, str(part))
                    system.invalidate_cache(place)  # what it looks like now
                break
            except UserError as problem:
                if problem.exit_code != 3 or not pause:
                    raise
                time.sleep(pause)
        if part.stat().st_size != looks["size"] or self.looks() != looks:
            part.unlink()
            raise changed(self)

    def _make_room(self, folder: Path, size: int) -> None:
        if size > self.room:
            gib = f"{size / 2**30:.1f} GiB, and copies may take {self.room / 2**30:g}"
            raise UserError(f"{self.address} takes {gib}", "--remote-cache GIB")
        copies = []
        for path in folder.glob("*-*"):
            with suppress(FileNotFoundError):  # another process takes it away
                used, taken = path.stat().st_mtime, path.stat().st_size
                being_made = is_leftover(path.name) and time.time() - used < _STALE
                if path.suffix != ".lock" and not being_made:
                    copies.append((used, taken, path))
        total = sum(taken for _, taken, _ in copies)
        for _, taken, path in sorted(copies):
            if total + size > self.room:
                path.unlink(missing_ok=True)
                total -= taken


def changed(file: object) -> UserError:
    """What is said of a file that is no longer the one that the run began with."""
    return UserError(
        f"{file} changed under the run", "restore it, or start a run with what is there now", exit_code=3
    )


def addresses(pattern: str) -> list[str]:
    """The addresses that fit a pattern with ``*``."""
    with _asked(pattern) as (system, place):
        return sorted(map(system.unstrip_protocol, system.glob(place)))


@contextmanager
def _asked(address: str) -> Iterator[tuple[Any, str]]:
    """The storage of an address, and the place in it; what goes wrong there, in a line."""
    import fsspec

    scheme = address.partition("://")[0]
    try:
        yield fsspec.url_to_fs(address)
    except UserError:
        raise
    except ImportError as problem:  # fsspec says which package it needs
        package = _PACKAGES.get(scheme)
        cure = f"pip install {package}" if package else "install that package"
        raise UserError(f"{address} cannot be read: {first_line(problem)}", cure) from None
    except ValueError as problem:
        raise UserError(f"{address} cannot be read: {first_line(problem)}", "check the address") from None
    except Exception as problem:  # each storage has its own, from a disk's to a network's
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # of the local disk
        cause: BaseException = problem
        if isinstance(problem, FileNotFoundError):
            cause = problem.__cause__ or problem  # so fsspec calls all that goes wrong by http
            if cause is problem or not scheme.startswith("http") or getattr(cause, "status", None) == 404:
                raise UserError(f"{address} is missing", "restore it, or name those that there are") from None
        kind = type(problem).__name__
        denied = isinstance(problem, PermissionError) or "Credentials" in kind or "Profile" in kind
        rights = _RIGHTS.get(scheme) if denied else None
        cure = rights or "check the address, the network and your access rights"
        raise UserError(
            f"{address} cannot be read: {first_line(cause)}", cure, exit_code=2 if denied else 3
        ) from None


def _plain(fact: Any) -> str:
    """A listing may give a time in another zone than a file's own answer does."""
    return str(fact.timestamp() if isinstance(fact, datetime) else fact)
