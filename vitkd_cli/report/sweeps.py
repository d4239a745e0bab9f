"""A sweep as a table and as pictures."""

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.statistics import MIN_SEEDS, spread
from vitkd_cli.files import CannotWrite
from vitkd_cli.plots import COLOURS, DPI, plain_axes, write_figure
from vitkd_cli.sweeps import Outcome, Sweep
from vitkd_cli.sweeps.points import Axis, number, written
from vitkd_cli.sweeps.run import resuming_sweep
from vitkd_cli.terminal import Fitted
from vitkd_cli.text import plain, without_places
from vitkd_cli.training import Reporter
from vitkd_cli.training.folder import known

_MOST = 30  # rows on a terminal
_DECADES = 20  # values that span as much are drawn on a logarithmic axis
_POINT, _DEFAULT, _ALONE = COLOURS[0], COLOURS[1], "#555555"


def report_sweep(found: Sweep, reporter: Reporter) -> None:
    """Show table and sentence, and draw ``sweep.png`` and ``sweep.svg``.

    Raises:
        UserError: some points failed; it names each with its last words.
    """
    reporter.show(sweep_table(found))
    if len(found.outcomes) > _MOST:
        reporter.say(f"and {len(found.outcomes) - _MOST} more in sweep.csv")
    reporter.say(found.sentence())
    try:
        if pictures := sweep_pictures(found):
            reporter.say(f"picture  {pictures[0]}")
    except CannotWrite as problem:
        reporter.warn(problem.message)
    reporter.say(f"table    {found.folder / 'sweep.csv'}")
    if found.failed:
        raise UserError(
            f"{len(found.failed)} of {len(found.outcomes)} points failed",
            f"their logs lie in {found.folder / 'points'}; {resuming_sweep(found.folder)} tries them again",
            exit_code=3,
            details=[f"{name}: {words}" for name, words in found.failed.items()],
        )


def sweep_table(found: Sweep, most: int | None = _MOST) -> Fitted:
    """The points, best first, as many as a terminal shows."""
    unfinished = any(not one.finished for one in found.outcomes)
    titles = [*(axis.name for axis in found.axes), "top-1", "seeds", "− default", "95 % interval", "p (Holm)"]
    titles += ["verdict", *(["status"] if unfinished else [])]
    rows = []
    for one in found.outcomes[:most]:
        beside = one.against
        row = [written(one.point.values[axis.name]) for axis in found.axes]
        row += [one.mean_cell, str(len(one.top1) or "–")]
        row.append("default" if one.point.default else f"{beside.found.mean:+.2f}" if beside else "–")
        row += [beside.interval, beside.significance, beside.verdict or "–"] if beside else ["–"] * 3
        rows.append([*row, *([one.status] if unfinished else [])])
    default = found.default.results
    images = f"{default[0].images:,} images" if default and default[0].images else "images"
    title = f"on these {images}: mean over seeds ± half of its 95 % interval"
    return Fitted(titles, rows, title=title, spare=("95 % interval", "seeds", "p (Holm)"))


# Pictures ---------------------------------------------------------------------------------------------


def sweep_pictures(found: Sweep) -> list[Path]:
    """Write ``sweep.png`` and ``sweep.svg``: a curve for one axis, a heat map for two, else a panel for each.

    Returns:
        Their paths; none if no point has come to its end.
    """
    import matplotlib

    figure = sweep_figure(found)
    if figure is None:
        return []
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sweep"}):
        paths = [found.folder / "sweep.png", found.folder / "sweep.svg"]
        for path in paths:
            write_figure(figure, path, **({"metadata": {"Date": None}} if path.suffix == ".svg" else {}))
    return paths


def sweep_figure(found: Sweep) -> Any:
    """What :func:`sweep_pictures` writes, as matplotlib's figure; None if no point has come to its end."""
    shown = [one for one in found.outcomes if one.finished and one.mean is not None]
    if not shown:
        return None
    return _heat_map(found, shown) or _panels(found, shown)


