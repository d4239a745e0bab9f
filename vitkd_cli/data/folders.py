"""Folders of class folders -> training and validation images whose classes agree.

The natural order of classes ("2" before "10") is timm's. What timm does in silence is refused or noted here:
classes that only the validation split has, images outside class folders, empty folders, splits taken for
classes.
"""

from __future__ import annotations

import os
import re
import shlex
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from timm.data.readers.class_map import load_class_map

from vitkd_cli.data.imagenet import flat_validation, ground_truth_near
from vitkd_cli.data.images import (
    FolderImages,
    Images,
    Labelled,
    Selection,
    TarImages,
    loose_images,
)
from vitkd_cli.data.walk import (
    TYPES,
    Walk,
    endings,
    from_root,
    holds_images,
    in_order,
    subfolders,
    walk,
)
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.text import listed, nfc

TRAIN_SYNONYMS = ("train", "training")
VAL_SYNONYMS = ("validation", "val", "valid", "eval", "evaluation")
TEST_SYNONYMS = ("test", "testing")
# Folders that no training image is taken from.
HELD_OUT = (*VAL_SYNONYMS, *TEST_SYNONYMS, "pred", "predict", "prediction", "predictions")
_SPLIT = re.compile(
    rf"(?:(.+)[-_. ])?({'|'.join((*TRAIN_SYNONYMS, *HELD_OUT))})(?:[-_. ](.+))?", re.IGNORECASE
)
LAYOUT = (
    "expected FOLDER/train/CLASS/image.jpg and FOLDER/validation/CLASS/image.jpg, or FOLDER/CLASS/image.jpg"
)


@dataclass
class Found:
    """The splits as they were found, before shots and class counts are settled."""

    name: str
    train: Images | None
    val: Images | None
    class_names: list[str] | None
    about: str
    notes: list[str]
    split_files: dict[str, list[str]] | None = None
    labelled: bool = True
    skipped: Counter[str] = field(default_factory=Counter)  # ending → files that do not count


def unlabelled_folder(root: Path, input_key: str | None) -> Found | None:
    """A folder that holds images itself: all in it and below are for training. None if it holds none.

    Folders called test, val or pred are left out.
    """
    types = endings(input_key)
    if not holds_images(root, types):
        return None
    found = walk(root, types)
    kept = [path for path, _ in found.files if not _held_out(Path(path).relative_to(root).parent.parts)]
    notes = list(found.notes)
    if left := len(found.files) - len(kept):
        notes.append(f"images in folders called test, val or pred are left out ({left})")
    images = FolderImages([(path, -1) for path in kept])
    name, about = root.resolve().name, f"folder {root}"
    return Found(name, images, None, None, about, notes, labelled=False, skipped=found.skipped)


def data_folder(data: str, data_dir: str | Path | None, *, tars: bool = False) -> Path:
    """What ``--data`` (or timm's pair ``--dataset NAME --data-dir ROOT``) means: a folder, or a tar."""
    if not data and data_dir is None:
        raise UserError(
            "--data is empty", "give a folder, digits, or a dataset of timm's such as hfds/timm/imagenet-1k"
        )
    root = expanded(data) if data else expanded(data_dir or "")
    if data and data_dir is not None and not root.exists():
        root = expanded(data_dir) / data
    if root.is_file() and not (tars and root.suffix == ".tar"):
        raise UserError(f"--data: {root} is a file", LAYOUT)
    if not root.exists():
        raise UserError(
            f"--data: there is no folder {root}",
            "give a folder, digits, or a dataset such as hfds/timm/imagenet-1k",
        )
    return root


