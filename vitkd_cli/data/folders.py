"""Folders of class folders -> training and validation images whose classes agree.

The walk and the natural order of classes ("2" before "10") are timm's. What timm does in silence is refused
or noted here: classes that only the validation split has, images outside class folders, empty folders.
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from timm.data.readers.class_map import load_class_map
from timm.data.readers.img_extensions import get_img_extensions
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.utils.misc import natural_key

from vitkd_cli.data.imagenet import flat_validation, ground_truth_near
from vitkd_cli.data.images import (
    FolderImages,
    Images,
    Labelled,
    Selection,
    TarImages,
    first_line,
    loose_images,
)
from vitkd_cli.errors import UserError
from vitkd_cli.text import listed

TRAIN_SYNONYMS = ("train", "training")
VAL_SYNONYMS = ("validation", "val", "valid", "eval", "evaluation")
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


def unlabelled_folder(root: Path, input_key: str | None) -> Found | None:
    """A folder that holds images itself: all in it and below are for training. None if it holds none."""
    types = input_key.split(";") if input_key else get_img_extensions()
    if not any(path.suffix.lower() in types for path in root.iterdir() if path.is_file()):
        return None
    samples, _ = find_images_and_targets(str(root), types=types)
    parts = {path: Path(path).relative_to(root).parts for path, _ in samples}
    shown = [path for path in parts if not any(part.startswith(".") for part in parts[path])]
    images = FolderImages([(path, -1) for path in shown])
    return Found(root.resolve().name, images, None, None, f"folder {root}", [], labelled=False)


def data_folder(data: str, data_dir: str | Path | None, *, tars: bool = False) -> Path:
    """What ``--data`` (or timm's pair ``--dataset NAME --data-dir ROOT``) means: a folder, or a tar."""
    if not data and data_dir is None:
        raise UserError(
            "--data is empty", "give a folder, digits, or a dataset of timm's such as hfds/timm/imagenet-1k"
        )
    root = Path(data).expanduser() if data else Path(data_dir or "").expanduser()
    if data and data_dir is not None and not root.exists():
        root = Path(data_dir).expanduser() / data
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
    stand_in = (*VAL_SYNONYMS, "test") if val_split in VAL_SYNONYMS else ()
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
                f"it holds: {listed(_subfolders(root)) or 'no folder'}",
            )
    mapping = _class_indices(class_map, root)
    name, about = root.resolve().name, f"folder {root}"
    notes: list[str] = []

    if split_files is not None:
        return _restored(root, train_root or root, mapping, input_key, split_files)
    if val_root is not None and train_root is None:
        samples, classes = _scan(val_root, mapping, input_key, notes)
        about += f" (only {val_root.name}/)"
        return Found(name, None, FolderImages(samples), names_by_class(classes), about, notes)
    if train_root is None:
        named_as_splits = {*TRAIN_SYNONYMS, *VAL_SYNONYMS, "test"}
        if (folders := _subfolders(root)) and set(folders) <= named_as_splits:
            raise UserError(f"{root / folders[0]} has no class folders", LAYOUT)

    samples, classes = _scan(train_root or root, mapping, input_key, notes)
    found = Found(name, FolderImages(samples), None, names_by_class(classes), about, notes)
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
    if val_root is None:
        if val_fraction == 0:
            return found
        found = hold_out(found, val_fraction, seed)
        assert isinstance(found.train, Selection) and isinstance(found.val, Selection)
        found.split_files = {
            split: [Path(os.path.relpath(images.path(i), root)).as_posix() for i in range(len(images))]
            for split, images in (("train", found.train), ("validation", found.val))
        }
        return found

    # The folder names, not their order, say what a validation image shows.
    val_samples, val_classes = _scan(val_root, mapping, input_key, notes)
    extra = sorted(set(val_classes) - set(classes), key=natural_key)
    missing = sorted(set(classes) - set(val_classes), key=natural_key)
    if extra:
        lacking = f", and lacks {listed(missing)}" if missing else ""
        raise UserError(
            f"{val_root} has classes that {train_root} lacks: {listed(extra)}{lacking}",
            "give both splits the same class folders, or choose with --class-map",
        )
    if missing:
        notes.append(f"no {val_root.name} images for {listed(missing)}")
    index_to_name = {index: name for name, index in val_classes.items()}
    found.val = FolderImages([(path, classes[index_to_name[index]]) for path, index in val_samples])
    found.about += f" ({train_root.name if train_root else ''}/ and {val_root.name}/)"
    return found


