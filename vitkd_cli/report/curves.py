"""Validation accuracy over the run, as a picture."""

from pathlib import Path

from vitkd_cli.files import whole_file
from vitkd_cli.training import Run

COLOURS = {"distilled": "#1b6ca8", "alone": "#d1742f", "student": "#1b6ca8"}


def curves(run: Run) -> Path:
    """Write ``curves.png``: top-1 by epoch, one thin line per seed and a thick one for their mean."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for arm in dict.fromkeys(result.arm for result in run.results):
        colour = COLOURS.get(arm, "#444444")
        lines = [
            {entry["epoch"]: entry["top1"] for entry in result.history}
            for result in run.results
            if result.arm == arm
        ]
        for line in lines:
            axes.plot(list(line), list(line.values()), color=colour, alpha=0.3, linewidth=1)
        shared = sorted(set.intersection(*map(set, lines)))
        means = [sum(line[epoch] for line in lines) / len(lines) for epoch in shared]
        label = arm if len(lines) == 1 else f"{arm} (mean of {len(lines)} seeds)"
        axes.plot(shared, means, color=colour, linewidth=2.2, marker="o", markersize=3, label=label)
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
