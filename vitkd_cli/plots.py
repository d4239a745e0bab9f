"""Figures of matplotlib as whole files, and what lines in all of them look like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vitkd_cli.files import whole_file

if TYPE_CHECKING:  # a run's first update does not wait for it
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008), which the colour-blind tell apart; the run's own arm first.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")

DPI = 150


@contextmanager
def figure_in(
    path: Path,
    size: tuple[float, float],
    *,
    layout: Literal["constrained"] | None = "constrained",
    **saved: Any,
) -> Iterator[Figure]:
    """A figure of so many inches to draw into, which then is written.

    Args:
        layout: who finds room for labels: matplotlib's "constrained", or nobody.
        saved: options of matplotlib's ``savefig``.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"text.parse_math": False}):  # the name of a file or an arm may hold dollars
        figure = Figure(size, dpi=DPI, layout=layout)
        yield figure
        write_figure(figure, path, **saved)


def write_figure(figure: Figure, path: Path, **saved: Any) -> None:
    """Write a figure as a whole file."""
    with whole_file(path) as beside:
        figure.savefig(beside, **saved)


def plain_axes(axes: Axes) -> None:
    """A grid in place of a frame."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def banded_line(
    axes: Axes, x: Sequence[float], mean: Sequence[float], reach: Sequence[float], **line: Any
) -> list[Artist]:
    """A line, and a band of the same colour where it reaches anywhere."""
    [drawn] = axes.plot(x, mean, **line)
    if not any(reach):
        return [drawn]
    low, high = ([m + sign * r for m, r in zip(mean, reach, strict=True)] for sign in (-1, 1))
    return [drawn, axes.fill_between(x, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)]