def lone_split(
    root: Path,
    split: str,
    class_map: str | Path | dict[str, int] | None,
    ground_truth: Path | None,
) -> tuple[Images, list[str]]:
    """One split and its class names: the split's folder or tar, or ``root`` where it is the split itself."""
    if root.is_file():
        return _tar_split(root, class_map, ground_truth)
    synonyms = (*VAL_SYNONYMS, "test") if split in VAL_SYNONYMS else TRAIN_SYNONYMS
    split_root = _split_folder(root, split, synonyms)
    flat = None if split_root else flat_folder(root, split, synonyms)
    if flat is not None:
        if not any(find_images_and_targets(str(flat))[0]):
            return _tar_split(flat, class_map, ground_truth)
        if truth := ground_truth or ground_truth_near(flat):
            images, classes = flat_validation(loose_images([flat]), truth, _class_indices(class_map, root))
            return images, names_by_class(classes)
    others = [name for name in (*TRAIN_SYNONYMS, *VAL_SYNONYMS) if _split_folder(root, name, ())]
    if split_root is None and (others or split not in VAL_SYNONYMS):
        raise UserError(
            f"{root} has no split folder {split!r}", f"it holds: {listed(_subfolders(root)) or 'no folder'}"
        )
    refuse_ground_truth(ground_truth, f"{split_root or root} has class folders")
    samples, classes = _scan(split_root or root, _class_indices(class_map, root), None, [])
    return FolderImages(samples), names_by_class(classes)


def _tar_split(
    root: Path, class_map: str | Path | dict[str, int] | None, ground_truth: Path | None
) -> tuple[Images, list[str]]:
    """A tar, or a folder of tars, with folders or names as classes; or flat, with a file of classes."""
    try:
        images = TarImages(root)
        if class_map and set(images.reader.class_name_to_idx) != {""}:
            images = TarImages(root, str(class_map))
    except (tarfile.TarError, OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"{root} cannot be read as tar files of images: {first_line(error)}",
            "give a .tar with a folder a class",
        ) from error
    classes = images.reader.class_name_to_idx
    if set(classes) != {""}:
        refuse_ground_truth(ground_truth, f"{root} has class folders")
        return images, names_by_class(classes)
    truth = ground_truth or ground_truth_near(root.parent)
    if truth is None:
        raise UserError(
            f"{root} holds images without class folders", "--ground-truth FILE lists their classes"
        )
    labelled, classes = flat_validation(images, truth, _class_indices(class_map, root))
    return labelled, names_by_class(classes)


def refuse_ground_truth(ground_truth: str | Path | None, why: str) -> None:
    """Refuse a file of classes where the data has them already."""
    if ground_truth:
        raise UserError(
            f"--ground-truth lists the classes of a flat folder, and {why}", "leave --ground-truth out"
        )


def flat_folder(root: Path, split: str, synonyms: Sequence[str]) -> Path | None:
    """The folder of a split that holds images, or tars, but no folders; ``root`` itself if it is such."""
    types = (*get_img_extensions(), ".tar")
    for place in (*(root / name for name in dict.fromkeys([split, *synonyms]) if name), root):
        if place.is_dir() and not _subfolders(place):
            with os.scandir(place) as entries:
                if any(Path(entry.name).suffix.lower() in types for entry in entries):
                    return place
    return None


def _split_folder(root: Path, split: str, synonyms: Sequence[str]) -> Path | None:
    """The folder of a split: one of its names, holding folders itself.

    A class may well be called "train" too; its folder holds images and no folders.
    """
    for name in dict.fromkeys([split, *(synonyms if split in synonyms else ())]):
        if name and (root / name).is_dir() and _subfolders(root / name):
            return root / name
    return None


