"""Folders of class folders -> training and validation images whose classes agree.

The natural order of classes ("2" before "10") is timm's. What timm does in silence is refused or noted here:
classes that only the validation split has, images outside class folders, empty folders, splits taken for
classes.
"""

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from timm.data.readers.class_map import load_class_map

from vitkd_cli.data.imagenet import flat_validation, ground_truth_near
from vitkd_cli.data.images import ImageData, Images, loose_images
from vitkd_cli.data.layout import (
    HELD_OUT,
    LAYOUT,
    TRAIN_SYNONYMS,
    VAL_SYNONYMS,
    bases,
    flat_folder,
    held_out,
    refuse_a_class_called_train,
    split_folder,
    tars_of,
    uncalled_tars,
)
from vitkd_cli.data.tars import Folders, tar_images, tar_numbers
from vitkd_cli.data.walk import Walk, endings, from_root, holds_images, in_order, subfolders, walk
from vitkd_cli.errors import UserError, first_line
from vitkd_cli.recipe import Data
from vitkd_cli.text import listed, nfc

Classes = dict[str, int]  # name → label


def unlabelled_folder(root: Path, input_key: str | None) -> ImageData | None:
    """A folder that holds images itself: all in it and below are for training. None if it holds none.

    Folders called test, val or pred are left out.
    """
    types = endings(input_key)
    if not holds_images(root, types):
        return None
    images = loose_images([root], types)
    above = (Path(path).relative_to(root).parent.parts for path in images.refs)
    kept = [index for index, folders in enumerate(above) if not held_out(folders)]
    notes = list(images.notes)
    if left := len(images) - len(kept):
        notes.append(f"images in folders called test, val or pred are left out ({left})")
    return ImageData(
        root.resolve().name,
        images.subset(kept),
        description=f"folder {root}",
        notes=tuple(notes),
        labelled=False,
        skipped=images.skipped,
    )


def image_folder(root: Path, data: Data, split_files: dict[str, list[str]] | None) -> ImageData:
    """The splits of a folder; only the training split where there is none for validation.

    Args:
        split_files: those of an earlier run, reproduced to the file.
    """
    by_name = data.train_split in TRAIN_SYNONYMS  # else the flag says that this is the training split
    train_root = split_folder(root, data.train_split, exactly=not by_name)
    val_root, flat = (None, None) if data.val_split == "none" else _places(root, data.val_split)
    flat = None if flat == root else flat
    for split, found, may_lack in (
        (data.train_split, train_root, TRAIN_SYNONYMS),
        (data.val_split, val_root, (*VAL_SYNONYMS, "none")),
    ):
        if found is None and split not in may_lack and split_files is None:
            raise _no_split(root, split)
    mapping, place = class_map_of(data.class_map, root), train_root or root
    if split_files is not None:
        return _restored(root, place, class_folders(place, mapping, data)[0], mapping, split_files)
    if val_root is not None and train_root is None:
        val, classes = class_folders(val_root, mapping, data)
        return _found(root, None, val, classes, f" (only {_from(root, val_root)})", val.notes)

    if train_root is not None and val_root is None:
        refuse_a_class_called_train(train_root)
    train, classes = class_folders(place, mapping, data, training=by_name)
    if val_root is not None:
        where, about = val_root, f" ({_from(root, place)} and {_from(root, val_root)})"
        val, own = class_folders(val_root, mapping, data)
    elif flat is not None and (truth := ground_truth_near(flat)):  # as ImageNet's own images come
        where, about = truth, f" and {flat.name}/ with {truth.name}"
        val, own = flat_validation(loose_images([flat]), truth, mapping)
    else:
        left_out = [f"{flat} has no class folders and is left out"] if flat else []
        about = f" ({_from(root, train_root)})" if train_root else ""
        return _found(root, train, None, classes, about, [*train.notes, *left_out])

    val = _as_trained(val, own, classes, f"{where}", f"{place}")
    return _found(root, train, val, classes, about, [*train.notes, *val.notes])


def _as_trained(val: Images, own: Classes, classes: Classes, where: str, place: str) -> Images:
    """Validation images with the labels of training: by the names of classes, not by their order.

    Args:
        own, classes: of the validation and of the training images.
        where, place: these are.
    """
    extra, missing = (in_order(set(a) - set(b)) for a, b in ((own, classes), (classes, own)))
    if extra:
        lacking = f", and lacks {listed(missing)}" if missing else ""
        raise UserError(
            f"{where} has classes that {place} lacks: {listed(extra)}{lacking}",
            "give both splits the same classes, or choose with --class-map",
        )
    names = {label: name for name, label in own.items()}
    val = val.relabelled(classes[names[label]] for label in val.labels())
    if missing:
        val.notes = [*val.notes, f"no {Path(where).name} images for {listed(missing)}"]
    return val


