"""Validation accuracy over the run, as a picture."""

from pathlib import Path

from vitkd_cli.evaluation.statistics import spread
from vitkd_cli.plots import COLOURS, banded_line, figure_in, plain_axes
from vitkd_cli.training import Run


def curves(run: Run) -> Path:
    """Write ``curves.png``: top-1 by epoch, a line per arm, the mean over seeds in its 95 % interval.

    One or two seeds have no interval.
    """
    path = run.folder / "curves.png"
    with figure_in(path, (7, 4.2)) as figure:
        axes = figure.add_subplot()
        for number, (arm, results) in enumerate(run.arms.items()):
            lines = [{entry["epoch"]: entry["top1"] for entry in result.history} for result in results]
            shared = sorted(set.intersection(*map(set, lines)))
            means, reach = spread([[line[epoch] for line in lines] for epoch in shared])
            label = f" {arm}" if arm.startswith("_") else arm  # matplotlib hides what begins with "_"
            if len(lines) > 1:
                label += f" (mean of {len(lines)} seeds{', 95 % interval' if any(reach) else ''})"
            style = {"linewidth": 2, "marker": "o", "markersize": 3, "color": COLOURS[number % len(COLOURS)]}
            banded_line(axes, shared, means, reach, label=label, **style)
        if run.teacher and run.teacher.top1 is not None:
            axes.axhline(run.teacher.top1, color="#555555", linestyle="--", linewidth=1, label="teacher")
        axes.set(xlabel="epoch", ylabel="top-1 on the validation split (%)")
        plain_axes(axes)
        axes.legend(frameon=False, loc="lower right")
    return path
