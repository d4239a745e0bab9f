"""Images in tars, by an index of where each one lies: read in any order, by any number of processes.

The index of ``x.tar`` is made once, by following its headers, and kept as ``x.tar.….idx.safetensors`` beside
it, or in a cache folder where nothing can be written there. It counts while size, time of change and first
header of the tar are those that it was made of. Processes that start together share the work: each begins
at another tar, and reads what others have made by then.
"""

import hashlib
import json
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vitkd_cli.data.images import Images
from vitkd_cli.data.packed import whole_numbers
from vitkd_cli.data.remote import Remote, changed, user_cache
from vitkd_cli.data.walk import TYPES, in_order, passed_over
from vitkd_cli.errors import UserError, first_line
from vitkd_cli.files import CannotWrite, flush, saving
from vitkd_cli.text import listed, nfc
from vitkd_cli.world import rank, world_size

_FORMAT = 1
_OPEN = 128  # tars that a process holds open; systems allow 1,024 files and more
_COPIES = 2  # of tars from elsewhere: an open file takes room after it was deleted
_THREADS = 8  # that look at tars: a network's disk answers many at once


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: its path; of a tar inside the tar, below that one's name.
        header, start: where in the tar its header and its bytes begin.
        size: in bytes.
    """

    name: str
    header: int
    start: int
    size: int


@dataclass
class Contents:
    """The images of a tar, in the order in which they are numbered.

    Attributes:
        classes: of each image: a number, or a name; None where the tar says none.
        skipped: ending → files that are no images.
        left_out: images whose class is negative.
        lacking: the first image without a class, and why, if there is one.
    """

    images: list[Member] = field(default_factory=list)
    classes: list[int | str | None] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    lacking: str = ""


class TarLayout(Protocol):
    """How a tar says what its images are; an index is of one of these, told apart by their text."""

    def contents(self, file: BinaryIO, members: Iterator[Member]) -> Contents: ...


@dataclass(frozen=True)
class Folders:
    """A class is a folder in the tar, or a tar in it.

    Args:
        types: endings of images.
    """

    types: tuple[str, ...] = TYPES

    def contents(self, file: BinaryIO, members: Iterator[Member]) -> Contents:
        found, by_path = Contents(), dict[str, Member]()
        for member in members:
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if any(map(passed_over, parts)):
                continue
            if (ending := Path(parts[-1]).suffix.lower()) in self.types:
                by_path["/".join(parts)] = member
            else:
                found.skipped[ending] += 1
        for path in in_order(by_path):
            found.images.append(by_path[path])
            found.classes.append(nfc(os.path.dirname(path)))
        return found


Tar = Path | Remote


def tar_images(
    tars: Sequence[Tar],
    layout: TarLayout,
    *,
    labelled: bool = True,
    announced: Mapping[str, int] | None = None,
) -> tuple[Images, list[str] | None]:
    """The images of tars, one tar after the other, and the names of their classes in natural order.

    Args:
        labelled: refuse images without a class, whose label is -1 otherwise.
        announced: name of a tar → how many images it must hold.

    Returns:
        The names are None where classes are numbers.

    Raises:
        UserError: a tar is missing, cut, damaged or compressed, or none of them holds an image.
    """
    first = rank() * len(tars) // world_size()
    order = [*range(first, len(tars)), *range(first)]
    with ThreadPoolExecutor(_THREADS) as pool:
        made = dict(zip(order, pool.map(lambda number: _index_of(tars[number], layout), order), strict=True))
    indices = [made[number] for number in range(len(tars))]
    opener = TarImages(indices)
    skipped = sum((Counter(index.told["skipped"]) for index in indices), Counter[str]())
    if not len(opener):
        held = f", but {', '.join(skipped)}" if skipped else ""
        raise UserError(
            f"there are no images in {listed([tar.name for tar in tars])}{held}",
            f"files that count: {', '.join(TYPES)}; --input-key names others",
        )
    for index in indices:
        if labelled and (lacking := index.told["lacking"]):
            raise UserError(
                f"{index.tar}: {lacking}",
                "--target-key KEY names a field of its .json; --data FOLDER, without wds:, takes folders in "
                "tars as classes",
            )
        count = len(index.labels) + index.told["left_out"]
        if (wanted := (announced or {}).get(index.tar.name, count)) != count:
            raise UserError(
                f"{index.tar} holds {count:,} images, and {wanted:,} are announced",
                "copy it again, or correct _info.json",
                exit_code=3,
            )
    notes = [note for index in indices for note in index.notes]
    if left_out := sum(index.told["left_out"] for index in indices):
        notes.append(f"images whose class is negative are left out ({left_out:,})")
    names, labels = _labels(indices)
    images = Images(
        range(len(opener)),
        labels,
        opener,
        opener.name,
        archives=[str(tar) for tar in tars],
        archive=opener.archive,
        notes=notes,
        skipped=skipped,
    )
    return images, names


def _labels(indices: "Sequence[Index]") -> tuple[list[str] | None, np.ndarray[Any, Any]]:
    """The names of all classes, and each image's place among them; its number where there are no names."""
    own = [index.labels for index in indices]
    if all(index.told["classes"] is None for index in indices):
        return None, np.concatenate(own)
    texts: list[list[str]] = []
    for number, index in enumerate(indices):
        classes = index.told["classes"]
        if classes is None:  # numbers in this tar, and words in another
            classes = [str(label) for label in range(own[number].max(initial=-1) + 1)]
        texts.append(classes)
    both = list(zip(texts, own, strict=True))
    used = [{classes[label] for label in np.unique(part) if label >= 0} for classes, part in both]
    names = in_order(set().union(*used))
    at = {name: label for label, name in enumerate(names)}
    # of label -1 the last one
    tables = [np.array([*(at.get(name, -1) for name in classes), -1], np.int32) for classes in texts]
    return names, np.concatenate([table[part] for table, part in zip(tables, own, strict=True)])


