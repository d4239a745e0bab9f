"""Any number of models on one labelled dataset, in one pass over its images."""

from __future__ import annotations

import copy
import json
import os
import pkgutil
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn

from vitkd_cli.data import Images, Views, val_loader, view_of
from vitkd_cli.data.images import IterableImages, Selection
from vitkd_cli.data.scan import image_files, scan, unreadable
from vitkd_cli.device import device_named, tensor_float32
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.evaluation.cost import Cost
from vitkd_cli.evaluation.images import READ_WITH, Provenance
from vitkd_cli.evaluation.kept import Kept, digest_of_images, digest_of_weights, token_of
from vitkd_cli.evaluation.metrics import Metrics, Tables, answers
from vitkd_cli.options import takes
from vitkd_cli.requests import EvalRequest, Weights
from vitkd_cli.text import html_table, listed
from vitkd_cli.vit.build import open_model, source_of
from vitkd_cli.vit.classes import Match
from vitkd_cli.vit.model import AnyModel, Model
from vitkd_cli.vit.spec import as_seen_by, in_unit_range

_KEEP_EVERY = 30.0  # seconds between two savings of what has been answered
AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics, with the preprocessing that they hold for.

    Attributes:
        model: how its weights are called.
        metrics: on every image that was counted.
        preprocessing: timm's data configuration.
        classes: that were scored, and that the model has.
        kept: the answers are an earlier call's, read back from its output folder.
        teacher: the metrics of the teacher on the same images.
        real: top-1 and top-5, percent, by reassessed labels (:func:`reassessed`).
        cost: where it was measured (:func:`vitkd_cli.evaluation.cost.measure_cost`).
        built, net: the model, and as it was run.
    """

    model: str
    data: str
    metrics: Metrics
    preprocessing: dict[str, Any]
    parameters: int
    classes: tuple[int, int]
    kept: bool = False
    teacher: Metrics | None = None
    real: tuple[float, float] | None = None
    cost: Cost | None = None
    built: Model | None = None
    net: nn.Module | None = None

    def __repr__(self) -> str:
        found = self.metrics
        return (
            f"Evaluation({self.model!r} on {self.data!r}: top-1 {found.top1:.2f} of {found.count:,} images)"
        )

    def _repr_html_(self) -> str:
        metrics = self.metrics
        numbers = [
            f"{value:.3f}" if value is not None else "–"
            for value in (metrics.top1, metrics.top5, metrics.loss)
        ]
        return html_table(
            ["model", "data", "images", "top-1", "top-5", "loss", "parameters"],
            [[self.model, self.data, f"{metrics.count:,}", *numbers, f"{self.parameters:,}"]],
        )


@dataclass(frozen=True)
class Evaluations:
    """Several models on the same images.

    Attributes:
        names: of the classes, in the order of the labels; empty if nobody knows them.
        images: that were scored; None for a stream.
        teacher: its name, if there was one.
        notes: what a reader of the figures should know, one line each.
        about: which images of the data they are.
    """

    models: tuple[Evaluation, ...]
    names: tuple[str, ...]
    images: Images | None
    teacher: str | None = None
    notes: tuple[str, ...] = ()
    about: str = ""

    @property
    def paths(self) -> tuple[str, ...]:
        """The images' names; empty for a stream. A dataset of timm's may have to open them for that."""
        return () if self.images is None else tuple(map(self.images.path, range(len(self.images))))


@dataclass(frozen=True, eq=False)
class _Subject:
    """A model that is to answer.

    Attributes:
        match: its classes beside the data's.
        own: the classes that it has.
    """

    typed: str
    built: Model
    net: nn.Module
    config: dict[str, Any]
    view: dict[str, Any]
    match: Match
    own: int

    @cached_property
    def facts(self) -> list[Any]:
        """All that its answers depend on, but for the images; every weight is read for it."""
        return [
            digest_of_weights(self.built.net),
            self.view,
            self.config["mean"],
            self.config["std"],
            self.match.rows,
            type(self.net).__name__,  # timm wraps what it pools
        ]

    @property
    def scored(self) -> int:
        """Classes that the data may have of it."""
        return self.own if self.match.rows is None else len(self.match.rows)

    def logits(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` in [0, 1] → ``[B, K]`` in the order of the data's classes."""
        scores: Tensor = self.net(as_seen_by(self.built.spec, images))
        return scores if self.match.rows is None else scores[:, list(self.match.rows)]


