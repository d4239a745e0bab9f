"""What ``--data`` names: a folder, tars, the built-in digits, or a dataset of timm's (``hfds/``, ...)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.dataset_factory import create_dataset

from vitkd_cli.data.columns import with_columns
from vitkd_cli.data.decoding import Decoding, decoding_of
from vitkd_cli.data.folders import (
    holds_split,
    image_folder,
    lone_split,
    names_by_class,
    refuse_ground_truth,
    tars_folder,
    unlabelled_folder,
)
from vitkd_cli.data.images import ImageData, Images, Split, Stream, reading
from vitkd_cli.data.layout import TRAIN_SYNONYMS, VAL_SYNONYMS, data_folder
from vitkd_cli.data.walk import from_root
from vitkd_cli.data.webdataset import has_shards, lone_webdataset, webdataset
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.options import takes
from vitkd_cli.recipe import SAMPLE, WDS, Data, Recipe
from vitkd_cli.text import listed

# a package that timm needs for the prefix, and how to get it
NEEDS = {
    "hfds": ("datasets", "pip install datasets"),
    "hfids": ("datasets", "pip install datasets"),
    "tfds": ("tensorflow_datasets", "pip install tensorflow tensorflow-datasets"),
    "torch": ("torchvision", "pip install torchvision"),
}
STREAMS = ("hfids", "tfds")
DIGITS = Path(__file__).with_name("digits") / "digits.npz"
# The digits are split once for everybody, whatever the seed of the run: results stay comparable.
DIGITS_SEED, DIGITS_VAL_PER_CLASS = 1998, 50


@takes(Data)
def open_data(
    data: Data,
    *,
    seed: int = Recipe.seed,
    split_files: dict[str, list[str]] | None = None,
    unlabelled: bool = False,
) -> ImageData:
    """Open what the request names; nothing is decoded yet.

    Args:
        seed: draws the images that are held out, and the shots.
        split_files: ``ImageData.split_files`` of an earlier run, reproduced to the file.
        unlabelled: nobody reads the labels, so a folder without class folders will do.
    """
    data = replace(data, data=SAMPLE) if data.data is None else data
    name, root = str(data.data), None
    if name == SAMPLE:
        digits, names = _digits(), tuple(map(str, range(10)))
        train, val = (_digits_of(digits, split) for split in (data.train_split, data.val_split))
        found = ImageData(name, train, val, names, description="8×8 scans of handwritten digits, built in")
    elif name.startswith(WDS):
        found = webdataset(data, unlabelled=unlabelled)
    elif _prefix(name) in NEEDS:
        found = _timm_dataset(data, seed)
    elif (tars := tars_folder(folder := data_folder(data), data, unlabelled=unlabelled)) is not None:
        found = tars
    else:
        root = folder
        flat = unlabelled_folder(root, data.input_key) if unlabelled else None
        found = flat or image_folder(root, data, split_files)
    if isinstance(found.train, Images) and found.val is None and found.labelled and data.val_fraction:
        found = hold_out(found, found.train, data.val_fraction, seed, root)
    found = _counted(found, data, seed) if found.labelled else _unlabelled(found, data)
    for images in (found.train, found.train_all, found.val):
        if images is not None:
            images.decode_by(decoding_of(data))
    return found


@takes(Data)
def named_split(
    data: Data, split: str = "validation", ground_truth: str | Path | None = None
) -> tuple[Split, list[str] | None]:
    """One split alone, and the names of its classes in the order of its labels; None if nobody knows them.

    A folder may also be the split's own, class folders and all, a tar or a folder of tars, or flat with a
    file of classes.

    Args:
        ground_truth: that file, where it does not lie in the folder or above it.
    """
    name = data.data or ""
    if name == SAMPLE or name.startswith(WDS) or _prefix(name) in NEEDS:
        refuse_ground_truth(ground_truth, f"{name} has its own")
    images: Split
    names: list[str] | None
    if name == SAMPLE:
        images, names = _digits_of(_digits(), split), list(map(str, range(10)))
    elif name.startswith(WDS):
        images, names = lone_webdataset(data, split)
    elif _prefix(name) in NEEDS:
        images, names = _timm_split(data, split)
    else:
        truth = expanded(ground_truth) if ground_truth else None
        images, names = lone_split(data_folder(data), data, split, truth)
    if isinstance(images, Images):
        _classes(name, split, images)
    return images, names


@takes(Data)
def has_split(data: Data, split: str) -> bool:
    """Has the data this split of its own, so that nothing need be held out? True of timm's datasets."""
    name = str(data.data)
    if name.startswith(WDS):
        return has_shards(data, split)
    return name == SAMPLE or _prefix(name) in NEEDS or holds_split(data_folder(data), split)


