"""What ``--data`` names: a folder, the built-in digits, or a dataset of timm's (``hfds/``, ``wds/``, ...)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from timm.data.dataset_factory import create_dataset

from vitkd_cli.data.columns import with_columns
from vitkd_cli.data.folders import (
    TRAIN_SYNONYMS,
    VAL_SYNONYMS,
    Found,
    data_folder,
    hold_out,
    holds_split,
    image_folder,
    lone_split,
    names_by_class,
    pick,
    refuse_ground_truth,
    unlabelled_folder,
)
from vitkd_cli.data.images import (
    DigitImages,
    Images,
    IterableImages,
    Labelled,
    Selection,
    TimmImages,
)
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.text import listed

# a package that timm needs for the prefix, and how to get it
NEEDS = {
    "hfds": ("datasets", "pip install datasets"),
    "hfids": ("datasets", "pip install datasets"),
    "wds": ("webdataset", "pip install webdataset"),
    "tfds": ("tensorflow_datasets", "pip install tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "pip install torchvision"),
}
STREAMS = ("hfids", "wds", "tfds")
DIGITS = Path(__file__).with_name("digits") / "digits.npz"
# The digits are split once for everybody, whatever the seed of the run: results stay comparable.
DIGITS_SEED, DIGITS_VAL_PER_CLASS = 1998, 50


@dataclass(frozen=True)
class ImageData:
    """What ``--data`` stands for.

    Attributes:
        name: a short name, for titles.
        train: the training images, after ``shots``; None if there are none.
        val: the validation images; None if there are none.
        class_names: ``num_classes`` names in the order of the labels; None if nobody knows them.
        num_classes: classes of the labels, or more if ``num_classes`` was given.
        description: one line for the start-up.
        split_files: which file of a folder without a validation split went where, relative to the folder.
        train_all: the training images before ``shots``.
        notes: oddities that do not stop a run, one line each.
        labelled: the training images have labels; without, their class is -1 and ``num_classes`` may be 0.
        bank: labelled images of ``--val-data``, whose classes nearest neighbours hand on to ``val``.
        by_neighbours: validation is by nearest neighbours, for the student has no head for these classes.
        skipped: ending → files of a folder that do not count as images.
        record: which images these are (:func:`vitkd_cli.data.listing.written_down`).
        left_out: files of validation images that cannot be read.
    """

    name: str
    train: Images | None
    val: Images | None
    class_names: tuple[str, ...] | None
    num_classes: int
    description: str
    split_files: dict[str, list[str]] | None = None
    train_all: Images | None = None
    notes: tuple[str, ...] = ()
    labelled: bool = True
    bank: Images | None = None
    by_neighbours: bool = False
    skipped: Mapping[str, int] = field(default_factory=dict)
    record: Mapping[str, Any] | None = None
    left_out: tuple[str, ...] = ()


def open_data(
    data: str,
    *,
    data_dir: str | Path | None = None,
    train_split: str = "train",
    val_split: str = "validation",
    val_fraction: float = 0.1,
    class_map: str | Path | dict[str, int] | None = None,
    num_classes: int | None = None,
    shots: int | None = None,
    seed: int = 42,
    dataset_download: bool = False,
    input_key: str | None = None,
    target_key: str | None = None,
    split_files: dict[str, list[str]] | None = None,
    unlabelled: bool = False,
) -> ImageData:
    """Open what ``--data`` names; nothing is decoded yet.

    Args:
        data: ``digits``, a folder, or a dataset of timm's such as ``hfds/timm/imagenet-1k``.
        data_dir: root (or cache) of a dataset of timm's; with an empty ``data``, the folder itself.
        train_split, val_split: names of the splits; ``val_split="none"`` holds ``val_fraction`` of the
            training images out, as happens by itself for a folder without a validation split.
        val_fraction: share held out, stratified by class and drawn from ``seed``; 0 for no validation.
        class_map: timm's: a text file with one class per line, or a mapping; other folders are left out.
        num_classes: at least the number of classes found; required for streams that do not say.
        shots: training images kept for each class, drawn from ``seed``.
        dataset_download, input_key, target_key: timm's, for its datasets; for a folder, ``input_key`` lists
            file extensions (``.jpg;.webp``).
        split_files: ``ImageData.split_files`` of an earlier run, reproduced to the file.
        unlabelled: nobody reads the labels, so a folder without class folders will do.

    Raises:
        UserError: whatever is wrong with the request, the folder, the network or an optional package.
    """
    if not 0 <= val_fraction < 1:
        raise UserError(f"val_fraction is {val_fraction}, not in [0, 1)", "--val-fraction 0.1")
    if shots is not None and shots < 1:
        raise UserError(f"shots is {shots}", "give at least one image per class, such as --shots 5")
    prefix = _prefix(data)
    if data == "digits":
        found = _digits(train_split, val_split)
    elif prefix in NEEDS:
        options = _timm_options(data_dir, class_map, dataset_download, input_key, target_key, seed)
        found = _timm_dataset(data, prefix, train_split, val_split, num_classes, options)
        if found.val is None and found.train is not None and val_fraction > 0:
            found = hold_out(found, val_fraction, seed)
    else:
        root = data_folder(data, data_dir)
        found = (unlabelled_folder(root, input_key) if unlabelled else None) or image_folder(
            root, train_split, val_split, val_fraction, class_map, seed, input_key, split_files
        )
    return _settled(found, num_classes, shots, seed)


def open_split(data: str, split: str = "validation") -> Images:
    """One split alone, as :func:`named_split`."""
    return named_split(data, split)[0]


def named_split(
    data: str,
    split: str = "validation",
    *,
    data_dir: str | Path | None = None,
    class_map: str | Path | dict[str, int] | None = None,
    ground_truth: str | Path | None = None,
    input_key: str | None = None,
    target_key: str | None = None,
) -> tuple[Images, list[str] | None]:
    """One split alone, and the names of its classes in the order of its labels; None if nobody knows them.

    Args:
        data: as for :func:`open_data`; a folder may also be the split's own, class folders and all, a tar or
            a folder of tars, or flat with a file of classes.
        ground_truth: that file, where it does not lie in the folder or above it.
        input_key, target_key: as for :func:`open_data`.

    Raises:
        UserError: as :func:`open_data`.
    """
    prefix = _prefix(data)
    images: Images
    names: list[str] | None
    if data == "digits" or prefix in NEEDS:
        refuse_ground_truth(ground_truth, f"{data} has its own")
    if data == "digits":
        images, names = _digit_split(split), [str(digit) for digit in range(10)]
    elif prefix in NEEDS:
        options = _timm_options(data_dir, class_map, False, input_key, target_key)
        images, names = _timm_split(data, prefix, split, False, options)
        if images.iterable:
            return images, names
    else:
        root = data_folder(data, data_dir, tars=True)
        truth = expanded(ground_truth) if ground_truth else None
        images, names = lone_split(root, split, class_map, truth, input_key)
    _labels(data, split, images)
    return images, names


def has_split(data: str, split: str, data_dir: str | Path | None = None) -> bool:
    """Has the data this split of its own, so that nothing need be held out? True of all but folders."""
    if data == "digits" or _prefix(data) in NEEDS:
        return True
    return holds_split(data_folder(data, data_dir, tars=True), split)


def _prefix(data: str) -> str:
    """``hfds`` of ``hfds/timm/imagenet-1k``; nothing for a plain name."""
    return data.partition("/")[0].lower() if "/" in data else ""


def _settled(found: Found, num_classes: int | None, shots: int | None, seed: int) -> ImageData:
    """Count classes, keep the shots, and write the line that a run begins with."""
    if not found.labelled and found.train is not None:
        if shots is not None:
            raise UserError(f"shots needs classes, and {found.name} has none", "leave out --shots")
        line = f"{found.name}: {len(found.train)} training images without labels, {found.about}"
        return ImageData(
            found.name,
            found.train,
            None,
            None,
            num_classes or 0,
            line,
            None,
            found.train,
            tuple(found.notes),
            labelled=False,
            skipped=found.skipped,
        )
    notes, names = list(found.notes), found.class_names
    count = len(names) if names is not None else 0
    for split, images in (("training", found.train), ("validation", found.val)):
        if images is not None and not images.iterable:
            count = max(count, max(_labels(found.name, split, images)) + 1)
    if count == 0 and num_classes is None:
        raise UserError(f"{found.name} does not say how many classes it has", "--num-classes N")
    if num_classes is not None and num_classes < count:
        raise UserError(
            f"num_classes is {num_classes}, but {found.name} has {count} classes", f"--num-classes {count}"
        )
    count = num_classes or count
    if count < 2:
        notes.append("there is one class only: terms that read labels have nothing to learn")
    if names is not None:
        names = names + [f"class {index}" for index in range(len(names), count)]

    train = found.train
    if shots is not None and train is not None:
        if train.iterable:
            raise UserError(f"shots needs images by index; {found.name} is a stream", "leave out --shots")
        labels = train.labels()
        train = Selection(train, pick(labels, lambda images: shots, seed))
        short = sum(images < shots for images in Counter(labels).values())
        if short:
            notes.append(f"{short} of {count} classes have fewer than {shots} training images")

    for images in (train, found.val):
        if images is not None:
            images.notes = notes
    sizes = [
        f"{len(images) or 'an unknown number of'} {split}"
        for split, images in (("training", train), ("validation", found.val))
        if images is not None
    ]
    kept = "" if shots is None else f" ({shots} a class)"
    classes = f"{count} class{'' if count == 1 else 'es'}"
    line = f"{found.name}: {' and '.join(sizes)} images{kept}, {classes}, {found.about}"
    return ImageData(
        name=found.name,
        train=train,
        val=found.val,
        class_names=None if names is None else tuple(names),
        num_classes=count,
        description=line,
        split_files=found.split_files,
        train_all=found.train,
        notes=tuple(notes),
        skipped=found.skipped,
    )


def _labels(name: str, split: str, images: Images) -> list[int]:
    """The labels of a split, of which there must be some."""
    labels = images.labels()
    if not labels:
        raise UserError(f"{name}: the {split} split is empty", "check --data and the split names")
    if min(labels) < 0:
        raise UserError(f"{name}: the {split} split has images without a label", "see --target-key")
    return labels


# --- the built-in digits ----------------------------------------------------------------------------------


def _digits(train_split: str, val_split: str) -> Found:
    about = "8×8 scans of handwritten digits, built in"
    names = [str(digit) for digit in range(10)]
    return Found("digits", _digit_split(train_split), _digit_split(val_split), names, about, [])


def _digit_split(split: str) -> Selection:
    with np.load(DIGITS, allow_pickle=False) as archive:
        digits = DigitImages(archive["images"], archive["labels"])  # [1797, 8, 8], [1797]
    val = pick(digits.labels(), lambda images: DIGITS_VAL_PER_CLASS, DIGITS_SEED)
    if split in (*VAL_SYNONYMS, "test", "none"):  # it has a validation split, so none is held out
        return Selection(digits, val)
    if split in TRAIN_SYNONYMS:
        return Selection(digits, sorted(set(range(len(digits))) - set(val)))
    raise UserError(f"digits has no split {split!r}", "its splits are train and validation")


# --- timm's datasets --------------------------------------------------------------------------------------


def _timm_dataset(
    data: str, prefix: str, train_split: str, val_split: str, num_classes: int | None, options: dict[str, Any]
) -> Found:
    train, names = _timm_split(data, prefix, train_split, True, options)
    if train.iterable and names is None and num_classes is None:
        raise UserError(f"--data {data} does not say how many classes it has", "--num-classes N")
    if train.iterable and val_split == "none":
        raise UserError(f"--data {data} is a stream: nothing can be held out", "--val-split NAME")
    val: Images | None = None
    if val_split != "none":
        val, val_names = _timm_split(data, prefix, val_split, False, options)
        if names and val_names and val_names != names and not val.iterable:
            if extra := [name for name in val_names if name not in names]:
                raise UserError(
                    f"{data}: {val_split!r} has classes that {train_split!r} lacks: {listed(extra)}",
                    "choose other splits",
                )
            val = Labelled(val, [names.index(val_names[label]) for label in val.labels()])
    about = "a stream: its order is the reader's" if train.iterable else "opened by timm"
    return Found(data, train, val, names, about, [])


def _timm_split(
    data: str, prefix: str, split: str, is_training: bool, options: dict[str, Any]
) -> tuple[Images, list[str] | None]:
    """A split by ``timm.data.create_dataset``, whose many ways to fail become one line each."""
    package, cure = NEEDS[prefix]
    if find_spec(package) is None:
        raise UserError(f"--data {data} needs the package {package}", cure)
    if prefix in ("torch", "wds") and options["root"] is None:
        raise UserError(f"--data {data} needs the folder that holds it", "--data-dir FOLDER")
    if prefix == "torch" and options["class_map"]:
        raise UserError(f"class_map does not apply to {data}", "leave out --class-map")
    try:
        if prefix in ("hfds", "hfids"):
            options = with_columns(data, split, options)
        dataset = create_dataset(data, split=split, is_training=is_training, **options)
    except UserError:
        raise
    except Exception as error:  # timm, datasets, huggingface_hub and torchvision each have their own
        if prefix == "torch" and not options["download"]:
            hint = "--dataset-download fetches it into --data-dir"
        elif isinstance(error, OSError) or "connect" in str(error).lower():
            hint = (
                "check the name, the network and your access rights; --data-dir names a local copy or cache"
            )
        else:
            hint = "check --train-split and --val-split, --input-key and --target-key"
        raise UserError(
            f"--data {data}: cannot open the split {split!r}: {first_line(error)}", hint
        ) from error
    classes = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    names = names_by_class(classes) if classes else None
    if names is None and isinstance(known := getattr(dataset, "classes", None), (list, tuple)):
        names = [str(name) for name in known]
    return (
        IterableImages(dataset, data) if prefix in STREAMS else TimmImages(dataset, f"{data} {split}")
    ), names


def _timm_options(
    root: str | Path | None,
    class_map: str | Path | dict[str, int] | None,
    download: bool = False,
    input_key: str | None = None,
    target_key: str | None = None,
    seed: int = 42,
) -> dict[str, Any]:
    """``create_dataset``'s arguments; None means that the reader's own default holds."""
    return {
        "root": None if root is None else str(expanded(root)),
        "class_map": str(class_map) if isinstance(class_map, Path) else class_map,
        "download": download,
        "seed": seed,
        "input_key": input_key,
        "target_key": target_key,
    }
