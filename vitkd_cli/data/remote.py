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
from pathlib import Path
from typing import Any

from filelock import FileLock

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.files import is_leftover, part_of, saving

_STALE = 3600.0  # seconds after which nobody writes to half a copy any more
_CHANGES = ("ETag", "etag", "md5Hash", "LastModified", "mtime", "updated", "created")  # with what is there


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
        return {"size": facts["size"], "facts": [str(facts[key]) for key in _CHANGES if key in facts]}

    def open(self) -> int:
        """Open its copy, which is made if there is none."""
        while True:
            with suppress(FileNotFoundError):  # another process took it away in between
                return os.open(self._copy(), os.O_RDONLY)

    def _copy(self) -> Path:
        folder = user_cache() / "copies"
        path = folder / f"{hashlib.sha256(self.address.encode()).hexdigest()[:16]}-{self.name}"
        with suppress(FileNotFoundError):
            os.utime(path)
            return path
        with saving(path):
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{path}.lock"), _asked(self.address) as (system, place):
                if not path.exists():
                    self._make_room(folder, system.size(place))
                    system.get_file(place, str(part_of(path)))
                    os.replace(part_of(path), path)
                    with FileLock(folder / "room.lock"):  # others may have been copied meanwhile
                        self._make_room(folder, 0)
        return path

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


def addresses(pattern: str) -> list[str]:
    """The addresses that fit a pattern with ``*``."""
    with _asked(pattern) as (system, place):
        return sorted(map(system.unstrip_protocol, system.glob(place)))


@contextmanager
def _asked(address: str) -> Iterator[tuple[Any, str]]:
    """The storage of an address, and the place in it; what goes wrong there, in a line."""
    import fsspec

    try:
        yield fsspec.url_to_fs(address)
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{address} is missing", "restore it, or name those that there are") from None
    except ImportError as problem:  # fsspec says which package it needs
        raise UserError(f"{address} cannot be read: {first_line(problem)}", "install that package") from None
    except ValueError as problem:
        raise UserError(f"{address} cannot be read: {first_line(problem)}", "check the address") from None
    except Exception as problem:  # each storage has its own, from a disk's to a network's
        if getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise  # of the local disk
        raise UserError(
            f"{address} cannot be read: {first_line(problem)}",
            "check the address, the network and your access rights",
            exit_code=3,
        ) from None
