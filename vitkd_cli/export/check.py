"""Compare an export with its model on real images: largest difference, agreement, speed."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vitkd_cli.data.datasets import named_split
from vitkd_cli.data.images import Split, Stream, loose_images
from vitkd_cli.data.keyed import val_loader
from vitkd_cli.data.transforms import view_of
from vitkd_cli.data.webdataset import named_images
from vitkd_cli.device import tensor_float32
from vitkd_cli.errors import UserError, first_line
from vitkd_cli.evaluation.cost import timed
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.export.target import Outputs, Target
from vitkd_cli.recipe import SAMPLE
from vitkd_cli.requests import ExportRequest
from vitkd_cli.vit.build import source_of
from vitkd_cli.vit.model import Model

BATCH = 16


@dataclass(frozen=True)
class Sample:
    """Images as the model sees them.

    Attributes:
        images: ``[N, C, H, W]`` uint8.
        labels: ``[N]`` of the model's classes; None where they are not known.
        others: ``[M, C, H, W]`` uint8 to calibrate with, if that was asked for.
        name: where they come from.
        own: they are of the kind that the model was made for, as far as is known.
        notes: on the images and their classes.
    """

    images: Tensor
    labels: Tensor | None
    others: Tensor
    name: str
    own: bool
    notes: tuple[str, ...] = ()


def sample_of(model: Model, request: ExportRequest, each: Callable[[str, int, int], None]) -> Sample:
    """The images that an export is checked on: those named, else the run's own, else the built-in digits.

    Args:
        each: called with the stage, images done and in all.
    """
    own = True
    notes: tuple[str, ...] = ()
    origin = Provenance([request.checkpoint or source_of(request.model)])
    if request.images:
        found: Split = named_images(request.images)
        name = f"{len(found)} image file{'s' if len(found) > 1 else ''}"
    elif request.data:
        name = request.data
        found, notes = origin.images(request.data).labelled_for(model)
    else:
        found, name, own = _by_itself(model, origin)
    if isinstance(found, Stream):
        raise UserError(f"{name} is a stream, and the check needs images by index", "--images FOLDER")
    found.decode_by(origin.decoding(request))
    count, calibrate = request.num_images, request.int8  # on as many others
    chosen = found.balanced_subset(2 * count if calibrate else count)
    pixels, labels = [], []
    for batch, classes, _ in val_loader(chosen, view_of(model.preprocessing), BATCH):
        pixels.append(batch)
        labels.append(classes)
        each("images", sum(map(len, pixels)), len(chosen))
    stacked, classes = torch.cat(pixels), torch.cat(labels)
    checked = (len(stacked) + 1) // 2 if calibrate else len(stacked)
    known = bool(model.spec.num_classes) and own and int(classes.min()) >= 0
    return Sample(
        images=stacked[:checked],
        labels=classes[:checked] if known else None,
        others=stacked[checked:] if len(stacked) > 1 else stacked,
        name=name,
        own=own,
        notes=notes,
    )


def _by_itself(model: Model, origin: Provenance) -> tuple[Split, str, bool]:
    """Images of the model's own run, else the built-in digits; their name; whether they are its own."""
    data = None
    with suppress(UserError):  # it is gone
        data = origin.own_data
    if data is not None:
        with suppress(UserError):
            return origin.images(data).labelled_for(model)[0], data, True
        if Path(data).is_dir():  # of a run without labels: its images will do
            return loose_images([data]), data, True
    digits, _ = named_split(data=SAMPLE)
    return digits, SAMPLE, model.labels == tuple(map(str, range(10)))


@dataclass(frozen=True)
class Check:
    """What a check showed.

    Attributes:
        count: images.
        difference: largest absolute difference of any output.
        scale: largest absolute value of the model's.
        agreement: percent of the images on which both name the same class; None without classes.
        top1: of model and export, in percent; None without labels.
        images_per_second: of model and export, in batches of ``batch``.
    """

    count: int
    difference: float
    scale: float
    agreement: float | None
    top1: tuple[float, float] | None
    images_per_second: tuple[float, float]
    batch: int