def _prefix(data: str) -> str:
    """``hfds`` of ``hfds/timm/imagenet-1k``; nothing for a plain name."""
    prefix = data.partition("/")[0].lower() if "/" in data else ""
    if prefix == "wds":
        raise UserError(f"--data {data}: tars are read by index", f"{WDS}FOLDER, or {WDS}PATTERN.tar")
    return prefix


def _unlabelled(found: ImageData, data: Data) -> ImageData:
    assert found.train is not None
    if data.shots is not None:
        raise UserError(f"shots needs classes, and {found.name} has none", "leave out --shots")
    line = f"{found.name}: {len(found.train)} training images without labels, {found.description}"
    return replace(found, num_classes=data.num_classes or 0, description=line, train_all=found.train)


def _counted(found: ImageData, data: Data, seed: int) -> ImageData:
    """Count the classes, keep the shots, and write the line that a run begins with."""
    notes, names, train = list(found.notes), found.class_names, found.train
    count, asked = len(names or ()), data.num_classes or None
    for split, images in (("training", train), ("validation", found.val)):
        if isinstance(images, Images):
            count = max(count, int(_classes(found.name, split, images).max()) + 1)
    if count == 0 and asked is None:
        raise UserError(f"{found.name} does not say how many classes it has", "--num-classes N")
    if asked is not None and asked < count:
        raise UserError(
            f"num_classes is {asked}, but {found.name} has {count} classes", f"--num-classes {count}"
        )
    count = asked or count
    if count < 2:
        notes.append("there is one class only: terms that read labels have nothing to learn")
    if names is not None:
        names = (*names, *(f"class {index}" for index in range(len(names), count)))

    kept, shots = "", data.shots
    if shots is not None and train is not None:
        if isinstance(train, Stream):
            raise UserError(f"shots needs images by index; {found.name} is a stream", "leave out --shots")
        if short := int((np.bincount(train.classes, minlength=count) < shots).sum()):
            notes.append(f"{short} of {count} classes have fewer than {shots} training images")
        drawn = draw_by_class(train.classes, lambda images: shots, seed)
        train, kept = train.subset(drawn), f" ({shots} a class)"
    sizes = [
        f"{len(images) or 'an unknown number of'} {split}"
        for split, images in (("training", train), ("validation", found.val))
        if images is not None
    ]
    classes = f"{count} class{'' if count == 1 else 'es'}"
    line = f"{found.name}: {' and '.join(sizes)} images{kept}, {classes}, {found.description}"
    return replace(
        found,
        train=train,
        class_names=names,
        num_classes=count,
        description=line,
        train_all=found.train,
        notes=tuple(notes),
    )


def hold_out(found: ImageData, images: Images, fraction: float, seed: int, root: Path | None) -> ImageData:
    """Split training images class by class: of two or more at least one is held out, a single one stays.

    Args:
        root: the folder of the images, if it is one.
    """
    classes = images.classes
    held = draw_by_class(classes, lambda images: min(max(1, round(images * fraction)), images - 1), seed)
    if not len(held):
        raise UserError(
            f"{found.name}: no class has two images, so none can be held out",
            "--val-fraction 0 trains without",
        )
    train, val = _divided(images, held)
    parts = (("train", train), ("validation", val))
    files = {split: [from_root(path, root) for path in part.refs] for split, part in parts} if root else None
    notes = list(found.notes)
    if single := int((np.bincount(classes) == 1).sum()):
        notes.append(f"{single} classes have a single image and no validation image")
    return replace(
        found,
        train=train,
        val=val,
        description=f"{found.description}, {fraction:g} of it held out",
        notes=tuple(notes),
        split_files=files,
    )


def draw_by_class(
    labels: Sequence[int] | np.ndarray[Any, Any], count: Callable[[int], int], seed: int
) -> np.ndarray[Any, Any]:
    """Indices, ascending, of ``count(n)`` images of each class of n images, drawn from ``seed``."""
    classes = np.asarray(labels)
    order = np.argsort(classes, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(classes[order])) + 1)
    generator = np.random.RandomState(seed % 2**32)  # numpy promises that its stream never changes
    return np.sort(np.concatenate([generator.permutation(part)[: count(len(part))] for part in members]))


def _divided(images: Images, held: np.ndarray[Any, Any]) -> tuple[Images, Images]:
    """All but some images, and these."""
    left = np.ones(len(images), bool)
    left[held] = False
    return images.subset(np.flatnonzero(left)), images.subset(held)


def _classes(name: str, split: str, images: Images) -> np.ndarray[Any, Any]:
    """The classes of a split's images, of which there must be some."""
    if not len(images):
        raise UserError(f"{name}: the {split} split is empty", "check --data and the split names")
    if images.classes.min() < 0:
        raise UserError(f"{name}: the {split} split has images without a label", "see --target-key")
    return images.classes


# The built-in digits --------------------------------------------------------------------------------------