# Reading ----------------------------------------------------------------------------------------------------


def tar_numbers(images: Images) -> np.ndarray[Any, Any]:
    """``[N]``: which of the tars holds each image."""
    if not isinstance(images.open, TarImages):
        raise UserError("--shuffle-block is about images in tars", "leave it out")
    ends = images.open.ends
    return np.repeat(np.arange(len(ends)), np.diff(ends, prepend=0))[whole_numbers(images.refs)]


class TarImages:
    """Opens images of tars by their number.

    A worker opens tars and maps their indices as it needs them; nothing grows with the number of images.
    """

    def __init__(self, indices: "Sequence[Index]") -> None:
        self.sources = [index.tar for index in indices]
        self.tars = list(map(str, self.sources))
        self.files = [str(index.path) for index in indices]
        self.looks = [index.told["tar"] for index in indices]
        self.ends = np.cumsum([len(index.labels) for index in indices])
        self._forget()

    def _forget(self) -> None:
        self._places: dict[int, np.ndarray[Any, Any]] = {}
        self._descriptors: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_places", "_descriptors")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def __call__(self, number: int, decoding: Callable[[Any], Any]) -> Any:
        tar, _, start, size = self._place(number)
        content = os.pread(self._descriptor(tar), size, start)
        if len(content) < size:
            raise OSError(f"{self.tars[tar]} is cut")
        return decoding(BytesIO(content))

    def archive(self, number: int) -> tuple[str, int]:
        """The tar that holds an image, and from which byte on."""
        tar, _, start, _ = self._place(number)
        return self.tars[tar], start

    def name(self, number: int) -> str:
        """The tar and the image's path in it, which its header tells."""
        tar, header, start, _ = self._place(number)
        name = f"[{number}]"
        with suppress(OSError, tarfile.TarError, UserError):
            head = os.pread(self._descriptor(tar), start - header, header)
            with tarfile.TarFile(fileobj=BytesIO(head)) as opened:
                name = next(iter(opened)).name
        return f"{self.tars[tar]}/{name}"

    def _place(self, number: int) -> tuple[int, int, int, int]:
        """Tar, header, first byte and bytes of an image."""
        tar = int(np.searchsorted(self.ends, number, side="right"))
        if tar not in self._places:
            with safe_open(self.files[tar], "pt") as file:  # as numpy's it would be copied
                self._places[tar] = file.get_tensor("places").numpy()
        row = number - (int(self.ends[tar - 1]) if tar else 0)
        header, start, size = self._places[tar][row].tolist()
        return tar, header, start, size

    def _descriptor(self, tar: int) -> int:
        if tar not in self._descriptors:
            source, looks = self.sources[tar], self.looks[tar]
            try:
                descriptor = _opened(source, looks)
            except (FileNotFoundError, UserError) as problem:  # it was there, and so were access rights
                lost = problem if isinstance(problem, UserError) else _unreadable(source, problem)
                raise UserError(lost.message, lost.hint, exit_code=3) from None
            status = os.fstat(descriptor)
            if (status.st_size, status.st_mtime_ns) != (looks["size"], looks.get("time", status.st_mtime_ns)):
                os.close(descriptor)
                raise changed(source)
            if len(self._descriptors) >= (_COPIES if isinstance(source, Remote) else _OPEN):
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            self._descriptors[tar] = descriptor
        return self._descriptors[tar]