Labelled = tuple[Images, Classes | None]  # None: their classes are numbers, without names


def tars_folder(root: Path, data: Data, *, unlabelled: bool = False) -> ImageData | None:
    """The splits of a tar, or of a folder with tars in place of class folders; None of any other folder."""
    names = (data.train_split, data.val_split)
    if not _only_tars(root) or (root.is_dir() and any(split_folder(root, name) for name in names)):
        return None
    mapping = class_map_of(data.class_map, root)
    train, val = (
        _tar_split(root, tars, data, mapping, None, flat=unlabelled) if tars else None
        for tars in ([] if name == "none" else tars_of(root, name) for name in names)
    )
    return of_splits(root, train, val, f"tars {root}") if train or val else None


def _only_tars(root: Path) -> bool:
    """Is this a tar, or a folder with tars and without images?"""
    places = [root, *map(root.joinpath, subfolders(root))] if root.is_dir() else []
    return root.is_file() or (
        any(holds_images(place, (".tar",)) for place in places) and not any(map(holds_images, places))
    )


def of_splits(root: Path, train: Labelled | None, val: Labelled | None, about: str) -> ImageData:
    """The data of two splits that were opened one by one."""
    (images, classes), (held, own) = train or (None, None), val or (None, None)
    if images and held and classes is not None and own is not None:
        held = _as_trained(held, own, classes, f"the validation split of {root}", "the training split")
    notes = [note for part in (images, held) if part for note in part.notes]
    found = _found(root, images, held, classes or own or {}, "", notes)
    labelled = images is None or int(images.classes.min()) >= 0
    return replace(found, description=about if train else f"{about} (validation only)", labelled=labelled)


def _found(
    root: Path, train: Images | None, val: Images | None, classes: Classes, about: str, notes: Iterable[str]
) -> ImageData:
    return ImageData(
        root.resolve().name,
        train,
        val,
        tuple(names_by_class(classes)) if classes else None,
        description=f"folder {root}{about}",
        notes=tuple(notes),
        skipped=sum((Counter(images.skipped) for images in (train, val) if images), Counter()),
    )


def lone_split(root: Path, data: Data, split: str, ground_truth: Path | None) -> tuple[Images, list[str]]:
    """One split and its class names: the split's folder or tar, or ``root`` where it is the split itself."""
    mapping, types = class_map_of(data.class_map, root), endings(data.input_key)
    place, flat = _places(root, split)
    if (flat and not holds_images(flat, types)) or (place is None and _only_tars(root)):
        tars = tars_of(root, split) or (uncalled_tars(root) if split in VAL_SYNONYMS else [])
        if not tars:
            raise _no_split(root, split)
        images, classes = _tar_split(flat or root, tars, data, mapping, ground_truth)
    elif flat and (truth := ground_truth or ground_truth_near(flat)):
        images, classes = flat_validation(loose_images([flat]), truth, mapping)
    else:
        others = any(split_folder(root, name, exactly=True) for name in (*TRAIN_SYNONYMS, *VAL_SYNONYMS))
        if place is None and (others or split not in VAL_SYNONYMS):
            raise _no_split(root, split)
        refuse_ground_truth(ground_truth, f"{place or root} has class folders")
        images, classes = class_folders(place or root, mapping, data)
        if images.skipped:
            images.notes = [*images.notes, f"skipped for their ending: {counted(images.skipped)}"]
    return images, names_by_class(classes)


def holds_split(root: Path, split: str) -> bool:
    """Does a folder hold this split by itself, or is it the split: flat, with a file of classes?"""
    place, flat = _places(root, split)
    labelled = flat is not None and ground_truth_near(flat) is not None
    in_tars = (flat is not None or _only_tars(root)) and bool(tars_of(root, split))
    return place is not None or labelled or in_tars


def _places(root: Path, split: str) -> tuple[Path | None, Path | None]:
    """The folder of a split that holds class folders; without one, that which holds images or tars."""
    place = None if root.is_file() else split_folder(root, split)
    return place, None if root.is_file() or place else flat_folder(root, split)


