"""WebDataset's tars: which ones ``wds:`` names, and the class of each sample in them.

A sample is the files that follow each other in a tar and agree up to the first dot: ``7.jpg``, ``7.cls``.
"""

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from glob import glob
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

from vitkd_cli.data.folders import Labelled, class_map_of, labelled_by, names_by_class, of_splits
from vitkd_cli.data.images import ImageData, Images, loose_images
from vitkd_cli.data.layout import TRAIN_SYNONYMS, VAL_SYNONYMS, synonyms, tars_of, uncalled_tars
from vitkd_cli.data.remote import Remote, addresses, is_address
from vitkd_cli.data.tars import Contents, Folders, Member, Tar, tar_images
from vitkd_cli.data.walk import TYPES, endings, in_order
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.recipe import WDS, Data
from vitkd_cli.text import listed

_SAMPLE = re.compile(r"((?:.*/|)[^.]+)[.]([^/]*)")  # webdataset's key and ending
_INFO = ("_info.json", "info.json")
_ROOM = 64.0  # GiB of copies


@dataclass(frozen=True)
class Samples:
    """A class is what a sample's ``.cls`` holds, or a field of its ``.json``.

    Args:
        types: endings of images, the best first.
        target: the field, or the ending of the file with the class; unset: ``.cls``, else ``label``.
    """

    types: tuple[str, ...]
    target: str | None = None

    def contents(self, file: BinaryIO, members: Iterator[Member]) -> Contents:
        found = Contents()
        for key, parts in _samples(members):
            ending = next((kind for kind in self.types if kind in parts), None)
            if ending is None:
                found.skipped.update([*parts])
                continue
            label = self._class(file, parts)
            if isinstance(label, int) and label < 0:
                found.left_out += 1  # as timm's reader has it
                continue
            if label is None and not found.lacking:
                found.lacking = f"{key}{ending} has no class; there is {_shown(file, parts)}"
            found.images.append(parts[ending])
            found.classes.append(label)
        return found

    def _class(self, file: BinaryIO, parts: Mapping[str, Member]) -> int | str | None:
        value: Any = None
        if (text := parts.get(f".{self.target or 'cls'}")) is not None:
            value = _text(file, text).strip()
        elif ".json" in parts:
            value = _fields(file, parts[".json"]).get(self.target or "label")
        if isinstance(value, str):
            return int(value) if re.fullmatch(r"-?\d+", value) else value or None
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return int(value) if whole else None


def _samples(members: Iterator[Member]) -> Iterator[tuple[str, dict[str, Member]]]:
    """Key, and ending → file, sample by sample."""
    matched = ((match, member) for member in members if (match := _SAMPLE.fullmatch(member.name)))
    for key, files in groupby(matched, lambda pair: pair[0][1]):
        parts: dict[str, Member] = {}
        for match, member in files:
            ending = f".{match[2].lower()}"
            if ending in parts:
                raise UserError(f"a tar has {member.name} twice in one sample", "make the tar anew")
            parts[ending] = member
        yield key, parts


def _shown(file: BinaryIO, parts: Mapping[str, Member]) -> str:
    """The endings of a sample, and the fields of its ``.json``."""
    fields = {kind: f" ({listed([*_fields(file, parts[kind])])})" for kind in parts if kind == ".json"}
    return listed([kind + fields.get(kind, "") for kind in parts])


def _fields(file: BinaryIO, member: Member) -> dict[str, Any]:
    with suppress(ValueError):
        if isinstance(content := json.loads(_text(file, member)), dict):
            return content
    return {}


def _text(file: BinaryIO, member: Member) -> str:
    return os.pread(file.fileno(), member.size, member.start).decode(errors="replace")