# The index --------------------------------------------------------------------------------------------------


class Index(NamedTuple):
    """What is known of a tar.

    Attributes:
        path: the file of the index.
        labels: ``[N]`` int32 in ``told["classes"]``, or numbers as the tar has them; -1 where it says none.
        told: ``classes`` and the rest of :class:`Contents`, and ``tar``: what the tar looked like.
        notes: what was odd.
    """

    tar: Tar
    path: Path
    labels: np.ndarray[Any, Any]
    told: dict[str, Any]
    notes: tuple[str, ...] = ()


def _index_of(tar: Tar, layout: TarLayout) -> Index:
    """The index that there is, or a new one."""
    notes: tuple[str, ...] = ()
    name = f"{tar.name}.{_digest(repr((_FORMAT, layout)).encode())[:8]}.idx.safetensors"
    place = str(tar) if isinstance(tar, Remote) else tar.absolute()
    elsewhere = user_cache() / "tars" / f"{_digest(os.fsencode(place))[:16]}-{name}"
    places = [elsewhere] if isinstance(tar, Remote) else [tar.with_name(name), elsewhere]
    try:
        looks = _looks(tar)
        for path in places:
            if path.is_file():
                with suppress(SafetensorError, OSError, KeyError, ValueError):
                    if (index := _read(tar, path)).told["tar"] == looks:
                        return index
                notes = (f"the index {path} does not fit {tar.name}, which is indexed anew",)
        with open(_opened(tar, looks), "rb") as file:
            contents = layout.contents(file, _members(file, 0, looks["size"], str(tar)))
    except (OSError, tarfile.TarError) as problem:
        raise _unreadable(tar, problem) from None
    for path in places:
        try:
            with saving(path):
                path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, looks, contents)
            return _read(tar, path)._replace(notes=notes)
        except CannotWrite as problem:
            refused = problem.message
    raise UserError(
        f"the index of {tar.name} can be kept nowhere: {refused}",
        "XDG_CACHE_HOME=FOLDER names another folder for what need not lie beside the tars",
    )


def _opened(tar: Tar, looks: dict[str, Any]) -> int:
    return tar.open(looks) if isinstance(tar, Remote) else os.open(tar, os.O_RDONLY)


