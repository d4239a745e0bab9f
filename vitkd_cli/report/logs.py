"""What ``log.jsonl`` says over the course of a training: a curve per quantity and arm."""

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkd_cli.evaluation.statistics import MIN_SEEDS, spread
from vitkd_cli.report.found import FoundArm
from vitkd_cli.text import without_places

MOST = 400  # lines kept of a log, whatever its length
_TITLES = {
    "top1": "Top-1 on the validation images (%)",
    "loss": "Objective: all terms, weighted",
    "images_per_second": "Training images per second",
    "data_wait": "Share of the time spent waiting for images",
    "lr": "Learning rate",
    "grad_norm": "Norm of the gradient before clipping",
}
_OF_A_TERM = {
    "": "raw",
    "/weighted": "weighted",
    "/weight": "weight",
    "/grad_share": "share of the gradient",
}
_NO_CURVE = {"update", "epoch", "time", "event", "clip_factor", "skipped_images", "top5"}
Points = dict[str, list[tuple[float, float]]]  # of one student: quantity → (epoch, value)


@dataclass(frozen=True)
class Line:
    """An arm's values by epoch: the mean over its seeds, and half its 95 % interval, 0 below three seeds."""

    number: int
    x: Sequence[float]
    mean: Sequence[float]
    reach: Sequence[float]


@dataclass(frozen=True)
class Curve:
    """One quantity over the epochs, a line per arm.

    Attributes:
        term: it is of one term, not of the whole objective or of the machine.
    """

    title: str
    lines: Sequence[Line]
    term: bool = False


def curves_of(arms: Sequence[FoundArm]) -> list[Curve]:
    """Every quantity that the logs of these arms hold: of the whole run first, then of each term."""
    lines: dict[str, list[Line]] = defaultdict(list)
    for arm in arms:
        seeds = [_points(folder / "log.jsonl") for folder in arm.folders]
        for key in dict.fromkeys(key for points in seeds for key in points):
            if line := _mean(arm.number, [points[key] for points in seeds if points.get(key)]):
                lines[key].append(line)
    terms = [key.removesuffix("/weighted") for key in lines if key.endswith("/weighted")]
    whole = [key for key in (*_TITLES, *lines) if key in lines and key.partition("/")[0] not in terms]
    curves = [Curve(_TITLES.get(key) or _in_words(key), lines[key]) for key in dict.fromkeys(whole)]
    for term in terms:
        same = lines[term] == lines[f"{term}/weighted"]  # its weight is 1 throughout
        for key, title in _OF_A_TERM.items():
            if (of := lines.get(f"{term}{key}")) and not (same and key == "/weighted"):
                told = f"{title} and weighted" if same and not key else title
                curves.append(Curve(f"{without_places(term)}, {told}", of, term=True))
    return curves


def _in_words(key: str) -> str:
    return without_places(key).replace("_", " ")


def _points(log: Path) -> Points:
    points: Points = defaultdict(list)
    for line in _thinned(log):
        validation = line.get("event") == "validation"
        for key, value in line.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or key in _NO_CURVE:
                continue
            if not validation or key == "top1":
                points[key].append((float(line["epoch"]), float(value)))
    return points


def _thinned(log: Path) -> Iterator[dict[str, Any]]:
    """The lines of each kind, about evenly spaced where there are many; a damaged one is passed over."""
    kept: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    step: dict[Any, int] = defaultdict(lambda: 1)
    seen: dict[Any, int] = defaultdict(int)
    per_epoch = None
    with open(log, "rb") as file:
        for text in file:
            try:
                line = json.loads(text)
                kind, update = line.get("event"), float(line["update"])
                per_epoch = update / line["epoch"] if line.get("epoch") else per_epoch
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if seen[kind] % step[kind] == 0:
                kept[kind].append(line)
            seen[kind] += 1
            if len(kept[kind]) > 2 * MOST:
                kept[kind] = kept[kind][::2]
                step[kind] *= 2
    for line in (line for lines in kept.values() for line in lines):
        if per_epoch:  # a line about gradients has its update alone
            yield {"epoch": line["update"] / per_epoch, **line}


def _mean(number: int, seeds: Sequence[Sequence[tuple[float, float]]]) -> Line | None:
    """The mean over seeds, where all have values; between two of a seed's own lines on the straight line."""
    start, end = max(points[0][0] for points in seeds), min(points[-1][0] for points in seeds)
    grid = [x for x, _ in min(seeds, key=len) if start <= x <= end]
    if not grid:
        return None
    arrays = [np.array(points) for points in seeds]  # [points, 2]
    values = [np.interp(np.array(grid), points[:, 0], points[:, 1]) for points in arrays]
    mean, reach = spread(list(zip(*values, strict=True)))
    return Line(number, grid, mean, reach if len(seeds) >= MIN_SEEDS else [0.0] * len(grid))