def image_folder(
    root: Path,
    train_split: str,
    val_split: str,
    val_fraction: float,
    class_map: str | Path | dict[str, int] | None,
    seed: int,
    input_key: str | None,
    split_files: dict[str, list[str]] | None,
) -> Found:
    train_root = _split_folder(root, train_split, TRAIN_SYNONYMS)
    # "test" is only a stand-in for a validation split that nobody named
    stand_in = (*VAL_SYNONYMS, *TEST_SYNONYMS) if val_split in VAL_SYNONYMS else ()
    val_root = None if val_split == "none" else _split_folder(root, val_split, stand_in)
    flat = flat_folder(root, val_split, stand_in) if val_root is None and val_split != "none" else None
    truth = ground_truth_near(flat) if flat not in (None, root) else None
    for split, found_at, may_lack in (
        (train_split, train_root, TRAIN_SYNONYMS),
        (val_split, val_root, (*VAL_SYNONYMS, "none")),
    ):
        if found_at is None and split not in may_lack and split_files is None:
            raise UserError(
                f"{root} has no split folder {split!r}",
                f"it holds: {listed(subfolders(root)) or 'no folder'}",
            )
    mapping = _class_indices(class_map, root)
    name, about = root.resolve().name, f"folder {root}"
    found = Found(name, None, None, None, about, [])

    if split_files is not None:
        return _restored(found, root, train_root or root, mapping, input_key, split_files)
    if val_root is not None and train_root is None:
        samples, classes = _scan(val_root, mapping, input_key, found)
        found.val, found.class_names = FolderImages(samples), names_by_class(classes)
        found.about += f" (only {_from(root, val_root)})"
        return found

    if train_root is not None and val_root is None:
        _refuse_a_class_called_train(train_root)
    by_name = train_split in TRAIN_SYNONYMS  # else the flag says that this is the training split
    samples, classes = _scan(train_root or root, mapping, input_key, found, training=by_name)
    found.train, found.class_names = FolderImages(samples), names_by_class(classes)
    if flat is not None and truth is not None:  # as ImageNet's own validation images come
        images, shown = flat_validation(loose_images([flat]), truth, mapping)
        if extra := [name for name in shown if name not in classes]:
            raise UserError(
                f"{truth} has classes that {train_root or root} lacks: {listed(extra)}",
                "give both splits the same classes, or choose with --class-map",
            )
        own = [classes[name] for name in names_by_class(shown)]
        found.val = images if mapping else Labelled(images, [own[label] for label in images.labels()])
        found.about += f" and {flat.name}/ with {truth.name}"
        return found
    if flat not in (None, root):
        found.notes.append(f"{flat} has no class folders and is left out")
    if val_root is None:
        if train_root is not None:
            found.about += f" ({_from(root, train_root)})"
        if val_fraction == 0:
            return found
        found = hold_out(found, val_fraction, seed)
        assert isinstance(found.train, Selection) and isinstance(found.val, Selection)
        found.split_files = {
            split: [from_root(images.path(i), root) for i in range(len(images))]
            for split, images in (("train", found.train), ("validation", found.val))
        }
        return found

    # The folder names, not their order, say what a validation image shows.
    val_samples, val_classes = _scan(val_root, mapping, input_key, found)
    extra = in_order(set(val_classes) - set(classes))
    missing = in_order(set(classes) - set(val_classes))
    if extra:
        lacking = f", and lacks {listed(missing)}" if missing else ""
        raise UserError(
            f"{val_root} has classes that {train_root} lacks: {listed(extra)}{lacking}",
            "give both splits the same class folders, or choose with --class-map",
        )
    if missing:
        found.notes.append(f"no {val_root.name} images for {listed(missing)}")
    index_to_name = {index: name for name, index in val_classes.items()}
    found.val = FolderImages([(path, classes[index_to_name[index]]) for path, index in val_samples])
    assert train_root is not None
    found.about += f" ({_from(root, train_root)} and {_from(root, val_root)})"
    return found


