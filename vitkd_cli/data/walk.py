"""One walk over a folder of images: which files count, whose class they are, and in which order.

A class is a folder of the first level, as in torchvision and Hugging Face; timm's reader takes the last.
"""

import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from vitkd_cli.errors import UserError
from vitkd_cli.text import listed, nfc

_NUMBER = re.compile(r"(\d+)")
TYPES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
# What systems and archives leave behind; names with a leading dot (.DS_Store, ._x.jpg) are passed over, too.
_LEFT_BEHIND = frozenset({"__macosx", "@eadir", "$recycle.bin", "lost+found", "thumbs.db", "desktop.ini"})


def in_order(names: Iterable[str]) -> list[str]:
    """Sort classes and files: numbers by their value, as timm has it, and no ties.

    The order is a function of the names alone, so that ``A`` and ``a``, or ``1`` and ``01``, come alike on
    every machine. A Mac's ``é``, which is two characters, stands where others have it.
    """
    return sorted(sorted(sorted(names), key=nfc), key=_by_numbers)


def _by_numbers(name: str) -> str:
    """A text that sorts as text and numbers in turn do, in a quarter of the memory of a list of them."""
    return _NUMBER.sub(_as_text, nfc(name).lower())


def _as_text(number: re.Match[str]) -> str:
    """Before any letter, and by the number's value: how many digits, then the digits."""
    digits = str(int(number[0]))
    return f"\0{chr(len(digits))}{digits}"


def passed_over(name: str) -> bool:
    """A hidden name, or one that a system or an archive left behind."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND


def endings(input_key: str | None) -> tuple[str, ...]:
    """The endings of the files that count: all that Pillow reads, or ``.webp;.bmp`` as asked for."""
    asked = [part.strip().lower().lstrip(".") for part in (input_key or "").split(";")]
    return tuple(f".{part}" for part in asked if part) or TYPES


def subfolders(root: Path) -> list[str]:
    """The names of the folders in a folder, links to folders among them, but for those that lead above it."""
    above = {os.path.realpath(root), *map(str, Path(os.path.realpath(root)).parents)}
    with _opened(root) as entries:
        names = [
            entry.name
            for entry in entries
            if not passed_over(entry.name)
            and (
                entry.is_dir(follow_symlinks=False)
                or (
                    entry.is_symlink()
                    and os.path.isdir(entry.path)
                    and os.path.realpath(entry.path) not in above
                )
            )
        ]
    return in_order(names)


def holds_images(folder: Path, types: Sequence[str] = TYPES) -> bool:
    """Does an image lie directly in a folder?"""
    with _opened(folder) as entries:
        return any(
            Path(entry.name).suffix.lower() in types
            and not passed_over(entry.name)
            and not os.path.isdir(entry.path)
            for entry in entries
        )


def from_root(path: str, root: Path) -> str:
    """An image's name from a folder, with slashes: the same on a Mac, whose folders spell ``é`` otherwise."""
    above = os.path.join(root, "")
    name = path[len(above) :] if path.startswith(above) else os.path.relpath(path, root)
    return nfc(name.replace(os.sep, "/"))


@dataclass
class Walk:
    """What a folder holds.

    Attributes:
        files: ``[(path, name of the first-level folder)]``, sorted; the name is empty for files of the root.
        folders: the first-level folders, with images or without.
        inside: folders below the first level, as they are called from the root → their images.
        skipped: ending → files that do not count.
        notes: links and strange files, one line each.
    """

    root: Path
    files: list[tuple[str, str]] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    inside: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def walk(root: Path, types: Sequence[str] = TYPES) -> Walk:
    """Look through a folder, each folder in it once.

    A link to a folder inside of ``root`` is passed over, for the folder is read at its own place. Of one that
    leads outside only the files are read that lie directly in it. A link to nowhere with an image's ending
    counts as an image: it is one that cannot be read.
    """
    found, wanted = Walk(root), frozenset(types)
    paths: list[str] = []
    seen: set[tuple[int, int]] = set()
    links: list[str] = []
    strange: list[str] = []
    outside: list[str] = []
    again: list[str] = []
    left: list[str] = []

    def read(place: str) -> list[str]:
        """Take the files of one folder; the folders in it."""
        below, count = [], 0
        with _opened(root / place) as entries:
            for entry in entries:
                name = entry.name
                if passed_over(name):
                    continue
                path = f"{place}/{name}" if place else name
                if entry.is_dir(follow_symlinks=False):
                    below.append(path)
                    continue
                plain = entry.is_file(follow_symlinks=False)
                if not plain and os.path.isdir(entry.path):  # a link; a loop of links is none
                    links.append(path)
                    continue
                ending = name[dot:].lower() if (dot := name.rfind(".")) > 0 else ""
                if ending not in wanted:
                    found.skipped[ending] += 1
                elif plain or _file_or_nothing(entry.path):
                    paths.append(path)
                    count += 1
                else:
                    strange.append(path)
        if count and "/" in place:
            found.inside[place] = count
        return below

    def is_new(place: str) -> bool:
        facts = os.stat(root / place)
        before = len(seen)
        seen.add((facts.st_dev, facts.st_ino))
        return len(seen) > before

    # All real folders before any link, so that none is taken for another's.
    waiting = [""]
    while waiting:
        place = waiting.pop()
        if is_new(place):
            waiting += read(place)
    for link in in_order(links):  # read() adds no folders from here on, only more links
        if is_new(link):
            outside.append(f"{link} → {os.path.realpath(root / link)}")
            left += read(link)
        else:
            again.append(link)

    base = os.path.join(root, "")
    first: dict[str, str] = {}  # one text for all images of a class
    for path in in_order(paths):
        above, below, _ = path.partition("/")
        label = first.setdefault(above, nfc(above)) if below else ""
        found.files.append((base + path, label))
    found.folders = subfolders(root)
    for many, what in (
        (outside, "links that lead out of it are followed one level"),
        (left, "folders behind such links are not entered"),
        (again, "links to folders that are read at their own place"),
        (strange, "pipes, sockets or devices are no images"),
    ):
        if many:
            found.notes.append(f"{root.name or root}/: {what} ({len(many)}): {listed(in_order(many))}")
    return found


@contextmanager
def _opened(folder: Path) -> Iterator[Iterator[os.DirEntry[str]]]:
    try:
        with os.scandir(folder) as entries:
            yield entries
    except OSError as problem:
        raise UserError(
            f"cannot read the folder {folder}: {(problem.strerror or '').lower()}",
            "make it readable, or move it away",
        ) from None


def _file_or_nothing(path: str) -> bool:
    """Is this link, pipe, socket or device a file in the end, or a link to nowhere?"""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except OSError:
        return True
