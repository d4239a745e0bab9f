"""Validation accuracy over the run, as a picture."""

import re
from pathlib import Path

from vitkd_cli.evaluation.statistics import spread
from vitkd_cli.files import whole_file
from vitkd_cli.training import Run

# Okabe and Ito (2008), which the colour-blind tell apart; the run's own arm first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def curves(run: Run) -> Path:
    """Write ``curves.png``: top-1 by epoch, a line per arm, the mean over seeds in its 95 % interval.

    One or two seeds have no interval.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for number, (arm, results) in enumerate(run.arms.items()):
        colour = COLOURS[number % len(COLOURS)]
        lines = [{entry["epoch"]: entry["top1"] for entry in result.history} for result in results]
        shared = sorted(set.intersection(*map(set, lines)))
        means, reach = spread([[line[epoch] for line in lines] for epoch in shared])
        # Matplotlib hides what begins with "_", and reads what is between "$" as mathematics.
        label = re.sub("^_", " _", arm).replace("$", r"\$")
        if len(lines) > 1:
            label += f" (mean of {len(lines)} seeds{', 95 % interval' if any(reach) else ''})"
        (line,) = axes.plot(shared, means, color=colour, linewidth=2, marker="o", markersize=3)
        line.set_label(label)
        low, high = ([m + sign * r for m, r in zip(means, reach, strict=True)] for sign in (-1, 1))
        axes.fill_between(shared, low, high, color=colour, alpha=0.15, linewidth=0)
    if run.teacher and run.teacher.top1 is not None:
        axes.axhline(run.teacher.top1, color="#555555", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="epoch", ylabel="top-1 on the validation split (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")
    path = run.folder / "curves.png"
    with whole_file(path) as beside:
        figure.savefig(beside)
    plt.close(figure)
    return path