def class_folders(
    root: Path, mapping: Classes | None, data: Data, *, training: bool = False
) -> tuple[Images, Classes]:
    """The images of class folders with their labels, and the label of each folder's name.

    Args:
        training: refuse images from folders that are called test, val or pred.
    """
    types = endings(data.input_key)
    found = walk(root, types)
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
    paths, names = [path for path, _ in found.files], [name for _, name in found.files]
    known = set(names)
    if known == {""}:
        raise UserError(
            f"{root} holds {len(paths)} images but no class folders",
            f'{LAYOUT}; an objective that reads no labels takes it as it is: --loss "vitkd", or "features"; '
            "eval takes it with a file of classes: --ground-truth FILE",
        )
    notes = list(found.notes)
    if mapping is None:
        _refuse_other_layouts(found, in_order(known), training)
        if found.inside:
            deep, places = sum(found.inside.values()), listed(in_order(found.inside))
            where = f"{root.name}/ lie in folders inside their class's and belong to it"
            notes.append(f"{deep:,} images of {where}: {places}")
        if empty := [name for name in found.folders if nfc(name) not in known]:
            notes.append(f"class folders without images in {root.name}/ are no classes: {listed(empty)}")
    at = {name: label for label, name in enumerate(known)}
    images = Images(paths, (at[name] for name in names), notes=notes, skipped=found.skipped)
    return labelled_by(images, [*known], root, mapping)


def labelled_by(
    images: Images, names: Sequence[str], root: Path, mapping: Classes | None
) -> tuple[Images, Classes]:
    """Images with their classes in natural order, or in that of a class map, and the label of each class.

    Args:
        names: of the images' labels so far; empty where an image lies in no class folder.
    """
    known = in_order(set(names))
    if mapping is None:
        if "" in names:
            stray = images.path(images.labels().index(names.index("")))
            raise UserError(f"{stray} lies beside the class folders", "move it into a class folder or away")
        classes = {name: label for label, name in enumerate(known)}
        return images.relabelled(np.array([classes[name] for name in names])[images.classes]), classes
    table = np.array([mapping.get(name, -1) for name in names])[images.classes]  # [N]
    shown = np.flatnonzero(table >= 0)
    if not len(shown):
        raise UserError(
            f"the class map names no class folder of {root}",
            f"its class folders are {listed(list(filter(None, known)))}",
        )
    notes = list(images.notes)
    if lacking := in_order(set(mapping) - set(names)):
        notes.append(f"the class map names {len(lacking)} folders that {root.name}/ lacks: {listed(lacking)}")
    if left_out := [name for name in known if name and name not in mapping]:
        notes.append(f"the class map leaves out {len(left_out)} folders of {root.name}/: {listed(left_out)}")
    images = images.subset(shown).relabelled(table[shown])
    images.notes = notes
    return images, dict(mapping)


def _refuse_other_layouts(found: Walk, names: Sequence[str], training: bool) -> None:
    """Refuse what would make classes of splits or of an archive's wrapping."""
    root = found.root
    if training and {name.lower() for name in names} <= {*TRAIN_SYNONYMS, *HELD_OUT}:
        raise UserError(
            f"{root / names[0]} has no class folders",
            "put one folder per class into it, as in FOLDER/train/CLASS/image.jpg",
        )
    if training and (split := held_out(names)):
        raise UserError(
            f"{root / split} lies among the class folders {listed([n for n in names if n != split])}",
            f"no training image is taken from {split}/: move it away, put the classes into train/, "
            "or give the class another name",
        )
    if training and (inside := [place for place in found.inside if held_out(place.split("/"))]):
        raise UserError(
            f"{root / inside[0]} holds images of a split inside a class folder",
            "put the splits above the classes: FOLDER/train/CLASS and FOLDER/validation/CLASS",
        )
    if len(names) == 1 and sum(found.inside.values()) == len(found.files):
        *_, deepest = bases(root)
        raise UserError(
            f"{root} holds one folder, {names[0]}, and the images lie in folders inside it: "
            f"{listed(in_order(found.inside))}",
            f"--data {shlex.quote(str(deepest))} takes its folders as the classes",
        )


def _tar_split(
    root: Path,
    tars: Sequence[Path],
    data: Data,
    mapping: Classes | None,
    ground_truth: Path | None,
    flat: bool = False,
) -> tuple[Images, Classes]:
    """Tars whose folders, or names, are the classes; or one without folders, with a file of classes.

    Args:
        flat: without any classes will do.
    """
    images, names = class_by_folder(tars, endings(data.input_key))
    if set(names) == {""}:
        if flat:
            return images.relabelled([-1] * len(images)), {}
        if not (truth := ground_truth or ground_truth_near(tars[0].parent)):
            raise UserError(
                f"{root} holds images without class folders",
                "--ground-truth FILE lists their classes for eval; with .cls beside each: --data wds:…",
            )
        return flat_validation(images, truth, mapping)
    refuse_ground_truth(ground_truth, f"{root} has class folders")
    if {name.lower() for name in names} <= {*TRAIN_SYNONYMS, *HELD_OUT}:
        raise UserError(
            f"{root} holds the splits {listed(in_order(set(names)))}", "unpack it, and name the folder"
        )
    return labelled_by(images, names, root, mapping)


