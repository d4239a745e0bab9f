"""Which images a model is scored on, and which of its classes theirs are.

Scoring, an export's check and the inspection of attention all ask here. A model that came out of a run is
never shown the images that it learned from, unless somebody names the training split: the run's folder says
which images it set aside, and its student's metadata say it wherever student and images were moved to.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo

from vitkd_cli.data.datasets import has_split, named_split, open_data
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images, Split, Stream
from vitkd_cli.data.layout import TRAIN_SYNONYMS, VAL_SYNONYMS
from vitkd_cli.data.listing import digest_of, files_of, read_split, root_of, there
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.evaluation.origin import ModelOrigin, same_place
from vitkd_cli.options import declared
from vitkd_cli.recipe import SAMPLE, WDS, Data
from vitkd_cli.requests import EvalRequest, Pictures
from vitkd_cli.text import listed, nfc
from vitkd_cli.vit.classes import Match, match_classes
from vitkd_cli.vit.model import Model

# What data is read with: it goes with the run that was trained on it.
READ_WITH = ("data_dir", "class_map", "input_key", "target_key", "remote_cache")


Named = tuple[Split, Sequence[str] | None]  # images, and their classes in the order of the labels


@dataclass(frozen=True)
class Chosen:
    """The images that models are scored on.

    Attributes:
        data: what names them.
        names: of their classes in the order of the labels; None if nobody knows them.
        about: the data, and which of its images they are.
        notes: what a person should know of the choice, one line each.
        rest: opens the other images of data that has no validation split, and the names of their classes.
    """

    data: str
    images: Split
    names: list[str] | None
    about: str
    notes: tuple[str, ...] = ()
    rest: Callable[[], Named] | None = None

    def classes_of(
        self, model: Model, *, class_map: str | None = None, valid_labels: str | None = None
    ) -> Match:
        """Which of a model's classes those of the data are.

        Args:
            class_map: has put the data's classes in the model's order.
            valid_labels: timm's: a file with the model's index of each class, one per line.
        """
        if valid_labels is None:
            return match_classes(model, self.names, self.data, mapped=class_map is not None)
        indices = _valid_labels(expanded(valid_labels), self.names, model.spec.num_classes)
        return Match(tuple(indices), tuple(self.names or ()))

    def labelled_for(self, model: Model) -> tuple[Split, tuple[str, ...]]:
        """The images with their classes as the model counts them, and what a person should know of both."""
        if isinstance(self.images, Stream) or not model.spec.num_classes:
            return self.images, self.notes  # a stream is refused by whoever needs an index
        match = self.classes_of(model)
        notes = (*self.notes, *([match.note] if match.note else []))
        if match.indices is None:
            return self.images, notes
        return self.images.relabelled(match.indices[label] for label in self.images.labels()), notes


class Provenance:
    """Where the models of one call come from, and so which images are theirs.

    Args:
        models: as a person types them; in place of one that gets other weights, their file. Empty for one
            that somebody built.
    """

    def __init__(self, models: Iterable[str]) -> None:
        self.origins = [ModelOrigin(typed) for typed in models if typed]

    @cached_property
    def own_data(self) -> str | None:
        """What the runs of these models were validated on; None if none of them comes out of a run."""
        found: dict[str, Path] = {}
        for origin in self.origins:
            if origin.run and origin.recipe and (data := origin.recipe.val_data or origin.recipe.data):
                found.setdefault(data, origin.run)
        if len(found) > 1:
            raise UserError(
                f"{' and '.join(map(str, found.values()))} learned from different data: {', '.join(found)}",
                "--data names what to score them on",
            )
        for data, run in found.items():
            still_there(data, run)
            return data
        return None

    def data(self, given: str | None) -> str:
        """What is named, or their run's own data, or ``$VITKD_DATA``, or the sample."""
        return (self.own_data or os.environ.get("VITKD_DATA") or SAMPLE) if given is None else given

    def decoding(self, request: Pictures = Pictures(), names: Sequence[str] | None = None) -> Decoding:
        """How pictures are decoded: as asked, else as the models' runs read theirs.

        Args:
            names: of the data's classes. ImageNet's, known by its synsets, is not turned by EXIF unless
                asked: published accuracies are of pictures as they lie.
        """
        asked: dict[str, Any] = {name: getattr(request, name) for name in declared(Pictures)}
        if request.exif is None and names and set(names) <= set(ImageNetInfo("imagenet-1k").label_names()):
            asked["exif"] = False
        runs = [origin.decoding for origin in self.origins if origin.decoding is not None]
        for key in ("exif", "alpha_fill"):
            if asked[key] is None and len({getattr(how, key) for how in runs}) > 1:
                raise UserError(
                    f"the models' runs read pictures with different {key}",
                    "name one way for all: --exif or --no-exif, --alpha-fill COLOUR",
                )
        how = replace(runs[0], max_pixels=max(how.max_pixels for how in runs)) if runs else Decoding()
        return replace(how, **{key: value for key, value in asked.items() if value is not None})

    def images(
        self, data: str, split: str = "validation", *, ground_truth: str | None = None, **given: str | None
    ) -> Chosen:
        """The images of a split that none of the models learned from.

        Args:
            ground_truth: the file with the classes of a flat folder.
            given: of ``READ_WITH``; what is None is as the run has it, where the data is the run's.
        """
        home = [origin for origin in self.origins if origin.learned_from(data)]
        options: dict[str, Any] = {key: given.get(key) for key in READ_WITH}
        for origin in home[:1]:
            options |= {k: getattr(origin.recipe, k) for k, value in options.items() if value is None}
        asked, at_home = split in VAL_SYNONYMS and ground_truth is None, home[0].recipe if home else None
        in_part = False  # of a dataset of timm's
        if asked and at_home and same_place(str(at_home.data), data):
            in_part = at_home.val_split == "none" and data != SAMPLE and not expanded(data).exists()
            split = split if at_home.val_split == "none" else at_home.val_split
        divided = asked and not in_part and has_split(data=data, split=split, data_dir=options["data_dir"])
        notes: tuple[str, ...] = ()
        if asked and not divided:
            own, notes = self._held_out(data, home, options)
            if own is not None:
                return own
        images, names = named_split(data=data, split=split, ground_truth=ground_truth, **options)
        if any(origin.images for origin in self.origins):
            files = files_of(images, root_of(data, options["data_dir"]))
            for origin in self.origins if files else ():
                notes += origin.warnings(files or {})
        notes += tuple(filter(None, (_same_tars(origin, images, options) for origin in self.origins)))
        whole = asked and data != SAMPLE and not in_part and not divided
        about = data if whole else f"{data}, {split} split"
        return Chosen(data, images, names, about, (*notes, *images.notes))

    def beside_a_bank(self, request: EvalRequest) -> tuple[Chosen, Chosen]:
        """The images to judge embeddings on, and others to judge them by, with one order of classes.

        They are the images that :meth:`images` gives, and the training split of the data, or of
        ``request.bank``; of data without one, what a run set aside and the rest; else what a run would set
        aside and the rest.
        """
        data = self.data(request.data)
        given = {key: getattr(request, key) for key in READ_WITH}
        asked = self.images(data, request.split, ground_truth=request.ground_truth, **given)
        home = next((origin.recipe for origin in self.origins if origin.learned_from(data)), None)
        given = {key: value or getattr(home, key, None) for key, value in given.items()}
        train = request.train_split or (home.train_split if home else Data.train_split)
        validating = request.split in VAL_SYNONYMS
        about = f"{data}, {train} split"
        if request.bank is not None:
            given = {key: value for key, value in given.items() if key != "data_dir"}
            own = has_split(data=request.bank, split=train)
            found: Named = named_split(data=request.bank, split=train if own else "validation", **given)
            about = request.bank
        elif asked.rest is not None:
            found, about = asked.rest(), f"the rest of {data}"
        elif has_split(data=data, split=train, data_dir=given["data_dir"]):
            if request.split == train or {request.split, train} <= {*TRAIN_SYNONYMS}:
                raise UserError(
                    f"--split {request.split} is what the images are judged by",
                    "leave --split out, or --bank",
                )
            found = named_split(data=data, split=train, **given)
        elif validating and request.ground_truth is None:
            opened = open_data(data=data, **given)
            if opened.train_all is None or opened.val is None:
                raise UserError(f"{data} has no training images to judge embeddings by", "--bank FOLDER")
            share = f"{data}, {Data.val_fraction:.0%} of every class, as distill sets it aside"
            asked = replace(asked, images=opened.val, names=list(opened.class_names or ()), about=share)
            found, about = (opened.train_all, opened.class_names), f"the rest of {data}"
        else:
            raise UserError(f"{data} has no split {train!r} to judge embeddings by", "--bank FOLDER")
        images, names = found
        return _beside(asked, Chosen(request.bank or data, images, list(names) if names else None, about))

    def _held_out(
        self, data: str, home: list[ModelOrigin], options: dict[str, Any]
    ) -> tuple[Chosen | None, tuple[str, ...]]:
        """What the models' runs held out of data that has no validation split, and notes on all of them."""
        tried = {
            origin.typed: (_set_aside(origin, data, options) if origin in home else None)
            or _known_again(origin, data, options["data_dir"])
            for origin in self.origins
        }
        notes = tuple(note for found in tried.values() if found for note in found.notes)
        own = {typed: found for typed, found in tried.items() if found and len(found.images)}
        root = root_of(data, options["data_dir"])
        if len({_identity(found.images, root) for found in own.values()}) > 1:
            raise UserError(
                f"{' and '.join(own)} set other images of {data} aside",
                "score them on images that none of them learned from",
            )
        return next((replace(found, notes=notes) for found in own.values()), None), notes