def lone_split(
    root: Path,
    split: str,
    class_map: str | Path | dict[str, int] | None,
    ground_truth: Path | None,
    input_key: str | None = None,
) -> tuple[Images, list[str]]:
    """One split and its class names: the split's folder or tar, or ``root`` where it is the split itself."""
    if root.is_file():
        return _tar_split(root, class_map, ground_truth)
    synonyms = (*VAL_SYNONYMS, *TEST_SYNONYMS) if split in VAL_SYNONYMS else TRAIN_SYNONYMS
    split_root = _split_folder(root, split, synonyms)
    flat = None if split_root else flat_folder(root, split, synonyms)
    if flat is not None:
        if not holds_images(flat, endings(input_key)):
            return _tar_split(flat, class_map, ground_truth)
        if truth := ground_truth or ground_truth_near(flat):
            images, classes = flat_validation(loose_images([flat]), truth, _class_indices(class_map, root))
            return images, names_by_class(classes)
    others = [name for name in (*TRAIN_SYNONYMS, *VAL_SYNONYMS) if _split_folder(root, name, ())]
    if split_root is None and (others or split not in VAL_SYNONYMS):
        raise UserError(
            f"{root} has no split folder {split!r}", f"it holds: {listed(subfolders(root)) or 'no folder'}"
        )
    refuse_ground_truth(ground_truth, f"{split_root or root} has class folders")
    found = Found("", None, None, None, "", [])
    samples, classes = _scan(split_root or root, _class_indices(class_map, root), input_key, found)
    return FolderImages(samples, _with_endings(found)), names_by_class(classes)


def holds_split(root: Path, split: str) -> bool:
    """Does a folder hold this split by itself, or is it a split: a tar, or flat with a file of classes?"""
    synonyms = (*VAL_SYNONYMS, *TEST_SYNONYMS) if split in VAL_SYNONYMS else ()
    if root.is_file() or _split_folder(root, split, synonyms):
        return True
    flat = flat_folder(root, split, synonyms)
    return flat is not None and (not holds_images(flat) or ground_truth_near(flat) is not None)


def _tar_split(
    root: Path, class_map: str | Path | dict[str, int] | None, ground_truth: Path | None
) -> tuple[Images, list[str]]:
    """A tar, or a folder of tars, with folders or names as classes; or flat, with a file of classes."""
    try:
        images = TarImages(root)
    except (tarfile.TarError, OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"{root} cannot be read as tar files of images: {first_line(error)}",
            "give a .tar with one folder per class",
        ) from error
    mapping = _class_indices(class_map, root)
    if set(images.names) != {""}:
        refuse_ground_truth(ground_truth, f"{root} has class folders")
        names = in_order(set(images.names))
        if {name.lower() for name in names} <= {*TRAIN_SYNONYMS, *HELD_OUT}:
            raise UserError(f"{root} holds the splits {listed(names)}", "unpack it, and name the folder")
        if "" in names:
            stray = images.path(images.names.index(""))
            raise UserError(f"{stray} lies beside the class folders", "move it into a class folder or away")
        classes = mapping or {name: index for index, name in enumerate(names)}
        shown = [index for index, name in enumerate(images.names) if name in classes]
        if not shown:
            raise UserError(
                f"the class map names no class folder of {root}", f"its class folders are {listed(names)}"
            )
        labels = [classes[images.names[index]] for index in shown]
        return Labelled(Selection(images, shown), labels), names_by_class(classes)
    truth = ground_truth or ground_truth_near(root.parent)
    if truth is None:
        raise UserError(
            f"{root} holds images without class folders", "--ground-truth FILE lists their classes"
        )
    labelled, classes = flat_validation(images, truth, mapping)
    return labelled, names_by_class(classes)


def refuse_ground_truth(ground_truth: str | Path | None, why: str) -> None:
    """Refuse a file of classes where the data has them already."""
    if ground_truth:
        raise UserError(
            f"--ground-truth lists the classes of a flat folder, and {why}", "leave --ground-truth out"
        )


def flat_folder(root: Path, split: str, synonyms: Sequence[str]) -> Path | None:
    """The folder of a split that holds images, or tars, but no folders; ``root`` itself if it is such."""
    for base in _bases(root):
        places = _split_places(base, [split, *synonyms])
        for place in (*map(_once, places), *([root] if base == root else [])):
            if not subfolders(place) and holds_images(place, (*TYPES, ".tar")):
                return place
    return None