def evaluate(model: AnyModel, data: str | Path | None = None, **options: Any) -> Evaluation:
    """Top-1, top-5 and loss of one model; its options are :func:`evaluate_all`'s."""
    found: Evaluations = evaluate_all([model], data, **options)
    return found.models[0]


@takes(EvalRequest)
def evaluate_all(
    request: EvalRequest,
    *,
    beside: Sequence[str] = (),
    accelerator: Any = None,
    each: Callable[[int, int], None] = lambda done, total: None,
    looking: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluations:
    """Score timm models, run folders or weight files on a labelled split, each image once.

    The images are decoded once for all models; those that see them alike share a view. All models are in
    memory together; built ones go to the device and into eval mode.

    Args:
        request: or its settings, the models and the data first.
        beside: models that are not scored, whose training images are left out, too, and whose runs have a
            say in how pictures are decoded.
        accelerator: an ``accelerate.Accelerator`` to share the images among its processes.
        each: told images done and in all.
        looking: told the same of the look at the files that comes before.

    Raises:
        UserError: a model has no classes, or not those of the data; images cannot be read: all are listed.
    """
    models, teacher, split, output = request.models, request.teacher, request.split, request.output
    if request.checkpoint is not None and len(models) > 1:
        raise UserError(
            "--checkpoint gives weights to one model, and several are named",
            "score them one by one, or name run folders",
        )
    place = accelerator.device if accelerator else device_named(request.device)
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    every_model = [*models, *([teacher] if teacher else [])]
    sources = [
        name
        for name in (request.checkpoint or source_of(models[0]), *map(source_of, every_model[1:]), *beside)
        if name
    ]
    origin = Provenance(sources)
    chosen = origin.images(
        origin.data(request.data),
        split,
        ground_truth=request.ground_truth,
        **{key: getattr(request, key) for key in READ_WITH},
    )
    data, images, names = chosen.data, chosen.images, chosen.names
    decoding = origin.decoding(request, names)
    images.decode_by(decoding)

    def subject(typed: AnyModel, weights: Weights = request) -> _Subject:
        built = open_model(typed, weights)
        if not built.spec.num_classes:
            raise UserError(
                f"{built.spec.name} has no classes to score: its output is an embedding or it has no head",
                "fine-tune it first: vitkd distill --student … --pretrained --loss labels",
            )
        match = chosen.classes_of(built, class_map=request.class_map, valid_labels=request.valid_labels)
        called = str(typed) if isinstance(typed, (str, Path)) else built.spec.name
        return _subject(called, built, match, request, place)

    subjects = [subject(typed) for typed in models]
    guide = subject(teacher, replace(request, checkpoint=None, use_ema=False)) if teacher else None
    everyone = [*subjects, *([guide] if guide else [])]
    for one in subjects:
        if guide and (one.scored, one.match.names) != (guide.scored, guide.match.names):
            others = " other" if one.scored == guide.scored else ""
            raise UserError(
                f"{one.built.spec.name} is scored on {one.scored} classes, "
                f"the teacher on {guide.scored}{others}",
                "leave --teacher out, or name one of the same classes",
            )

    if not isinstance(images, IterableImages):
        _are_classes(torch.tensor(images.labels()), everyone)

    kept = None
    if output is not None and not isinstance(images, IterableImages):  # a stream has no place to go on from
        about = [digest_of_images(images, decoding), request.mixed_precision]
        kept = Kept(
            expanded(output) / "answers",
            [(one.typed, token_of(about, one.facts, guide and guide.facts)) for one in everyone],
            rank,
        )
    tables = kept.read(len(images)) if kept else [Tables(1, len(images)) for _ in everyone]
    if accelerator:
        accelerator.wait_for_everyone()  # before one keeps answers that another has yet to read
    todo = [index for index, table in enumerate(tables) if not (kept and table.complete)]
    if guide and todo:  # how far a model is from it is measured on the spot
        todo = sorted({*todo, len(subjects)})
    notes: list[str] = []
    if todo:
        files = image_files(images)
        seen = scan(files, decoding, looking, accelerator)
        if seen.broken:
            raise unreadable(seen.broken, len(files), "repair or delete them: eval leaves out none")
        if seen.turned and not decoding.exif:
            notes.append(
                f"{seen.turned:,} of {len(files):,} files carry an EXIF turn, which is not made, as in timm; "
                "--exif makes it"
            )
        with tensor_float32(place, allowed=True):  # as timm's validate.py has it
            part = _ask(
                [everyone[index] for index in todo],
                guide,
                images,
                Tables.together([tables[index] for index in todo]),
                place=place,
                share=(rank, world),
                batch_size=request.batch_size,
                workers=min(request.workers, os.cpu_count() or 1),
                dtype=AUTOCAST[request.mixed_precision],
                keep=(lambda tables: kept.write(todo, tables)) if kept else None,
                each=each,
            )
        if accelerator:
            part.rows, part.seen = accelerator.reduce(part.rows, "sum"), accelerator.reduce(part.seen, "sum")
        if kept and rank == 0:
            kept.write(todo, part, last=True)
        for index, table in zip(todo, part.apart(), strict=True):
            tables[index] = table
    found = [table.metrics(taught=guide is not None) for table in tables]
    for one, metrics in zip(everyone, found, strict=True):
        if not metrics.count:
            raise UserError(f"{data}: the {split} split is empty", "check --data and the split names")
        assert metrics.confidence is not None
        if bad := int(metrics.confidence.isnan().sum()):
            raise UserError(
                f"the logits of {one.built.spec.name} are not numbers on {bad} of {metrics.count} images",
                "--mixed-precision no, or weights of a training that did not diverge",
                exit_code=3,
            )
    one_order = {one.match.names for one in subjects}
    return Evaluations(
        models=tuple(
            Evaluation(
                model=one.built.spec.name,
                data=data,
                metrics=metrics,
                preprocessing=one.config,
                parameters=one.built.parameters,
                classes=(one.scored, one.own),
                kept=index not in todo,
                teacher=found[-1] if guide else None,
                built=one.built,
                net=one.net,
            )
            for index, (one, metrics) in enumerate(zip(subjects, found, strict=False))
        ),
        names=one_order.pop() if len(one_order) == 1 else tuple(names or ()),
        images=None if isinstance(images, IterableImages) else images,
        teacher=guide.built.spec.name if guide else None,
        notes=tuple(
            dict.fromkeys(
                [
                    *chosen.notes,
                    *(f"{one.built.spec.name}: {note}" for one in everyone for note in one.built.notes),
                    *notes,
                    *(one.match.note for one in everyone if one.match.note),
                ]
            )
        ),
        about=chosen.about,
    )


def _subject(typed: str, built: Model, match: Match, request: EvalRequest, place: torch.device) -> _Subject:
    """A built model on its device, with the view that it takes of images."""
    own = built.spec.num_classes
    settings = ("img_size", "use_train_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    built = built.prepared(**{key: getattr(request, key) for key in settings})
    config = built.preprocessing
    net, pooled = _test_pooled(built, config) if request.test_time_pool else (built.net, False)
    view = {key: config[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")}
    view["mean"] = config["mean"] if config["crop_mode"] == "border" else (0.0,)  # else no pixel shows it
    if pooled:
        view["crop_pct"] = 1.0
    return _Subject(typed, built, net.to(place).eval(), config, view, match, own)


@torch.inference_mode()
def _ask(
    subjects: Sequence[_Subject],
    guide: _Subject | None,
    images: Images,
    known: Tables,
    *,
    place: torch.device,
    share: tuple[int, int],
    batch_size: int,
    workers: int,
    dtype: torch.dtype | None,
    keep: Callable[[Tables], None] | None,
    each: Callable[[int, int], None],
) -> Tables:
    """Let every subject answer the images that ``known`` lacks; each is decoded once.

    Args:
        share: rank and number of the processes that divide the images.
        dtype: of autocast.
        keep: told from time to time what has been answered.
    """
    (rank, world), total = share, len(images)
    views: list[dict[str, Any]] = []
    for one in subjects:
        if one.view not in views:
            views.append(one.view)
    left = (known.seen == 0).nonzero()[:, 0]
    # what is known already is one process's to bring in, for the processes' tables are added up
    tables = known.to(place) if rank == 0 else Tables(len(subjects), total, place)
    stream = isinstance(images, IterableImages)
    loader = val_loader(
        images if stream else Selection(images, left.tolist()),
        Views([view_of(view) for view in views]),
        batch_size,
        rank=rank,
        world=world,
        workers=workers,
        pin_memory=place.type == "cuda",
    )
    done, saved = total - len(left), time.monotonic()
    try:
        for pictures, labels, indices in loader:
            if stream:
                _are_classes(labels, subjects)
            seen = [in_unit_range(picture, place) for picture in pictures]
            with torch.autocast(place.type, dtype=dtype, enabled=dtype is not None):
                scores = [one.logits(seen[views.index(one.view)]) for one in subjects]
            taught = scores[subjects.index(guide)] if guide else None
            truth = labels.to(place)
            tables.put(indices if stream else left[indices], [answers(s, truth, taught) for s in scores])
            done += len(labels) * world
            each(min(done, total), total)
            if keep and time.monotonic() - saved > _KEEP_EVERY:
                keep(tables)
                saved = time.monotonic()
    except BaseException:  # Ctrl-C, an unreadable image: what was answered is not lost
        if keep:
            keep(tables)
        raise
    return tables


def _are_classes(labels: Tensor, subjects: Sequence[_Subject]) -> None:
    """Refuse labels outside a model's classes, as there may be where the data names none."""
    if int(labels.min()) < 0:
        raise UserError("the data has images without a label", "see --target-key")
    fewest = min(subjects, key=lambda one: one.scored)
    if (highest := int(labels.max())) >= fewest.scored:
        raise UserError(
            f"the data has a class {highest}, and {fewest.built.spec.name} has {fewest.scored}, from 0",
            "score a model of these classes, or name the data's with --class-map",
        )


def _test_pooled(built: Model, config: dict[str, Any]) -> tuple[nn.Module, bool]:
    """timm's pooling of a bigger image's map, where timm does it."""
    from timm.layers import apply_test_time_pool

    with torch.inference_mode():
        net, pooled = apply_test_time_pool(copy.deepcopy(built.net), config)
        try:
            net.eval()(torch.zeros(1, *config["input_size"]))
        except (RuntimeError, TypeError, AttributeError) as problem:
            raise UserError(
                f"timm's test-time pooling does not fit {built.spec.name}: its head pools no map",
                "leave out --test-time-pool",
            ) from problem
    return net, bool(pooled)


def reassessed(found: Evaluations, file: str) -> list[tuple[float, float]]:
    """Top-1 and top-5, percent, of each model by ImageNet's reassessed labels.

    An image may have several of them; those without any are left out (Beyer et al. 2020, arXiv:2006.07159).

    Args:
        file: ``real.json``, a list of labels for each validation image; ``timm`` for timm's own.
    """
    try:
        text = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json") if file == "timm" else None
        real = json.loads(text if text is not None else expanded(file).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as problem:
        raise UserError(
            f"--real-labels: cannot read {file}: {first_line(problem)}", "--real-labels timm, or a real.json"
        ) from None
    numbers = [re.search(r"ILSVRC2012_val_(\d{8})", path) for path in found.paths]
    if not numbers or None in numbers:
        raise UserError(
            "--real-labels needs ImageNet's validation images under their own names",
            "ILSVRC2012_val_00000001.JPEG and so on",
        )
    index = {name: number for number, name in enumerate(ImageNetInfo("imagenet-1k").label_names())}
    own = [index.get(name, number) for number, name in enumerate(found.names)] or list(range(len(index)))
    if strange := [name for name in found.names if name not in index and len(own) != len(index)]:
        raise UserError(
            f"--real-labels: {listed(strange)} are no synsets, and ImageNet's order is not theirs",
            "name the class folders n01440764 and so on",
        )
    truth = [set(real[int(number[1]) - 1]) for number in numbers if number]
    scores = []
    for one in found.models:
        hits = [
            [own[c] in labels if c >= 0 else False for c in row]
            for row, labels in zip(one.metrics.ranked.tolist(), truth, strict=True)
            if labels
        ]
        scores.append(tuple(100 * sum(any(row[:k]) for row in hits) / max(1, len(hits)) for k in (1, 5)))
    return scores  # type: ignore[return-value]