# Which tars -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """The tars of a split.

    Attributes:
        announced: name of a tar → images, as ``_info.json`` has it.
        total: images of all, as ``PATTERN|N`` has it.
        target: the field of the class, as ``_info.json`` has it.
    """

    tars: list[Tar]
    announced: Mapping[str, int] = field(default_factory=dict)
    total: int | None = None
    target: str | None = None


def _names_tars(place: str) -> bool:
    """Does this name tars one by one, or by a pattern, and not a folder of them?"""
    return bool(re.search(r"[{*?]|::|\.tar(\||$)", place))


def shards_in(data: Data, split: str) -> Shards | None:
    """The tars of a split; None where there is no such split.

    Tars that are named themselves are of whichever split is asked for. In a folder ``_info.json`` says which
    belong to a split, else folders or names do; tars of which none is called by a split are for training.
    """
    place = _place(data)
    if _names_tars(place):
        return _named(place, data)
    if is_address(place):
        raise UserError(f"--data {data.data} names no tars", f"{WDS}ADDRESS/NAME-{{000..127}}.tar, or *.tar")
    root = expanded(place)
    if not root.is_dir():
        raise UserError(f"--data {data.data}: there is no folder {root}", f"{WDS}FOLDER, or {WDS}PATTERN.tar")
    if ".tar" in split:  # timm's way
        return _named("::".join(os.path.join(root, part) for part in split.split("::")), data)
    info = _info(root)
    for name in synonyms(split):
        if name in info:
            return _announced(root, info[name])
    if info:
        return None
    tars = tars_of(root, split)
    if tars:
        _refuse_gaps(tars)
    return Shards([*tars]) if tars else None


def _place(data: Data) -> str:
    """What stands behind ``wds:``, below ``--data-dir`` if there is one."""
    parts = str(data.data).removeprefix(WDS).split("::")
    below = (os.path.join(data.data_dir or "", os.path.expanduser(part)) for part in parts)
    return "::".join(part if is_address(part) else here for part, here in zip(parts, below, strict=True))


def _named(pattern: str, data: Data = Data()) -> Shards:
    """The tars of a pattern, such as ``train-{000..127}.tar|128000``, or of several with ``::`` between."""
    pattern, _, total = pattern.partition("|")
    found: list[str] = []
    for part in pattern.split("::"):
        for name in _braces(os.path.expanduser(part)):
            if "*" in name or ("?" in name and not is_address(name)):
                fitting = in_order(addresses(name) if is_address(name) else glob(name))
                if not fitting:
                    raise UserError(
                        f"no file fits {name}", "check the pattern; quotes keep the shell away from it"
                    )
                found += fitting
            else:
                found.append(name)
    if total and not total.isdigit():
        raise UserError(f"{pattern}|{total}: behind | stands the number of images", "such as |128000")
    room = round((data.remote_cache or _ROOM) * 2**30)
    tars = [Remote(name, room) if is_address(name) else Path(name) for name in dict.fromkeys(found)]
    return Shards(tars, total=int(total) if total else None)


def _braces(pattern: str) -> list[str]:
    """``a{0..2}`` → a0, a1, a2; ``{a,b}`` → a, b; as a shell has it."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if not found:
        return [pattern]
    before, after = pattern[: found.start()], pattern[found.end() :]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", found[1]):
        first, last = numbers.groups()
        width = max(map(len, (first, last))) if "0" in (first[0], last[0]) else 0
        words = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        words = found[1].split(",")
    return [whole for word in words for whole in _braces(f"{before}{word}{after}")]


def _info(root: Path) -> dict[str, Any]:
    """Split → what ``_info.json`` says of it."""
    for name in _INFO:
        if (file := root / name).is_file():
            try:
                splits = json.loads(file.read_bytes()).get("splits") or {}
                return {name: dict(told) for name, told in splits.items()}
            except (ValueError, TypeError, AttributeError):
                raise UserError(f"{file} cannot be read", "restore it, or delete it") from None
    return {}


def _announced(root: Path, told: Mapping[str, Any]) -> Shards:
    names = list(map(str, told.get("filenames") or ()))
    lengths = told.get("shard_lengths") or ()
    counts = dict(zip((Path(name).name for name in names), map(int, lengths), strict=False))
    return Shards([root / name for name in names], counts, target=told.get("alt_label") or None)


