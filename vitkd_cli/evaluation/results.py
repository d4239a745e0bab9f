"""What an evaluation gives: each model's metrics, and what follows from the answers of all."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from timm.data import ImageNetInfo, RealLabelsImagenet

from vitkd_cli.data.images import Images
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.evaluation.cost import Cost
from vitkd_cli.evaluation.metrics import Metrics
from vitkd_cli.evaluation.statistics import Comparison, compare, spread
from vitkd_cli.evaluation.writing import write_table
from vitkd_cli.text import html_table, listed
from vitkd_cli.vit.classes import Match
from vitkd_cli.vit.model import Model


def scored_classes(model: Model, match: Match) -> int:
    """How many of a model's classes the data may have."""
    return model.spec.num_classes if match.indices is None else len(match.indices)


@dataclass(frozen=True)
class Judge:
    """What judged a model's embeddings in place of its head.

    Attributes:
        name: ``k-NN`` or ``linear``.
        bank: training images that it knew.
        classes: of these.
        c: that the linear classifier was fitted with.
        few_shot: images per class → top-1, percent, of each draw of so many.
    """

    name: str
    bank: int
    classes: int
    c: float | None = None
    few_shot: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def shots(self, count: int) -> tuple[float, float]:
        """Mean top-1 over the draws, and half its 95 % interval."""
        [mean], [reach] = spread([self.few_shot[count]])
        return mean, reach


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics, with the preprocessing that they hold for.

    Attributes:
        built: the model, on its device.
        match: its classes beside the data's.
        data: what was scored on.
        metrics: on every image that was counted.
        cached: the answers are an earlier call's, read back from its output folder.
        teacher: the metrics of the teacher on the same images.
        real: top-1 and top-5, percent, by reassessed labels (:func:`reassessed`).
        cost: where it was measured (:func:`vitkd_cli.evaluation.cost.measure_cost`).
        judge: of its embeddings; None where its own head answered.
    """

    built: Model
    match: Match
    data: str
    metrics: Metrics
    cached: bool = False
    teacher: Metrics | None = None
    real: tuple[float, float] | None = None
    cost: Cost | None = None
    judge: Judge | None = None

    @property
    def called(self) -> str:
        """The model, and what judged it if that is not its head."""
        return f"{self.model} ({self.judge.name})" if self.judge else self.model

    @property
    def model(self) -> str:
        """How its weights are called."""
        return self.built.spec.name

    @property
    def preprocessing(self) -> dict[str, Any]:
        """timm's data configuration."""
        return self.built.preprocessing

    @property
    def parameters(self) -> int:
        """How many it has."""
        return self.built.parameters

    @property
    def classes(self) -> tuple[int, int]:
        """How many were scored, and how many the model has."""
        own = self.built.spec.num_classes
        return (self.judge.classes, own) if self.judge else (scored_classes(self.built, self.match), own)

    def __repr__(self) -> str:
        found = self.metrics
        return (
            f"Evaluation({self.called!r} on {self.data!r}: top-1 {found.top1:.2f} of {found.count:,} images)"
        )

    def _repr_html_(self) -> str:
        metrics = self.metrics
        numbers = [
            f"{value:.3f}" if value is not None else "–"
            for value in (metrics.top1, metrics.top5, metrics.loss)
        ]
        return html_table(
            ["model", "data", "images", "top-1", "top-5", "loss", "parameters"],
            [[self.called, self.data, f"{metrics.count:,}", *numbers, f"{self.parameters:,}"]],
        )


# Of what models said of images (:meth:`Evaluations.predictions`).
COLUMNS: dict[str, type] = {
    "model": str, "image": str, "label": int, "label_name": str, "prediction": int, "prediction_name": str,
    "right": bool, "confidence": float, "label_probability": float,
}  # fmt: skip


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

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every pair of models that are judged alike, by McNemar's exact test."""
        alike: dict[str, list[Any]] = {}
        for one in self.models:
            judge = one.judge.name if one.judge else ""
            alike.setdefault(judge, []).append((one.called, one.metrics.right.numpy()))
        return [pair for models in alike.values() for pair in compare(models)]

    def predictions(self) -> Iterator[dict[str, Any]]:
        """One row per model and image, with the columns of :data:`COLUMNS`."""
        known, paths = dict(enumerate(self.names)), self.paths
        for one in self.models:
            metrics = one.metrics
            for index in range(metrics.count):
                label, first = int(metrics.labels[index]), int(metrics.predictions[index])
                yield {
                    "model": one.called,
                    "image": paths[index] if paths else str(index),
                    "label": label,
                    "label_name": known.get(label),
                    "prediction": first,
                    "prediction_name": known.get(first),
                    "right": label == first,
                    "confidence": None if metrics.confidence is None else float(metrics.confidence[index]),
                    "label_probability": None if metrics.nll is None else float((-metrics.nll[index]).exp()),
                }

    def write_predictions(self, path: Path) -> None:
        """Write what each model said of each image, as ``.parquet`` or ``.csv``."""
        write_table(path, COLUMNS, self.predictions())


def reassessed(found: Evaluations, file: str) -> list[tuple[float, float]]:
    """Top-1 and top-5, percent, of each model by ImageNet's reassessed labels.

    An image may have several of them; those without any are left out (Beyer et al. 2020, arXiv:2006.07159).

    Args:
        file: ``real.json``, a list of labels for each validation image; ``timm`` for timm's own.
    """
    try:
        if file == "timm":
            real = RealLabelsImagenet([""] * 50_000).real_labels
        else:
            labels = json.loads(expanded(file).read_text(encoding="utf-8-sig"))
            real = {f"ILSVRC2012_val_{n:08d}.JPEG": some for n, some in enumerate(labels, 1)}
    except (OSError, ValueError, TypeError) as problem:
        raise UserError(
            f"--real-labels: cannot read {file}: {first_line(problem)}", "--real-labels timm, or a real.json"
        ) from None
    files = [re.search(r"ILSVRC2012_val_\d{8}", path) for path in found.paths]
    if not files or None in files:
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
    known = [f"{name[0]}.JPEG" for name in files if name]
    if lacking := [name for name in known if name not in real]:
        raise UserError(
            f"--real-labels: {file} has no labels for {listed(lacking)}", "--real-labels timm, or a real.json"
        )
    truth = [set(real[name]) for name in known]
    scores = []
    for one in found.models:
        hits = [
            [own[c] in labels if c >= 0 else False for c in row]
            for row, labels in zip(one.metrics.ranked.tolist(), truth, strict=True)
            if labels
        ]
        top1, top5 = (100 * sum(any(row[:k]) for row in hits) / max(1, len(hits)) for k in (1, 5))
        scores.append((top1, top5))
    return scores
