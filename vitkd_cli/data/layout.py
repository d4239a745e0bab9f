"""Where a folder has its splits: ``train/`` and ``val/``, and what people and archives call them."""

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vitkd_cli.data.walk import TYPES, holds_images, in_order, passed_over, subfolders
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.recipe import Data
from vitkd_cli.text import listed

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


def data_folder(data: Data) -> Path:
    """What ``--data`` (or timm's pair ``--dataset NAME --data-dir ROOT``) means: a folder, or a tar."""
    if not data.data and data.data_dir is None:
        raise UserError(
            "--data is empty", "give a folder, digits, or a dataset of timm's such as hfds/timm/imagenet-1k"
        )
    root = expanded(data.data or data.data_dir or "")
    if data.data and data.data_dir is not None and not root.exists():
        root = expanded(data.data_dir) / data.data
    if root.is_file() and root.suffix != ".tar":
        raise UserError(f"--data: {root} is a file", LAYOUT)
    if not root.exists():
        raise UserError(
            f"--data: there is no folder {root}",
            "give a folder, digits, or a dataset such as hfds/timm/imagenet-1k",
        )
    return root


def split_folder(root: Path, split: str, *, exactly: bool = False) -> Path | None:
    """The folder of a split, which holds folders itself; in ``root``, or below what wraps it.

    A class may well be called "train" too; its folder holds images and no folders.
    """
    names = [split] if exactly else synonyms(split)
    places = (_once(place) for base in bases(root) for place in _split_places(base, names))
    return next((place for place in places if subfolders(place)), None)


def flat_folder(root: Path, split: str) -> Path | None:
    """The folder of a split that holds images, or tars, but no folders; ``root`` itself if it is such."""
    for base in bases(root):
        places = _split_places(base, synonyms(split))
        for place in (*map(_once, places), *([root] if base == root else [])):
            if not subfolders(place) and holds_images(place, (*TYPES, ".tar")):
                return place
    return None


def synonyms(split: str) -> list[str]:
    """What a split may be called; "test" is only a stand-in for a validation split that nobody named."""
    known = TRAIN_SYNONYMS if split in TRAIN_SYNONYMS else (*VAL_SYNONYMS, *TEST_SYNONYMS)
    return [split, *(known if split in (*TRAIN_SYNONYMS, *VAL_SYNONYMS) else ())]


def tars_of(root: Path, split: str) -> list[Path]:
    """The tars of a split, in natural order: those in its folder, or those that are called by it.

    A tar that is named itself, and tars of which none is called by a split, are for training.
    """
    for base in bases(root) if root.is_dir() else ():
        for place in map(_once, _split_places(base, synonyms(split))):
            if tars := _tars_in(place):
                return tars
    if whole := uncalled_tars(root):
        return whole if split in TRAIN_SYNONYMS else []
    words = {tar: _words(tar) for tar in _tars_in(root)}
    own = ([tar for tar in words if name in words[tar]] for name in synonyms(split))
    return next(filter(None, own), [])


def uncalled_tars(root: Path) -> list[Path]:
    """A tar, or the tars of a folder where none of them is called by a split."""
    if root.is_file():
        return [root]
    tars = _tars_in(root)
    called = [tar for tar in tars if _words(tar) & {*TRAIN_SYNONYMS, *HELD_OUT}]
    if called and len(called) < len(tars):
        raise UserError(
            f"{root} holds tars that are called by a split, such as {called[0].name}, and others",
            "put the tars of each split into a folder of their own",
        )
    return [] if called else tars


def _words(tar: Path) -> set[str]:
    return {*re.split(r"[^a-z]+", tar.stem.lower())}


def _tars_in(folder: Path) -> list[Path]:
    names = (path.name for path in folder.glob("*.tar") if not passed_over(path.name))
    return [folder / name for name in in_order(names)]


def bases(root: Path) -> Iterator[Path]:
    """A folder, and the one in it if there is no other and no image, as unpacked archives have it."""
    seen = set()
    while root.resolve() not in seen:
        yield root
        seen.add(root.resolve())
        inside = subfolders(root)
        if len(inside) != 1 or holds_images(root):
            return
        root = root / inside[0]


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


def _once(split: Path) -> Path:
    """``seg_train/seg_train`` of ``seg_train``: the same split's folder in it, if there is nothing else."""

    def word(name: str) -> str:
        return match[2].lower() if (match := _SPLIT.fullmatch(name)) else name

    *_, last = (base for base in bases(split) if word(base.name) == word(split.name))
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


def refuse_a_class_called_train(train: Path) -> None:
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


def held_out(names: Iterable[str]) -> str | None:
    """The first name that is one of a held-out folder."""
    return next((name for name in names if name.lower() in HELD_OUT), None)
