"""ImageNet's validation images as they are handed out: one flat folder, with the classes in a file elsewhere.

The file is one of four: Kaggle's ``LOC_val_solution.csv``; the development kit's
``ILSVRC2012_validation_ground_truth.txt``, whose numbers its ``meta.mat`` explains; one synset per line, in
the order of the images' names; or ``NAME SYNSET`` or ``NAME INDEX`` per line.
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from vitkd_cli.data.images import Images
from vitkd_cli.data.walk import in_order
from vitkd_cli.errors import UserError, first_line

GROUND_TRUTH = (
    "LOC_val_solution.csv",
    "ILSVRC2012_validation_ground_truth.txt",
    "imagenet_2012_validation_synset_labels.txt",
    "val.txt",
)
_DEVKIT = ("ILSVRC2012_devkit_t12/data", "data", "devkit/data")
_SYNSET = re.compile(r"n\d{8}")


def ground_truth_near(folder: Path) -> Path | None:
    """The file with the classes of a flat folder: in it, or beside it up to three folders above."""
    for place in (folder, *folder.parents[:4]):
        for inside in ("", *_DEVKIT):
            for name in GROUND_TRUTH:
                if (file := place / inside / name).is_file():
                    return file
    return None


def flat_validation(
    images: Images, truth: Path, order: Mapping[str, int] | None = None
) -> tuple[Images, dict[str, int]]:
    """Unlabelled images with their classes, and the classes by name, in natural order.

    Args:
        order: the classes, if not all in that order; images of others are left out.
    """
    stems = [Path(images.path(index)).stem for index in range(len(images))]
    ordered = in_order(stems)
    classes = dict(zip(ordered, _classes(truth, ordered), strict=True))
    names = in_order(set(classes.values()))
    index = order or {name: number for number, name in enumerate(names)}
    shown = [number for number, stem in enumerate(stems) if classes[stem] in index]
    labels = [index[classes[stems[number]]] for number in shown]
    return images.subset(shown).relabelled(labels), dict(index)


def _classes(truth: Path, stems: Sequence[str]) -> list[str]:
    """The class of every image, as the file names it; synsets where it can."""
    if not truth.is_file():
        raise UserError(f"there is no file {truth}", "name the file with the classes of the images")
    try:  # Windows begins a text with a mark
        text = truth.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as problem:
        raise UserError(
            f"the classes in {truth} cannot be read: {first_line(problem)}", "give a text file"
        ) from None
    lines = [line for line in text.splitlines() if line.strip()]
    if truth.suffix == ".csv":  # ImageId,PredictionString: "n03995372 85 1 499 272 ..."
        rows = (row for row in csv.reader(lines[1:]) if len(row) > 1 and row[1].strip())
        named = {row[0]: row[1].split()[0] for row in rows}
        return _of(truth, named, stems)
    if all(len(line.split()) == 2 for line in lines):
        return _of(truth, {Path(a).stem: _synset(b) for a, b in map(str.split, lines)}, stems)
    if len(lines) != len(stems):
        raise UserError(
            f"{truth.name} lists {len(lines):,} classes, and there are {len(stems):,} images",
            "give the file of these images, or all of its images",
        )
    words = [line.strip() for line in lines]
    if all(_SYNSET.fullmatch(word) for word in words):
        return words
    if not all(word.isdigit() for word in words):
        raise UserError(
            f"{truth} is no list of classes", "one synset per line, such as n01440764, or NAME SYNSET"
        )
    ids = _devkit_synsets(truth)
    if strange := next((word for word in words if int(word) not in ids), None):
        raise UserError(f"{truth.name} has a class {strange}, and meta.mat none", "copy both of one kit")
    return [ids[int(word)] for word in words]


def _of(truth: Path, named: dict[str, str], stems: Sequence[str]) -> list[str]:
    if missing := [stem for stem in stems if stem not in named]:
        raise UserError(
            f"{truth.name} does not name {len(missing):,} of the images, the first is {missing[0]}",
            "give the file of these images",
        )
    return [named[stem] for stem in stems]


def _synset(word: str) -> str:
    """A synset of its index in their alphabetical order, as the 1000-class models count."""
    if not word.isdigit():
        return word
    synsets = ImageNetInfo("imagenet-1k").label_names()
    return synsets[int(word)] if int(word) < len(synsets) else word


def _devkit_synsets(truth: Path) -> dict[int, str]:
    """The development kit's own numbers, 1 to 1000, which follow no alphabet → synsets."""
    meta = truth.with_name("meta.mat")
    if not meta.is_file():
        raise UserError(
            f"{truth.name} numbers its classes as the development kit does, and meta.mat is not beside it",
            "copy ILSVRC2012_devkit_t12/data/meta.mat to it",
        )
    from scipy.io import loadmat

    table: Any = loadmat(meta, squeeze_me=True)["synsets"]
    return {int(row[0]): str(row[1]) for row in table}