def _digits() -> Images:
    """8×8 scans with 17 grey values, shown as RGB from 0 to 255."""
    with np.load(DIGITS, allow_pickle=False) as archive:
        pixels = np.round(archive["images"] * (255 / 16)).astype(np.uint8)  # [1797, 8, 8]
        return Images(
            range(len(pixels)), archive["labels"].tolist(), partial(_digit, pixels), "digits[{}]".format
        )


def _digit(pixels: np.ndarray[Any, Any], index: int, decoding: Decoding) -> Image.Image:
    return Image.fromarray(pixels[index]).convert("RGB")


def _digits_of(digits: Images, split: str) -> Images:
    held = draw_by_class(digits.classes, lambda images: DIGITS_VAL_PER_CLASS, DIGITS_SEED)
    train, val = _divided(digits, held)
    if split in (*VAL_SYNONYMS, "test", "none"):  # it has a validation split, so none is held out
        return val
    if split in TRAIN_SYNONYMS:
        return train
    raise UserError(f"digits has no split {split!r}", "its splits are train and validation")


# timm's datasets ------------------------------------------------------------------------------------------


def _timm_dataset(data: Data, seed: int) -> ImageData:
    train, names = _timm_split(data, data.train_split, seed, is_training=True)
    if isinstance(train, Stream) and names is None and not data.num_classes:
        raise UserError(f"--data {data.data} does not say how many classes it has", "--num-classes N")
    if isinstance(train, Stream) and data.val_split == "none":
        raise UserError(f"--data {data.data} is a stream: nothing can be held out", "--val-split NAME")
    val: Split | None = None
    if data.val_split != "none":
        val, val_names = _timm_split(data, data.val_split, seed)
        if names and val_names and val_names != names and isinstance(val, Images):
            if extra := [name for name in val_names if name not in names]:
                raise UserError(
                    f"{data.data}: {data.val_split!r} has classes that {data.train_split!r} lacks: "
                    f"{listed(extra)}",
                    "choose other splits",
                )
            val = val.relabelled(names.index(val_names[label]) for label in val.labels())
    about = "a stream: its order is the reader's" if isinstance(train, Stream) else "opened by timm"
    return ImageData(str(data.data), train, val, tuple(names) if names else None, description=about)


def _timm_split(
    data: Data, split: str, seed: int = Recipe.seed, is_training: bool = False
) -> tuple[Split, list[str] | None]:
    """A split by ``timm.data.create_dataset``, whose many ways to fail become one line each."""
    name, prefix = str(data.data), _prefix(str(data.data))
    package, cure = NEEDS[prefix]
    if find_spec(package) is None:
        raise UserError(f"--data {name} needs the package {package}", cure)
    if prefix == "torch" and data.data_dir is None:
        raise UserError(f"--data {name} needs the folder that holds it", "--data-dir FOLDER")
    if prefix == "torch" and data.class_map:
        raise UserError(f"class_map does not apply to {name}", "leave out --class-map")
    options: dict[str, Any] = {  # None means that the reader's own default holds
        "root": None if data.data_dir is None else str(expanded(data.data_dir)),
        "class_map": data.class_map,
        "download": data.dataset_download,
        "seed": seed,
        "input_key": data.input_key,
        "target_key": data.target_key,
    }
    try:
        if prefix in ("hfds", "hfids"):
            options = with_columns(name, split, options)
        dataset = create_dataset(name, split=split, is_training=is_training, **options)
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
            f"--data {name}: cannot open the split {split!r}: {first_line(error)}", hint
        ) from error
    classes = getattr(getattr(dataset, "reader", None), "class_to_idx", None)
    names = names_by_class(classes) if classes else None
    if names is None and isinstance(known := getattr(dataset, "classes", None), (list, tuple)):
        names = [str(name) for name in known]
    if prefix in STREAMS:
        return Stream(dataset, name), names
    return _timm_images(dataset, f"{name} {split}"), names


def _timm_images(dataset: Any, name: str) -> Images:
    """A dataset with an index: a reader of timm's, or torchvision's own."""
    reader = getattr(dataset, "reader", None)
    source = dataset if reader is None else reader
    with reading(lambda: name):
        targets = (
            source.iter_targets() if hasattr(source, "iter_targets") else getattr(dataset, "targets", None)
        )
        if targets is None:
            targets = (source[index][1] for index in range(len(dataset)))
        labels = [-1 if target is None else int(target) for target in targets]
    called = partial(_timm_name, name, reader)
    return Images(range(len(labels)), labels, partial(_timm_image, dataset), called)


def _timm_image(dataset: Any, index: int, decoding: Decoding) -> Image.Image:
    if (reader := getattr(dataset, "reader", None)) is None:
        return decoding.upright(dataset[index][0])
    return decoding(reader[index][0])  # past timm's dataset, which replaces an unreadable image by the next


def _timm_name(name: str, reader: Any, index: int) -> str:
    known = None if reader is None else reader.filename(index)
    return f"{name}[{index}]" + (f" ({known})" if known else "")