def _unreadable(tar: Tar, problem: Exception) -> UserError:
    if isinstance(problem, FileNotFoundError):
        return UserError(f"the tar {tar} is missing", "restore it, or name those that there are")
    with suppress(OSError), open(_opened(tar, _looks(tar)), "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            return UserError(f"{tar} is compressed: nothing in it can be read by its place", "gunzip it")
    return UserError(
        f"{tar} cannot be read as a tar: {first_line(problem)}", "copy or download it again", exit_code=3
    )


def _looks(tar: Tar) -> dict[str, Any]:
    """What tells a tar from another, or from itself after a change: size, time, and its first header."""
    if isinstance(tar, Remote):
        return tar.looks()
    with open(tar, "rb") as file:
        status = os.fstat(file.fileno())
        header = _digest(file.read(tarfile.BLOCKSIZE))
    return {"size": status.st_size, "time": status.st_mtime_ns, "header": header}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _read(tar: Tar, path: Path) -> Index:
    with safe_open(path, "np") as file:
        return Index(tar, path, file.get_tensor("labels"), json.loads(file.metadata()["vitkd"]))


def _write(path: Path, looks: dict[str, Any], contents: Contents) -> None:
    """Write an index as a whole; several processes may do so at once, and all write the same."""
    classes: list[str] | None = None
    numbers: list[int] = [
        -1 if label is None else label for label in contents.classes if not isinstance(label, str)
    ]
    if len(numbers) < len(contents.classes):
        classes = in_order({str(label) for label in contents.classes if label is not None})
        at = {name: number for number, name in enumerate(classes)}
        numbers = [-1 if label is None else at[str(label)] for label in contents.classes]
    told = {key: getattr(contents, key) for key in ("skipped", "left_out", "lacking")}
    places = np.array([member[1:] for member in contents.images], np.int64).reshape(-1, 3)
    with saving(path), tempfile.TemporaryDirectory(prefix=".part-", dir=path.parent) as folder:
        part = Path(folder) / path.name
        part.touch()
        mode = part.stat().st_mode
        save_file(
            {"places": places, "labels": np.array(numbers, np.int32)},
            part,
            {"vitkd": json.dumps({**told, "classes": classes, "tar": looks})},
        )
        os.chmod(part, mode)  # safetensors 0.8 writes 0600
        flush(part)
        os.replace(part, path)


def _members(file: BinaryIO, start: int, end: int, name: str) -> Iterator[Member]:
    """The files of a tar, and of tars in it, which lies in ``file`` from byte ``start`` to ``end``.

    Raises:
        UserError: it cannot be followed to its end mark, two blocks of zeros; tarfile stops silently.
    """
    count, at, problem = 0, start, ""
    while (found := _next(file, at)) is not None:
        member, following = found
        if following > end:
            problem = ": a file goes beyond its end"
            break
        count, at = count + 1, following
        if member is not None and member.name.lower().endswith(".tar"):
            inner, place = Path(member.name).with_suffix("").name, f"{name}/{member.name}"
            for held in _members(file, member.start, member.start + member.size, place):
                yield held._replace(name=f"{inner}/{held.name}")
        elif member is not None:
            yield member
    mark = os.pread(file.fileno(), 2 * tarfile.BLOCKSIZE, at)
    if problem or mark != bytes(2 * tarfile.BLOCKSIZE) or at + len(mark) > end:
        raise UserError(
            f"{name} is cut or damaged: {count:,} files can be read, and at byte {at - start:,} there is "
            f"neither another nor the end mark{problem}",
            "copy or download it again",
        )


def _next(file: BinaryIO, at: int) -> tuple[Member | None, int] | None:
    """What begins at a byte of a tar, None if it is no file, and where the next begins; None at the end.

    Most headers are plain, and read here in a tenth of tarfile's time: long names, links and damage are its.
    """
    head = os.pread(file.fileno(), tarfile.BLOCKSIZE, at)
    if head[156:157] == tarfile.REGTYPE and head[257:262] == b"ustar":
        with suppress(ValueError):
            size, told = (int(head[a:b].strip(b" \0"), 8) for a, b in ((124, 136), (148, 156)))
            if sum(head) - sum(head[148:156]) + 8 * ord(" ") == told:
                parts = (head[345:500], head[:100])  # what stands before the name, and the name
                text = b"/".join(filter(None, (part.partition(b"\0")[0] for part in parts)))
                member = Member(text.decode(errors="surrogateescape"), at, at + len(head), size)
                return member, member.start + -(-size // len(head)) * len(head)
    file.seek(at)
    with tarfile.TarFile(fileobj=file) as tar:
        if (info := tar.next()) is None:
            return None
        return (Member(info.name, at, info.offset_data, info.size) if info.isfile() else None), tar.offset
