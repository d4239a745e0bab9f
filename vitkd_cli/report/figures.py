"""Figures for the page: SVG with text that can be selected, in colours that the page decides."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from vitkd_cli.evaluation.contrasts import Contrast
from vitkd_cli.evaluation.statistics import Calibration
from vitkd_cli.plots import COLOURS, banded_line
from vitkd_cli.report.logs import Curve

if TYPE_CHECKING:  # a run's first update does not wait for it
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# They stand for the colours of the page, which differ in the dark.
INK, SOFT, RULE, CARD = "#010101", "#020202", "#030303", "#040404"
_SHADES = ["#050505" if shade == "#000000" else shade for shade in COLOURS]  # matplotlib leaves black unsaid
_WIDE = 3.9  # inches: at 390 pixels a figure is drawn about as large as it is written
_SMALL = 8.5
_LONG = 36  # letters of an arm's name beside its difference; the table has it whole
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vitkd",
    "text.parse_math": False,  # an arm's name may hold dollars
    "font.size": _SMALL,
    "text.color": INK,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": RULE,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.labelcolor": SOFT,
    "grid.color": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@dataclass(frozen=True)
class Chart:
    """A figure, with its points for the pointer: None where there is nothing to point at.

    Attributes:
        points: ``box``, the axes' left, top, width and height as shares of the figure; ``x``, its limits;
            ``lines``, each with its ``arm``'s number, its ``x``, ``y`` and ``reach``.
        term: as its curve has it.
    """

    title: str
    svg: Markup
    points: dict[str, Any] | None = None
    term: bool = False


def colour(number: int) -> str:
    return _SHADES[number % len(_SHADES)]


def drawn_curve(curve: Curve, name: str) -> Chart:
    """A quantity over the epochs."""
    with _styled():
        figure, axes = _axes(2.3)
        for line in curve.lines:
            marker = "o" if len(line.x) < 25 else ""
            shade = colour(line.number)
            style = {"color": shade, "linewidth": 1.6, "marker": marker, "markersize": 2.5}
            for part in banded_line(axes, line.x, line.mean, line.reach, **style):
                part.set_gid(f"arm{line.number}")
        values = [value for line in curve.lines for value in line.mean]
        room = max(values) - min(values)  # a few seeds' intervals may be wider than all that is to be seen
        if room:
            bottom, top = axes.get_ylim()
            axes.set_ylim(max(bottom, min(values) - 0.6 * room), min(top, max(values) + 0.6 * room))
        if curve.term and min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_xlabel("epoch")
        svg = _inline(figure, name, curve.title)
        box, limits = axes.get_position(), axes.get_xlim()
    points = {
        "box": [round(number, 4) for number in (box.x0, 1 - box.y1, box.width, box.height)],
        "x": [float(limit) for limit in limits],
        "lines": [
            {"arm": line.number, **{key: [_short(v) for v in getattr(line, key)] for key in ("x", "reach")}}
            | {"y": [_short(value) for value in line.mean]}
            for line in curve.lines
        ],
    }
    return Chart(curve.title, svg, points, curve.term)


def forest(found: Sequence[tuple[str, int, Contrast]], name: str) -> Chart:
    """Each difference with its interval: over seeds thick, on other images like these thin.

    Args:
        found: what the difference is called, the colour of the arm that is compared with, the difference.
    """
    title = "Differences in top-1, points, with 95 % intervals"
    with _styled():
        figure, axes = _axes(0.75 + 0.52 * len(found), left=0.12)
        axes.axvline(0, color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)))
        for row, (label, number, one) in enumerate(found):
            shade = colour(number)
            if one.wider:
                axes.plot(one.wider, [row, row], color=shade, linewidth=1, solid_capstyle="butt")
            if one.claims:
                ends = [one.found.low, one.found.high]
                axes.plot(ends, [row, row], color=shade, linewidth=3, solid_capstyle="butt")
            axes.plot([one.found.mean], [row], color=shade, marker="o", markersize=6)
            axes.annotate(
                f"{one.found.mean:+.2f}  {label if len(label) < _LONG else f'{label[:_LONG]}…'}",
                (0.01, row - 0.34),
                xycoords=("axes fraction", "data"),
                va="center",
                bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.5},
            )
        axes.set_ylim(len(found) - 0.6, -0.62)
        axes.set_yticks([])
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.04 * (high - low)), max(high, 0.04 * (high - low)))
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("points of top-1")
        return Chart(title, _inline(figure, name, title))


def reliability_chart(found: Sequence[tuple[int | None, Calibration]], name: str) -> Chart:
    """Accuracy over confidence of each model's first student; the teacher has no number."""
    title = "Accuracy by confidence (%), in bins of equal mass"
    with _styled():
        figure, axes = _axes(2.9)
        axes.plot([0, 100], [0, 100], color=SOFT, linewidth=0.8, linestyle=(0, (3, 3)))
        for number, bins in found:
            shade = SOFT if number is None else colour(number)
            x, y = 100 * bins.confidence, 100 * bins.accuracy
            [drawn] = axes.plot(x, y, color=shade, linewidth=1.4, marker="o", markersize=3)
            if number is not None:
                drawn.set_gid(f"arm{number}")
        axes.set(xlim=(0, 101), ylim=(0, 101), xlabel="confidence of the answer (%)")
        return Chart(title, _inline(figure, name, title))


def in_page_style(draw: Callable[[], Figure | None], name: str, title: str) -> Chart | None:
    """A figure that is drawn elsewhere, in the page's style and colours; None where there is none."""
    with _styled():
        figure = draw()
        return None if figure is None else Chart(title, _inline(figure, name, title))


def _styled() -> AbstractContextManager[None]:
    from matplotlib import rc_context

    return rc_context(_STYLE)


def _axes(height: float, left: float = 0.5) -> tuple[Figure, Axes]:
    """Axes in a figure of so many inches; finding its margins would take longer than drawing it."""
    from matplotlib.figure import Figure

    figure = Figure((_WIDE, height))
    axes = figure.add_axes((left / _WIDE, 0.42 / height, 1 - (left + 0.12) / _WIDE, 1 - 0.6 / height))
    axes.grid(alpha=0.5, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4))
    return figure, axes


def _inline(figure: Figure, name: str, title: str) -> Markup:
    """The figure as an element of the page.

    Args:
        name: before every id, which are unique in a page.
    """
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.S)
    svg = re.sub(r'id="arm(\d+)[^"]*"', r'data-arm="\1"', svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)  # it is as wide as its place
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    for shade, variable in ((INK, "--ink"), (SOFT, "--soft"), (RULE, "--rule"), (CARD, "--card")):
        svg = svg.replace(shade, f"var({variable})")
    for number, shade in enumerate(_SHADES):
        svg = svg.replace(f" {shade}", f" var(--arm{number})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1))


def _short(value: float) -> float:
    return float(f"{value:.5g}")