def _panels(found: Sweep, shown: Sequence[Outcome]) -> Any:
    from matplotlib.figure import Figure

    columns = min(3, len(found.axes))
    rows = -(-len(found.axes) // columns)
    size = (7, 4.2) if len(found.axes) == 1 else (4.2 * columns, 3.6 * rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for place, (axis, axes) in enumerate(zip(found.axes, grid.flat, strict=False)):
        _panel(axes, axis, shown, found, first=place % columns == 0)
    for axes in grid.flat[len(found.axes) :]:
        axes.remove()
    grid.flat[0].legend(frameon=False, fontsize=8)
    return figure


def _panel(axes: Any, axis: Axis, shown: Sequence[Outcome], found: Sweep, first: bool) -> None:
    """Accuracy over one axis: each point with its interval, and a line through the means."""
    alone = len(found.axes) == 1
    here = [one for one in shown if one.point.values[axis.name] is not None]
    place, ticks = _places(here, axis)
    values = sorted({place(one) for one in here})
    groups = [[one.mean or 0.0 for one in here if place(one) == value] for value in values]
    if not ticks or not alone:
        axes.plot(values, [fmean(group) for group in groups], color=_POINT, linewidth=1.5, alpha=0.8)
    for colour, some, label in (
        (_POINT, [one for one in here if not one.point.default], "a point"),
        (_DEFAULT, [one for one in here if one.point.default], "the default"),
    ):
        if some:
            axes.errorbar(
                [place(one) for one in some],
                [one.mean for one in some],
                [one.reach or 0.0 for one in some],
                fmt="o",
                color=colour,
                markersize=5,
                capsize=3,
                linewidth=1,
                label=f"{label}{_seeds(some)}",
                zorder=3,
            )
    _lines(axes, found, default_too=not any(one.point.default for one in here))
    if ticks:
        axes.set_xticks(range(len(ticks)), ticks)
    elif min(values) > 0 and max(values) / min(values) >= _DECADES:
        axes.set_xscale("log")
    axes.set(xlabel=plain(axis.name), ylabel="top-1 on the validation split (%)" if first else "")
    plain_axes(axes)


def _places(shown: Sequence[Outcome], axis: Axis) -> tuple[Callable[[Outcome], float], list[str]]:
    """Where a point lies on an axis: at its number, or in its value's column."""
    numbers = [number(one.point.values[axis.name]) for one in shown]
    if None not in numbers:
        return lambda one: number(one.point.values[axis.name]) or 0.0, []
    columns = _in_order(shown, axis)
    return lambda one: columns.index(one.point.values[axis.name]), [_short(value) for value in columns]


def _in_order(shown: Sequence[Outcome], axis: Axis) -> list[Any]:
    """The values that occur, numbers by size, others as they were written."""
    values = list(dict.fromkeys(one.point.values[axis.name] for one in shown))
    if all(number(value) is not None for value in values):
        return sorted(values, key=lambda value: number(value) or 0.0)
    known = list(axis.values)
    return sorted(values, key=lambda value: known.index(value) if value in known else len(known))


def _short(value: Any) -> str:
    text = plain(without_places(written(value)))
    return text if len(text) <= 24 else f"{text[:23]}…"


def _seeds(some: Sequence[Outcome]) -> str:
    counts = {len(one.top1) for one in some}
    interval = ", 95 % interval" if max(counts) >= MIN_SEEDS else ""
    return f" (mean of {max(counts)} seeds{interval})" if counts != {1} else ""


def _lines(axes: Any, found: Sweep, default_too: bool) -> None:
    """The baseline without a teacher, and the default where it has no place on the axis."""
    default = found.default
    if default_too and default.finished and default.mean is not None:
        axes.axhline(default.mean, color=_DEFAULT, linestyle=":", linewidth=1.2, label="the default")
    alone = default.run.arms.get("alone", []) if default.run else []
    if scores := known(alone):
        (mean,), (reach,) = spread([scores])
        axes.axhline(mean, color=_ALONE, linestyle="--", linewidth=1, label="without a teacher")
        axes.axhspan(mean - reach, mean + reach, color=_ALONE, alpha=0.1, linewidth=0)


def _heat_map(found: Sweep, shown: Sequence[Outcome]) -> Any:
    """Means on a grid of two axes; None for other axes, and where most of the grid is empty."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    shown = [one for one in shown if None not in one.point.values.values()]
    if len(found.axes) != 2:
        return None
    across, down = found.axes
    columns, rows = _in_order(shown, across), _in_order(shown, down)
    if 2 * len(shown) <= len(columns) * len(rows):
        return None
    figure = Figure((2.6 + 1.2 * len(columns), 1.8 + 0.75 * len(rows)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    means = np.full((len(rows), len(columns)), np.nan)
    places = [
        (rows.index(v[down.name]), columns.index(v[across.name])) for v in (o.point.values for o in shown)
    ]
    for place, one in zip(places, shown, strict=True):
        means[place] = one.mean
    drawn = axes.imshow(means, cmap="viridis", aspect="auto", origin="lower")
    middle = (np.nanmin(means) + np.nanmax(means)) / 2
    for (row, column), one in zip(places, shown, strict=True):
        colour = "black" if means[row, column] > middle else "white"
        text = one.mean_cell.replace(" ±", "\n±")
        axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
        if one.point.default:
            frame: dict[str, Any] = {"fill": False, "edgecolor": _DEFAULT, "linewidth": 2}
            axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, **frame))
    axes.set_xticks(range(len(columns)), [_short(value) for value in columns])
    axes.set_yticks(range(len(rows)), [_short(value) for value in rows])
    axes.set(xlabel=plain(across.name), ylabel=plain(down.name))
    said = "framed: the default"
    if not any(one.point.default for one in shown):
        said = f"the default: {found.default.mean_cell}" if found.default.mean is not None else ""
    axes.set_title(said, fontsize=9)
    figure.colorbar(drawn, label="top-1 on the validation split (%)")
    return figure