def still_there(data: str | None, run: Path) -> None:
    """Refuse data that a run was trained or validated on, if it was moved."""
    if data and os.path.isabs(data) and not Path(data).exists():
        raise UserError(f"the data of {run} is no longer at {data}", "--data PLACE says where it is")


def _beside(asked: Chosen, bank: Chosen) -> tuple[Chosen, Chosen]:
    """Both with the classes in the bank's order, and no image in both; what cannot be judged is refused."""
    scored, known = asked.images, bank.images
    if isinstance(scored, Stream) or isinstance(known, Stream):
        raise UserError("embeddings are judged on images by index, not on a stream", "a folder, or hfds/NAME")
    names = None if asked.names is None or bank.names is None else [nfc(name) for name in bank.names]
    if names is not None:
        labels, ours = scored.labels(), [nfc(name) for name in asked.names or ()]
        if strange := [ours[label] for label in sorted({*labels}) if ours[label] not in names]:
            raise UserError(
                f"{bank.about} has no class {listed(strange)}, as {asked.about} has",
                "--bank with these classes",
            )
        index_of = {name: index for index, name in enumerate(names)}
        scored = scored.relabelled(index_of[ours[label]] for label in labels)
    files = {_place(scored, index) for index in range(len(scored))} - {None}
    seen: set[str] = set()
    kept = []
    for index in range(len(known)):
        place = _place(known, index)
        if place is None or (place not in files and place not in seen):
            kept.append(index)
            seen |= {place} if place else set()
    if lost := len(known) - len(kept):
        note = f"{lost:,} images of {bank.about} are among those that are judged, or twice there: left out"
        asked = replace(asked, notes=(*asked.notes, note))
    known = known.subset(kept)
    images = known.counts()
    if lacking := sorted({*scored.counts()} - {*images}):
        said = [names[label] if names else f"class {label}" for label in lacking]
        raise UserError(f"{bank.about} has no image of {listed(said)}, as {asked.about} has", "--bank FOLDER")
    if len(images) < 2:
        raise UserError(f"{bank.about} has images of one class only", "name data of two or more classes")
    return replace(asked, images=scored, names=names), replace(bank, images=known, names=names)