def _split_folder(root: Path, split: str, synonyms: Sequence[str]) -> Path | None:
    """The folder of a split: one of its names, holding folders itself; in ``root``, or below what wraps it.

    A class may well be called "train" too; its folder holds images and no folders.
    """
    names = [split, *(synonyms if split in synonyms else ())]
    places = (_once(place) for base in _bases(root) for place in _split_places(base, names))
    return next((place for place in places if subfolders(place)), None)


def _split_places(base: Path, names: Sequence[str]) -> list[Path]:
    """The folders in a folder that are called by one of these names, in their order."""
    inside, named = subfolders(base), _splits(base)
    places = []
    for name in dict.fromkeys(filter(None, names)):
        if name in inside or ("/" in name and (base / name).is_dir()):
            places.append(base / name)
        elif name in named:
            places.append(named[name])
    return places


def _bases(root: Path) -> Iterator[Path]:
    """A folder, and the one in it if there is no other and no image, as unpacked archives have it."""
    seen = set()
    while root.resolve() not in seen:
        yield root
        seen.add(root.resolve())
        inside = subfolders(root)
        if len(inside) != 1 or holds_images(root):
            return
        root = root / inside[0]


def _once(split: Path) -> Path:
    """``seg_train/seg_train`` of ``seg_train``: the same split's folder in it, if there is nothing else."""

    def word(name: str) -> str:
        return match[2].lower() if (match := _SPLIT.fullmatch(name)) else name

    *_, last = (base for base in _bases(split) if word(base.name) == word(split.name))
    return last


def _splits(base: Path) -> dict[str, Path]:
    """Word of a split → its folder: ``Train/``; ``seg_train/`` where all folders are called so."""
    matches = {name: _SPLIT.fullmatch(name) for name in subfolders(base)}
    rests = {f"{match[1]} {match[3]}".lower() if match else name for name, match in matches.items()}
    alike = len(rests) == 1
    return {
        match[2].lower(): base / name
        for name, match in matches.items()
        if match and (alike or name == match[2])
    }


def _refuse_a_class_called_train(train: Path) -> None:
    """Refuse a folder that may be the split or a class: others with images lie beside it."""
    beside = [name for name in subfolders(train.parent) if name != train.name and not _SPLIT.fullmatch(name)]
    places = (train.parent / name for name in beside)
    if any(
        holds_images(part) for place in places for part in (place, *map(place.joinpath, subfolders(place)))
    ):
        raise UserError(
            f"{train} may be the training split or a class like {listed(beside)}",
            f"--data {shlex.quote(str(train))} if it is the split; give a class another name",
        )


def _from(root: Path, folder: Path) -> str:
    return f"{Path(os.path.relpath(folder, root)).as_posix()}/"


def _held_out(names: Iterable[str]) -> str | None:
    return next((name for name in names if name.lower() in HELD_OUT), None)


def _with_endings(found: Found) -> list[str]:
    """The notes, and how many files do not count, by ending."""
    if not found.skipped:
        return found.notes
    return [*found.notes, f"skipped for their ending: {counted(found.skipped)}"]


def counted(endings: Mapping[str, int]) -> str:
    """``3 .heic, 1 .txt``: the most frequent first."""
    most = sorted(endings.items(), key=lambda pair: (-pair[1], pair[0]))
    return listed([f"{count:,} {ending or 'without one'}" for ending, count in most])


