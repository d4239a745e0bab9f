"""The models of a run side by side: size, cost, accuracy, calibration."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vitkd_cli.evaluation.statistics import Calibration
from vitkd_cli.report.found import FoundRun
from vitkd_cli.report.opened import Opened, OpenedModel
from vitkd_cli.report.tables import in_macs, mean_cell, speed_cell, top1_cell
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
        "images/s": speed_cell(first),
        "top-1 (95 %)": top1_cell(results),
        "top-5": mean_cell(results, "top5"),
        "agrees": mean_cell(results, "agreement", " %"),
        "ECE (chance)": _or_none(sure, lambda it: f"{it.ece:.1f} ({it.by_chance:.1f})"),
    }
    return ModelRow(title, number, cells, sure)


def _or_none(value: Any, shown: Callable[[Any], str]) -> str:
    return "–" if value is None else shown(value)


def columns_of(rows: Sequence[ModelRow]) -> list[str]:
    """The titles of the columns for which some model has something."""
    titles = dict.fromkeys(title for row in rows for title in row.cells)
    return [title for title in titles if any(row.cells[title] != "–" for row in rows)]
