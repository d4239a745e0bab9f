"""The images of a run: which they are, and which can be read."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from vitkd_cli.data.census import in_training
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.decoded import OFF, cached, fill, planned
from vitkd_cli.data.decoding import decoding_of
from vitkd_cli.data.images import ImageData, Images, Split, Stream
from vitkd_cli.data.listing import read_split, root_of, written_down
from vitkd_cli.data.scan import Scan, by_main, image_files, on_every_machine, scan, stamp, unreadable, without
from vitkd_cli.errors import UserError
from vitkd_cli.files import write_json
from vitkd_cli.recipe import Data, Recipe
from vitkd_cli.session import Session
from vitkd_cli.text import listed, nfc

KNOWN = "scan.json"
FROM_SCRATCH_WANTS = 100_000  # images; below, a 300-epoch run from scratch is the wrong recipe


def data_of(recipe: Recipe, labelled: bool, resumed: Path | None) -> ImageData:
    """What the recipe's data stands for, and a record of it; a resumed run finds the split that it made.

    Args:
        labelled: its labels are read.
    """
    saved = resumed / "split.json" if resumed else None
    data: ImageData = open_data(
        recipe.but(val_fraction=recipe.own_val_fraction),
        seed=recipe.seed,
        split_files=read_split(saved) if saved and saved.is_file() else None,
        unlabelled=not labelled,
    )
    if data.train is None:
        raise UserError(
            f"{data.name} has no training images; it has{data.description.partition(':')[2]}",
            "put class folders into FOLDER/train, or name the split with --train-split",
        )
    by_neighbours = recipe.num_classes == 0 or not data.labelled
    if by_neighbours and recipe.eval_metric == "loss":
        raise UserError("eval_metric = 'loss': nearest neighbours have none", "--eval-metric top1")
    data = replace(data, by_neighbours=by_neighbours)
    if recipe.val_data is not None:
        data = _validated_on(recipe, data)
    if isinstance(data.train, Stream) and recipe.num_processes > 1:
        raise UserError(
            "a stream cannot be shared among processes image by image",
            "train in one process, or from what has an index: hfds/NAME, or tars by wds:FOLDER",
        )
    if by_neighbours and isinstance(data.bank, Stream):
        raise UserError(
            "nearest neighbours need images by index, not a stream", "--val-data FOLDER with class folders"
        )
    places = (recipe.data, recipe.val_data or recipe.data)
    root, val_root = (root_of(place or "", recipe.data_dir) for place in places)
    return replace(data, record=written_down(data, root, val_root))


def _validated_on(recipe: Recipe, data: ImageData) -> ImageData:
    """The data with the images of ``--val-data`` in place of its own validation split."""
    splits = {"train_split": Data.train_split, "val_split": Data.val_split}
    own = recipe.but(**splits, data=recipe.val_data, val_fraction=0.0, num_classes=None, shots=None)
    # Without two splits of its own every image is scored by all the others.
    other: ImageData = open_data(own, seed=recipe.seed)
    val, bank = other.val or other.train, other.train or other.val
    if not data.by_neighbours and other.class_names != data.class_names:
        ours, theirs = ([nfc(name) for name in one.class_names or ()] for one in (data, other))
        if not isinstance(val, Images) or not theirs or not set(theirs) <= set(ours):
            raise UserError(
                f"{other.name} has other classes than {data.name}: {listed(theirs)}, not {listed(ours)}",
                "give both the same class folders",
            )
        val = val.relabelled(ours.index(theirs[label]) for label in val.labels())
    notes = (*data.notes, *(note for note in other.notes if note not in data.notes))
    return replace(data, val=val, bank=bank, notes=notes)


def warn_of_small_data(recipe: Recipe, data: ImageData, warn: Callable[[str], None]) -> None:
    """Say where a long run from scratch meets few images."""
    count = len(data.train) if data.train is not None else 0
    from_scratch = not (recipe.pretrained or recipe.initial_checkpoint)
    if from_scratch and recipe.epochs >= 300 and 0 < count < FROM_SCRATCH_WANTS:
        warn(
            f"{count:,} images are few for {recipe.epochs} epochs from scratch; "
            "--recipe finetune is meant for such data"
        )


def warn_of_leaks(data: ImageData, session: Session) -> None:
    """Say which validation images are in training, too."""
    if (train := data.train) is None or (val := data.val) is None:
        return
    with session.reporter.bar("comparing the splits", 0) as bar:
        note = by_main(
            lambda each: in_training(train, val, each),
            lambda done, total: bar.advance(done, total=total),
            session.accelerator,
        )
    if note:
        session.reporter.warn(note)


# Which can be read -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readable:
    """What a look at the files found.

    Attributes:
        data: without the validation images that cannot be read.
        stamp: of the files; empty on all processes but the main one.
    """

    data: ImageData
    stamp: str
    broken: dict[str, str]

    def keep(self, folder: Path) -> None:
        """Spare a resumed run the look at the same files."""
        if self.stamp:
            write_json(folder / KNOWN, {"files": self.stamp, "broken": self.broken})


def readable(recipe: Data, data: ImageData, folder: Path, session: Session) -> Readable:
    """Look at every image file that the run will read, unless ``folder`` holds what such a look found.

    Files that cannot be read are refused with a list of them all, but for ``--skip-corrupt``.
    """
    now, found, decoding, reporter = "", None, decoding_of(recipe), session.reporter
    with reporter.bar("looking at the images", 0):
        files = image_files(data.train_all, data.val, data.bank)
        if session.accelerator.is_main_process and files:
            now = stamp(files, decoding)
            found = _known(folder / KNOWN, now)
        found = scan(
            files,
            decoding,
            lambda done, total: reporter.advance(done, total=total),
            session.accelerator,
            found=found,
        )
    broken = found.broken
    if not broken:
        return Readable(data, now, broken)
    if not recipe.skip_corrupt:
        raise unreadable(broken, len(files), "repair or delete them, or pass --skip-corrupt")

    def rest(images: Split | None) -> Split | None:
        return without(images, broken) if isinstance(images, Images) else images

    val, same = rest(data.val), data.bank is data.val
    if data.val is not None and not val:
        raise UserError(f"no validation image of {data.name} can be read", "repair the files", exit_code=3)
    gone = sorted(set(image_files(data.val)) & broken.keys())
    reporter.warn(
        f"{len(broken):,} of {len(files):,} image files cannot be read: in training others of their class "
        f"stand in for them; validation goes without {len(gone):,}"
    )
    for file, why in broken.items():
        reporter.say(f"  {file}: {why}")
    return Readable(
        replace(data, val=val, bank=val if same else rest(data.bank), left_out=tuple(gone)), now, broken
    )


# Which are kept decoded ------------------------------------------------------------------------------


def plan_cache(recipe: Recipe, images: Split, session: Session) -> None:
    """Say what a cache of the training images would take; refuse one that does not fit."""
    if (place := _cache_place(recipe, images)) and session.accelerator.is_local_main_process:
        assert isinstance(images, Images)
        session.reporter.say(f"cache    {planned(images, place, recipe.cache_side)}")


def kept_decoded(recipe: Recipe, images: Split, session: Session) -> Split:
    """The training images, from the cache if the recipe wants one; one process of each machine fills it."""
    if not (place := _cache_place(recipe, images)):
        return images
    assert isinstance(images, Images)
    side, reporter = recipe.cache_side, session.reporter
    with reporter.bar("decoding images", 0) as bar:

        def filled(each: Callable[[int, int], None]) -> str | UserError:
            try:
                return fill(images, place, side, each, reporter.warn)
            except UserError as refused:  # all end, and not by a lost connection
                return refused

        lines = on_every_machine(
            filled, lambda done, total: bar.advance(done, total=total), reporter.say, session.accelerator
        )
    for line in lines:
        if isinstance(line, UserError):
            raise line
    reporter.say(f"cache    {lines[0]}")
    return cached(images, place, side)


def _cache_place(recipe: Recipe, images: Split) -> str:
    """Where decoded images are kept; empty where they are not."""
    if recipe.cache_images != OFF and isinstance(images, Stream):
        raise UserError("--cache-images keeps image files, and a stream has none", "--cache-images off")
    return "" if recipe.cache_images == OFF else recipe.cache_images


def _known(file: Path, stamp: str) -> Scan | None:
    with suppress(OSError, ValueError, TypeError, KeyError):
        content = json.loads(file.read_bytes())
        if content["files"] == stamp:
            return Scan(dict(content["broken"]), 0)
    return None