def _scan(
    root: Path, mapping: dict[str, int] | None, input_key: str | None, about: Found, *, training: bool = False
) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Walk over class folders -> ``[(path, class)]`` and ``{class name: class}``.

    Args:
        about: is told what was noticed and how many files do not count.
        training: refuse images from folders that are called test, val or pred.
    """
    types = endings(input_key)
    found = walk(root, types)
    about.skipped += found.skipped
    about.notes += found.notes
    spelt: dict[str, str] = {}
    for path, _ in found.files:
        if not path.isascii() and spelt.setdefault(name := from_root(path, root), path) != path:
            raise UserError(
                f"two files of {root} are called {name}, in two spellings of Unicode", "rename one of them"
            )
    if not found.files:
        skipped = f", but {counted(found.skipped)}" if found.skipped else ""
        raise UserError(
            f"there are no images in {root}{skipped}", f"files that count: {', '.join(types)}; {LAYOUT}"
        )
    names = in_order({name for _, name in found.files})
    if names == [""]:
        raise UserError(
            f"{root} holds {len(found.files)} images but no class folders",
            f'{LAYOUT}; an objective that reads no labels takes it as it is: --loss "vitkd", or "features"; '
            "eval takes it with a file of classes: --ground-truth FILE",
        )
    if mapping is not None:
        left_out = [name for name in names if name and name not in mapping]
        samples = [(path, mapping[name]) for path, name in found.files if name in mapping]
        if not samples:
            raise UserError(
                f"the class map names no class folder of {root}",
                f"its class folders are {listed(list(filter(None, names)))}",
            )
        if lacking := in_order(set(mapping) - set(names)):
            about.notes.append(
                f"the class map names {len(lacking)} folders that {root.name}/ lacks: {listed(lacking)}"
            )
        if left_out:
            about.notes.append(
                f"the class map leaves out {len(left_out)} folders of {root.name}/: {listed(left_out)}"
            )
        return samples, dict(mapping)

    _refuse_other_layouts(found, names, training)
    if found.inside:
        deep, places = sum(found.inside.values()), listed(in_order(found.inside))
        about.notes.append(
            f"{deep:,} images of {root.name}/ lie in folders inside their class's and belong to it: {places}"
        )
    named = set(names)
    if empty := [name for name in found.folders if nfc(name) not in named]:
        about.notes.append(f"class folders without images in {root.name}/ are no classes: {listed(empty)}")
    classes = {name: index for index, name in enumerate(names)}
    return [(path, classes[name]) for path, name in found.files], classes


def _refuse_other_layouts(found: Walk, names: Sequence[str], training: bool) -> None:
    """Refuse what would make classes of splits, of an archive's wrapping, or of images beside the classes."""
    root = found.root
    if "" in names:
        stray = next(path for path, name in found.files if not name)
        raise UserError(f"{stray} lies beside the class folders", "move it into a class folder or away")
    if training and {name.lower() for name in names} <= {*TRAIN_SYNONYMS, *HELD_OUT}:
        raise UserError(f"{root / names[0]} has no class folders", LAYOUT)
    if training and (split := _held_out(names)):
        raise UserError(
            f"{root / split} lies among the class folders {listed([n for n in names if n != split])}",
            f"no training image is taken from {split}/: move it away, put the classes into train/, "
            "or give the class another name",
        )
    if training and (inside := [place for place in found.inside if _held_out(place.split("/"))]):
        raise UserError(
            f"{root / inside[0]} holds images of a split inside a class folder",
            "put the splits above the classes: FOLDER/train/CLASS and FOLDER/validation/CLASS",
        )
    if len(names) == 1 and sum(found.inside.values()) == len(found.files):
        *_, deepest = _bases(root)
        raise UserError(
            f"{root} holds one folder, {names[0]}, and the images lie in folders inside it: "
            f"{listed(in_order(found.inside))}",
            f"--data {shlex.quote(str(deepest))} takes its folders as the classes",
        )


def _class_indices(class_map: str | Path | dict[str, int] | None, root: Path) -> dict[str, int] | None:
    """timm's class map, read; a blank line in a text file is no class."""
    if class_map is None or class_map == "":
        return None
    try:
        mapping = dict(
            load_class_map(class_map if isinstance(class_map, dict) else str(class_map), str(root))
        )
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(
            f"class_map: {first_line(error)}", "give a .txt file with one class name a line"
        ) from error
    # Windows begins a text with a mark, which timm takes for a part of the first name.
    named = {nfc(name).removeprefix("\ufeff"): int(index) for name, index in mapping.items()}
    named.pop("", None)
    if not named:
        raise UserError("class_map names no class", "give a .txt file with one class name a line")
    return named