def _place(images: Images, index: int) -> str | None:
    file = images.file(index)
    return None if file is None else os.path.abspath(file)


def _same_tars(origin: ModelOrigin, images: Split, options: dict[str, Any]) -> str | None:
    """Say so where a run learned from some of the tars of these images, which it named otherwise."""
    tars, recipe = _tars(images), origin.recipe
    if not tars or recipe is None or not recipe.data:
        return None
    try:
        theirs, _ = named_split(data=recipe.data, split=recipe.train_split, **options)
    except UserError:  # they are gone, or on another machine
        return None
    if not (shared := tars & _tars(theirs)):
        return None
    return f"{origin.typed} learned from {len(shared):,} of these {len(tars):,} tars: it may know the images"


def _tars(images: Split) -> set[str]:
    return {os.path.realpath(tar) for tar in images.archives} if isinstance(images, Images) else set()


def _identity(images: Split, root: Path) -> str | tuple[int, ...]:
    """What tells some images of the data from others: their files, or their indices where they are none."""
    files = files_of(images, root)
    return tuple(getattr(images, "refs", ())) if files is None else digest_of(files)


def _set_aside(origin: ModelOrigin, data: str, options: dict[str, Any]) -> Chosen | None:
    """What a run held out of data that has no validation split, where that data still lies in its place."""
    recipe, run = origin.recipe, origin.run
    assert recipe is not None and run is not None
    if not same_place(str(recipe.data), data):
        return None  # of --val-data
    listed, local = run / "split.json", data.startswith(WDS) or expanded(data).exists()
    options = {**options, "val_fraction": recipe.own_val_fraction}
    asked = replace(recipe, data=data, val_data=None, shots=None, dataset_download=False, **options)
    split_files = read_split(listed) if listed.is_file() and local else None
    opened = open_data(asked, seed=recipe.seed, split_files=split_files)
    if local and (opened.val is None or (opened.split_files and not split_files)):
        raise UserError(
            f"{run} learned from every image of {data}",
            "--data names other images; --split train scores it on those that it learned from",
        )
    if opened.val is None:
        return None
    names = None if opened.class_names is None else list(opened.class_names)
    rest = opened.train_all
    about = f"{data}, those that {run} set aside"
    return Chosen(data, opened.val, names, about, opened.notes, lambda: (rest or Images([], []), names))


