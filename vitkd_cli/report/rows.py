"""The models of a run side by side: size, cost, accuracy, calibration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from vitkd_cli.evaluation.statistics import MIN_SEEDS, Calibration, spread
from vitkd_cli.report.found import FoundRun
from vitkd_cli.report.opened import Opened, OpenedModel
from vitkd_cli.report.tables import in_macs
from vitkd_cli.text import without_places
from vitkd_cli.training import Result


@dataclass(frozen=True)
class ModelRow:
    """A model, or all students of an arm.

    Attributes:
        number: the arm's; None for a teacher.
        cells: by the title of their column; ``–`` where nothing is known.
        calibration: of the first student's answers.
    """

    title: str
    number: int | None
    cells: dict[str, str]
    calibration: Calibration | None = None


def model_rows(found: FoundRun, opened: Opened, before: str) -> list[ModelRow]:
    """The teachers, then the arms.

    Args:
        before: every teacher's title, where the page has several runs.
    """
    rows = []
    for number, result in enumerate((found.run.teacher, *found.run.more_teachers)):
        if result is not None:
            title = before + without_places(result.arm)
            rows.append(_row(title, None, [result], opened.teacher if number == 0 else None))
    for arm in found.arms:
        if arm.results:
            rows.append(_row(arm.title, arm.number, arm.results, opened.student))
    return rows


def _row(title: str, number: int | None, results: Sequence[Result], opened: OpenedModel | None) -> ModelRow:
    first = results[0]
    metrics = first.metrics
    sure = metrics.calibration if metrics is not None and metrics.confidence is not None else None
    cells = {
        "students": str(len(results)) if number is not None else "–",
        "parameters": f"{first.parameters / 1e6:.2f} M",
        "multiply-adds": _or_none(opened, lambda it: in_macs(it.multiply_adds)),
        "weights": _or_none(opened and opened.weights, lambda size: f"{size / 1e6:.2f} MB"),
        "latency": _or_none(opened, lambda it: f"{it.latency:.1f} ms"),
        "images/s": _or_none(first.images_per_second, lambda it: f"{it:,.0f} at {first.speed_batch}"),
        "top-1 (95 %)": top1_cell(results),
        "top-5": _mean(results, "top5"),
        "agrees": _or_none(_mean(results, "agreement"), lambda it: it if it == "–" else f"{it} %"),
        "ECE (chance)": _or_none(sure, lambda it: f"{it.ece:.1f} ({it.by_chance:.1f})"),
    }
    return ModelRow(title, number, cells, sure)


def _or_none(value: Any, shown: Callable[[Any], str]) -> str:
    return "–" if value is None else shown(value)


def _mean(results: Sequence[Result], key: str) -> str:
    values = [value for result in results if (value := getattr(result, key)) is not None]
    return f"{fmean(values):.2f}" if values else "–"


def top1_cell(results: Sequence[Result]) -> str:
    """The mean with its interval: over seeds, of which two are too few, or of a single model over images."""
    values = [result.top1 for result in results if result.top1 is not None]
    if not values:
        return "–"
    if len(values) >= MIN_SEEDS:
        (mean,), (reach,) = spread([values])
        low, high = max(0.0, mean - reach), min(100.0, mean + reach)
    elif len(values) == 1 and (interval := results[0].top1_interval):
        mean, (low, high) = values[0], interval
    else:
        return f"{fmean(values):.2f}"
    return f"{mean:.2f} ({low:.1f}–{high:.1f})"


def columns_of(rows: Sequence[ModelRow]) -> list[str]:
    """The titles of the columns for which some model has something."""
    titles = dict.fromkeys(title for row in rows for title in row.cells)
    return [title for title in titles if any(row.cells[title] != "–" for row in rows)]