def names_by_class(classes: dict[str, int]) -> list[str]:
    """Class names by index; where a class map joins folders, the first of them names the class."""
    names = {index: name for name, index in reversed(classes.items())}
    return [names.get(index, f"class {index}") for index in range(max(names) + 1)]


def _restored(
    found: Found,
    root: Path,
    images_root: Path,
    mapping: dict[str, int] | None,
    input_key: str | None,
    split_files: dict[str, list[str]],
) -> Found:
    """The split of an earlier run, file by file.

    What is gone is dropped where that moves no index of a training image: from the validation split, or with
    another image of its class in its place.
    """
    samples, classes = _scan(images_root, mapping, input_key, found)
    known = {from_root(path, root): path for path, _ in samples}
    saved = [*split_files["train"], *split_files["validation"]]
    present = [path for path in saved if path in known]
    if not present:
        raise UserError(
            f"no image of the saved split is left in {root}, the first was {saved[0]}",
            "restore them, or start a new run",
        )
    if unused := len(known) - len(present):
        found.notes.append(f"{unused} images are not in the saved split and stay unused")
    above = len(Path(os.path.relpath(images_root, root)).parts)
    of = {path: nfc(Path(path).parts[above]) for path in saved}
    if mapping is None:  # a folder that is new since then must not shift the classes
        classes = {name: index for index, name in enumerate(in_order(set(of.values())))}
    train = _with_stand_ins(found, root, split_files["train"], known, of)
    val = [path for path in split_files["validation"] if path in known]
    if gone := [path for path in split_files["validation"] if path not in known]:
        found.notes.append(f"validation images that are gone are left out ({len(gone)}): {listed(gone)}")
    found.train, found.val = (
        FolderImages([(known[path], classes[of[path]]) for path in part]) for part in (train, val)
    )
    found.class_names, found.split_files = names_by_class(classes), split_files
    found.about += ", saved split"
    return found


def _with_stand_ins(
    found: Found, root: Path, saved: Sequence[str], known: Mapping[str, str], of: Mapping[str, str]
) -> list[str]:
    """The saved training images, with another of its class in the place of each that is gone."""
    present: defaultdict[str, list[str]] = defaultdict(list)
    for path in saved:
        if path in known:
            present[of[path]].append(path)
    chosen: list[str] = []
    gone: list[str] = []
    for path in saved:
        if path in known:
            chosen.append(path)
            continue
        if not (others := present[of[path]]):
            raise UserError(
                f"all training images of {of[path]} in the saved split are gone from {root}, such as {path}",
                "restore them, or start a new run",
            )
        chosen.append(others[len(gone) % len(others)])
        gone.append(path)
    if gone:
        found.notes.append(
            f"training images that are gone, others of their class stand in ({len(gone)}): {listed(gone)}"
        )
    return chosen


def hold_out(found: Found, fraction: float, seed: int) -> Found:
    """Split training images class by class: of two or more at least one is held out, a single one stays."""
    assert found.train is not None
    labels = found.train.labels()
    val = pick(labels, lambda images: min(max(1, round(images * fraction)), images - 1), seed)
    if not val:
        raise UserError(
            f"{found.name}: no class has two images, so none can be held out",
            "--val-fraction 0 trains without",
        )
    held = set(val)
    train = [index for index in range(len(labels)) if index not in held]
    single = sum(images == 1 for images in Counter(labels).values())
    notes = [f"{single} classes have a single image and no validation image"] if single else []
    about = f"{found.about}, {fraction:g} of it held out"
    images = found.train
    return replace(
        found,
        train=Selection(images, train),
        val=Selection(images, val),
        about=about,
        notes=found.notes + notes,
    )


def pick(labels: Sequence[int], count: Callable[[int], int], seed: int) -> list[int]:
    """Indices, ascending, of ``count(n)`` images of each class of n images, drawn from ``seed``."""
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    generator = np.random.RandomState(seed % 2**32)  # numpy promises that its stream never changes
    picked: list[int] = []
    for label in sorted(members):
        order = generator.permutation(members[label]).tolist()
        picked += order[: count(len(order))]
    return sorted(picked)