def _refuse_gaps(tars: list[Path]) -> None:
    """Refuse numbered tars of which some lack."""
    numbered: defaultdict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for tar in tars:
        if match := re.fullmatch(r"(.*?)(\d+)(\D*)", tar.name):
            numbered[match[1], match[3]][int(match[2])] = match[2]
    for (before, after), numbers in numbered.items():
        width = len(next(iter(numbers.values())))
        if lacking := sorted({*range(min(1, *numbers), max(numbers))} - {*numbers}):
            names = [f"{before}{number:0{width}d}{after}" for number in lacking]
            raise UserError(
                f"{tars[0].parent} lacks {listed(names)}",
                f"restore what lacks, or name the tars that there are: {WDS}PATTERN.tar, {WDS}A.tar::B.tar",
            )


def webdataset(data: Data, *, unlabelled: bool = False) -> ImageData:
    """The splits of a WebDataset.

    Args:
        unlabelled: nobody reads the classes, so samples without will do.
    """
    train = shards_in(data, data.train_split)
    own = data.val_split != "none" and not _names_tars(_place(data))
    val = shards_in(data, data.val_split) if own else None
    if train is None and data.train_split not in TRAIN_SYNONYMS:
        raise _no_split(data, data.train_split)
    if own and val is None and data.val_split not in VAL_SYNONYMS:
        raise _no_split(data, data.val_split)
    if train is None and val is None:
        raise UserError(f"--data {data.data} names no tars", f"{WDS}FOLDER with NAME-000000.tar, …")
    shown, held = (
        None if split is None else _images(split, data, labelled=not unlabelled) for split in (train, val)
    )
    count = sum(len(split.tars) for split in (train, val) if split)
    return of_splits(Path(_place(data)), shown, held, f"{count:,} tars")


def lone_webdataset(data: Data, split: str) -> tuple[Images, list[str] | None]:
    """One split, or all tars where none is called by a split, and the names of its classes if it has some."""
    shards, root = shards_in(data, split), Path(_place(data))
    if shards is None and split in VAL_SYNONYMS and not _info(root) and (tars := uncalled_tars(root)):
        shards = Shards([*tars])
    if shards is None:
        raise _no_split(data, split)
    images, classes = _images(shards, data)
    return images, names_by_class(classes) if classes is not None else None


def has_shards(data: Data, split: str) -> bool:
    """Does a folder hold tars of this split?"""
    return not _names_tars(_place(data)) and shards_in(data, split) is not None


def named_images(paths: Sequence[str | Path]) -> Images:
    """Images without labels: files, folders of them, or tars, named as they are or by ``wds:``."""
    tars = [text for text in map(str, paths) if text.startswith(WDS) or text.endswith(".tar")]
    if not tars:
        return loose_images(paths)
    if len(tars) < len(paths):
        raise UserError("--images names tars and others", "tars alone, or files and folders alone")
    found: list[Tar] = []
    for place in (text.removeprefix(WDS) for text in tars):
        inside = [] if _names_tars(place) else sorted(expanded(place).rglob("*.tar"))
        found += inside or _named(place).tars
    images, _ = tar_images(found, Folders(TYPES))
    return images.relabelled([-1] * len(images))


def _no_split(data: Data, split: str) -> UserError:
    return UserError(f"--data {data.data} has no tars of the split {split!r}", "name them: wds:PATTERN.tar")


def _images(shards: Shards, data: Data, *, labelled: bool = True) -> Labelled:
    """The samples of tars, and their classes by name, if these have names."""
    layout = Samples(endings(data.input_key), data.target_key or shards.target)
    images, names = tar_images(shards.tars, layout, labelled=labelled, announced=shards.announced)
    if shards.total not in (None, len(images)):
        raise UserError(
            f"--data {data.data} holds {len(images):,} images, and {shards.total:,} are announced",
            "restore what is missing, or correct the number behind |",
            exit_code=3,
        )
    mapping = class_map_of(data.class_map, Path())
    if names is None:
        return images, mapping
    return labelled_by(images, names, Path(_place(data)), mapping)