def check(target: Target, path: Path, sample: Sample, each: Callable[[str, int, int], None]) -> Check:
    """Compare what was written with the model itself, or refuse it with exit code 3.

    The largest difference may be ``target.allowed`` times the largest of the model's outputs.
    """
    with tensor_float32(target.device, allowed=False):  # its ten bits would hide what is looked for
        exported = target.load(path)
        found = _compared(target.expected(), exported, sample, target.classifies, each)
    if found.difference == math.inf:
        raise _failed("some of its outputs are not finite")
    if target.allowed is not None and found.difference > target.allowed * found.scale:
        limit = f"{target.allowed * found.scale:.1e} is allowed ({target.allowed:g} of the largest)"
        raise _failed(f"its outputs differ by up to {found.difference:.2e}, where {limit}")
    return found


@torch.inference_mode()
def _compared(
    model: Outputs, exported: Outputs, sample: Sample, classes: bool, each: Callable[[str, int, int], None]
) -> Check:
    """Run both over the images, in batches of 1, of 3 and of 16."""
    difference = scale = 0.0
    agree = 0
    hits, seconds, counted = [0, 0], [0.0, 0.0], 0
    batches = list(_cut(len(sample.images)))
    full = max(len(batch) for batch in batches)
    three = sample.images[:1].expand(3, -1, -1, -1)  # there may be fewer images
    model(three)  # the first call of either sets things up
    _answering(exported)(three)
    for batch in batches:
        images = sample.images[batch.start : batch.stop]
        wanted, ours = timed(model, images)
        found, theirs = timed(_answering(exported), images)
        if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in wanted]:
            raise _failed(f"its outputs are {_shapes(found)}, the student's {_shapes(wanted)}")
        for mine, other in zip(wanted, found, strict=True):
            gap = (mine.cpu().double() - other.cpu().double()).abs().max()
            difference = max(difference, float(gap) if gap.isfinite() else math.inf)
            scale = max(scale, float(mine.abs().max()))
        if classes:
            named = [outputs[0].argmax(1).cpu() for outputs in (wanted, found)]
            agree += int((named[0] == named[1]).sum())
            if sample.labels is not None:
                labels = sample.labels[batch.start : batch.stop]
                hits = [h + int((guess == labels).sum()) for h, guess in zip(hits, named, strict=True)]
        if len(images) == full:
            seconds, counted = [seconds[0] + ours, seconds[1] + theirs], counted + full
        each("check", batch.stop, len(sample.images))
    count, known = len(sample.images), classes and sample.labels is not None
    return Check(
        count=count,
        difference=difference,
        scale=scale,
        agreement=100 * agree / count if classes else None,
        top1=(100 * hits[0] / count, 100 * hits[1] / count) if known else None,
        images_per_second=(counted / seconds[0], counted / seconds[1]),
        batch=full,
    )


def _answering(exported: Outputs) -> Outputs:
    """The export; any exception of it fails the check."""

    def run(images: Tensor) -> list[Tensor]:
        try:
            return exported(images)
        except Exception as problem:
            raise _failed(f"it does not run on a batch of {len(images)}: {first_line(problem)}") from problem

    return run


def _cut(count: int) -> Iterator[range]:
    """Batches of 1, of 3, then of 16: an export with a frozen batch fails at one of them."""
    start = 0
    for size in (1, 3, *[BATCH] * count):
        if start < count:
            yield range(start, min(count, start + size))
            start += size


def _failed(why: str) -> UserError:
    return UserError(
        f"the export failed its check and was not kept: {why}",
        "please report it with the model's name; --no-check-forward keeps it for a look",
        exit_code=3,
    )


def _shapes(outputs: Sequence[Tensor]) -> str:
    return ", ".join("×".join(map(str, output.shape)) for output in outputs)