def class_by_folder(tars: Sequence[Path], types: tuple[str, ...]) -> tuple[Images, list[str]]:
    """The images of tars, and the name of each label's class; several labels may be of one class.

    It is the first folder below those that hold all images; of several tars without folders, the tar. It is
    empty for the images of one tar that lie side by side.
    """
    images, folders = tar_images(tars, Folders(types))
    assert folders is not None
    if folders == [""] and len(tars) > 1:
        return images.relabelled(tar_numbers(images)), [nfc(tar.stem) for tar in tars]
    shared = Path(os.path.commonpath(folders)).parts if "" not in folders else ()
    above = len(shared)
    if above and len(folders) == 1:
        above -= 1  # all in one folder: it is the class
    parts = [folder.split("/") for folder in folders]
    return images, [part[above] if len(part) > above else "" for part in parts]


def refuse_ground_truth(ground_truth: str | Path | None, why: str) -> None:
    """Refuse a file of classes where the data has them already."""
    if ground_truth:
        raise UserError(
            f"--ground-truth lists the classes of a flat folder, and {why}", "leave --ground-truth out"
        )


def _no_split(root: Path, split: str) -> UserError:
    return UserError(
        f"{root} has no split folder {split!r}", f"it holds: {listed(subfolders(root)) or 'no folder'}"
    )


def _from(root: Path, folder: Path) -> str:
    return f"{Path(os.path.relpath(folder, root)).as_posix()}/"


def counted(endings: Mapping[str, int]) -> str:
    """``3 .heic, 1 .txt``: the most frequent first."""
    most = sorted(endings.items(), key=lambda pair: (-pair[1], pair[0]))
    return listed([f"{count:,} {ending or 'without one'}" for ending, count in most])


def class_map_of(file: str | None, root: Path) -> Classes | None:
    """timm's class map, read; a blank line in a text file is no class."""
    if not file:
        return None
    try:
        mapping = dict(load_class_map(file, str(root)))
    except (AssertionError, OSError, ValueError) as error:
        raise UserError(
            f"class_map: {first_line(error)}", "give a .txt file with one class name per line"
        ) from error
    # Windows begins a text with a mark, which timm takes for a part of the first name.
    named = {nfc(name).removeprefix("\ufeff"): int(index) for name, index in mapping.items()}
    named.pop("", None)
    if not named:
        raise UserError("class_map names no class", "give a .txt file with one class name per line")
    return named


def names_by_class(classes: Classes) -> list[str]:
    """Class names by index; where a class map joins folders, the first of them names the class."""
    names = {index: name for name, index in reversed(classes.items())}
    return [names.get(index, f"class {index}") for index in range(max(names) + 1)]


def _restored(
    root: Path,
    place: Path,
    images: Images,
    classes: Classes | None,
    split_files: dict[str, list[str]],
) -> ImageData:
    """The split of an earlier run, file by file.

    What is gone is dropped where that moves no index of a training image: from the validation split, or with
    another image of its class in its place.

    Args:
        place: the folder below ``root`` that holds the classes.
        classes: of the class map, if there is one.
    """
    train, val = split_files["train"], split_files["validation"]
    known = {from_root(path, root): path for path in images.refs}
    present = [path for path in (*train, *val) if path in known]
    if not present:
        raise UserError(
            f"no image of the saved split is left in {root}, the first was {[*train, *val][0]}",
            "restore them, or start a new run",
        )
    notes = list(images.notes)
    if unused := len(known) - len(present):
        notes.append(f"{unused} images are not in the saved split and stay unused")
    above = len(Path(os.path.relpath(place, root)).parts)
    of = {path: nfc(Path(path).parts[above]) for path in (*train, *val)}
    if classes is None:  # a folder that is new since then must not shift the classes
        classes = {name: index for index, name in enumerate(in_order(set(of.values())))}

    others: defaultdict[str, list[str]] = defaultdict(list)  # training images by class
    for path in train:
        if path in known:
            others[of[path]].append(path)
    gone = [path for path in train if path not in known]
    if alone := next((path for path in gone if of[path] not in others), None):
        raise UserError(
            f"all training images of {of[alone]} in the saved split are gone from {root}, such as {alone}",
            "restore them, or start a new run",
        )
    stand_in = {path: others[of[path]][n % len(others[of[path]])] for n, path in enumerate(gone)}
    if gone:
        notes.append(
            f"training images that are gone, others of their class stand in ({len(gone)}): {listed(gone)}"
        )
    if lost := [path for path in val if path not in known]:
        notes.append(f"validation images that are gone are left out ({len(lost)}): {listed(lost)}")
    parts = [stand_in.get(path, path) for path in train], [path for path in val if path in known]
    chosen, kept = (
        Images([known[path] for path in part], [classes[of[path]] for path in part]) for part in parts
    )
    found = _found(root, chosen, kept, classes, ", saved split", notes)
    return replace(found, split_files=split_files, skipped=images.skipped)