def _known_again(origin: ModelOrigin, data: str, data_dir: str | None) -> Chosen | None:
    """What a student's run held out, wherever student and images were moved to."""
    files, names = origin.held_out, origin.told.get("class_names")
    if not files or not isinstance(names, list):
        return None
    found, fitting = there(files, root_of(data, data_dir))
    if not found:
        return None
    if len(found) < len(files):  # folders by other names are other classes, not images that are gone
        _, theirs = named_split(data=data, data_dir=data_dir)
        if {nfc(name) for name in theirs or ()} - {nfc(name) for name in names}:
            return None
    who = f"{origin.typed} held out when it was trained"
    if not fitting:
        odd = f"{len(found):,} files of {data} are called like images that {who}, and have other contents"
        return Chosen(data, Images([], []), names, "", (f"{odd}: taken for other data",))
    images = Images(found.values(), (files[name][1] for name in found))
    changes = [
        f"{count:,} {what}"
        for count, what in (
            (len(files) - len(found), "are gone"),
            (len(found) - fitting, "have other contents"),
        )
        if count
    ]
    notes = [f"of the {len(files):,} images that {who} {' and '.join(changes)}"] if changes else []
    shown = {files[name][1] for name in found}
    if lacking := [name for index, name in enumerate(names) if index not in shown]:
        notes.append(f"none of them is of {listed(lacking)}: the figures are of the other classes alone")

    def rest() -> Named:
        opened = open_data(data=data, data_dir=data_dir, val_fraction=0.0)
        every, held = opened.train_all, {os.path.abspath(path) for path in found.values()}
        if not isinstance(every, Images):
            return Images([], []), opened.class_names
        return every.subset(i for i in range(len(every)) if _place(every, i) not in held), opened.class_names

    return Chosen(data, images, names, f"{data}, those that {who}", tuple(notes), rest)


def _valid_labels(file: Path, names: Sequence[str] | None, own: int) -> list[int]:
    """timm's list of the classes that data has: one index per line."""
    try:
        rows = [int(line) for line in file.read_text(encoding="utf-8-sig").split()]
    except (OSError, ValueError) as problem:
        raise UserError(
            f"--valid-labels: cannot read {file}: {first_line(problem)}",
            "write one class index of the model per line",
        ) from None
    if (names is not None and len(names) != len(rows)) or not all(0 <= row < own for row in rows):
        raise UserError(
            f"--valid-labels: {file} lists {len(rows)} classes, the data has "
            f"{len(names or rows)}, the model {own}",
            "write one line for each class of the data, with its index in the model",
        )
    return rows