def _subfolders(root: Path) -> list[str]:
    with os.scandir(root) as entries:
        names = [entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
    return sorted(names, key=natural_key)


def _scan(
    root: Path, mapping: dict[str, int] | None, input_key: str | None, notes: list[str]
) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """timm's walk over class folders -> ``[(path, class)]`` and ``{class name: class}``."""
    types = input_key.split(";") if input_key else None
    samples, classes = find_images_and_targets(str(root), types=types)
    if not samples:
        raise UserError(
            f"there are no images in {root}",
            f"files that count: {', '.join(types or get_img_extensions())}; {LAYOUT}",
        )
    if set(classes) == {""}:
        raise UserError(
            f"{root} holds {len(samples)} images but no class folders",
            f'{LAYOUT}; an objective that reads no labels takes it as it is: --loss "vitkd", or "features"; '
            "eval takes it with a file of classes: --ground-truth FILE",
        )
    # timm makes classes of these two, which shifts every other class
    if "" in classes and mapping is None:
        stray = next(path for path, label in samples if label == classes[""])
        raise UserError(f"{stray} lies beside the class folders", "move it into a class folder or away")
    hidden = [name for name in classes if name.startswith(".")]
    if hidden and mapping is None:
        raise UserError(
            f"the hidden folder {hidden[0]} in {root} would count as a class", "delete it or move it away"
        )

    if mapping is not None:
        names = {index: name for name, index in classes.items()}
        left_out = sorted(set(classes) - set(mapping), key=natural_key)
        samples = [(path, mapping[names[label]]) for path, label in samples if names[label] in mapping]
        if not samples:
            raise UserError(
                f"the class map names no class folder of {root}",
                f"its class folders are {listed(sorted(classes))}",
            )
        if left_out:
            notes.append(
                f"the class map leaves out {len(left_out)} folders of {root.name}/: {listed(left_out)}"
            )
        return samples, dict(mapping)
    empty = [name for name in _subfolders(root) if name not in classes and not _subfolders(root / name)]
    if empty:
        notes.append(f"class folders without images in {root.name}/ are no classes: {listed(empty)}")
    return samples, classes


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
    mapping.pop("", None)
    if not mapping:
        raise UserError("class_map names no class", "give a .txt file with one class name a line")
    return {str(name): int(index) for name, index in mapping.items()}


def names_by_class(classes: dict[str, int]) -> list[str]:
    """Class names by index; where a class map joins folders, the first of them names the class."""
    names = {index: name for name, index in reversed(classes.items())}
    return [names.get(index, f"class {index}") for index in range(max(names) + 1)]


def _restored(
    root: Path,
    images_root: Path,
    mapping: dict[str, int] | None,
    input_key: str | None,
    split_files: dict[str, list[str]],
) -> Found:
    """The split of an earlier run, file by file."""
    notes: list[str] = []
    samples, classes = _scan(images_root, mapping, input_key, notes)
    names = {index: name for name, index in classes.items()}
    known = {Path(os.path.relpath(path, root)).as_posix(): (path, names[label]) for path, label in samples}
    saved = [*split_files["train"], *split_files["validation"]]
    gone = [path for path in saved if path not in known]
    if gone:
        raise UserError(
            f"{len(gone)} images of the saved split are gone from {root}, the first is {gone[0]}",
            "restore them, or start a new run",
        )
    if len(known) > len(saved):
        notes.append(f"{len(known) - len(saved)} images are not in the saved split and stay unused")
    if mapping is None:  # a folder that is new since then must not shift the classes
        order = sorted({known[path][1] for path in saved}, key=natural_key)
        classes = {name: index for index, name in enumerate(order)}
    train, val = (
        FolderImages([(known[path][0], classes[known[path][1]]) for path in split_files[split]])
        for split in ("train", "validation")
    )
    return Found(
        root.resolve().name,
        train,
        val,
        names_by_class(classes),
        f"folder {root}, saved split",
        notes,
        split_files,
    )


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
    return Found(
        found.name,
        Selection(images, train),
        Selection(images, val),
        found.class_names,
        about,
        found.notes + notes,
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
