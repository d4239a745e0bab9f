"""Attention as pictures: over the image, as token × token maps, and as numbers by layer."""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitkd_cli.inspection.kinds import Array, AttentionLayer, OnImage, Query, patch_at
from vitkd_cli.inspection.maps import ImageAttention, parse_heads, parse_query
from vitkd_cli.plots import DPI, figure_in, plain_axes

_LINE = 14  # pixels a line of small print
_GAP = 6
_SOFT = "#555555"
_MARK = (0.0, 0.9, 1.0)  # of the query's patch: magma has no cyan

_SCALE = (
    "Scale: each map from 0 (dark) to its own maximum (bright), the number below it: "
    "the largest share of a query's attention that one patch gets."
)


@dataclass(frozen=True)
class Cell:
    """One small picture ``[h, w, 3]`` in [0, 1], with print above, below and inside."""

    picture: Array
    above: str = ""
    below: str = ""
    inside: str = ""


@dataclass(frozen=True)
class Row:
    """Cells in a row; a heading above them, a label to their left."""

    cells: Sequence[Cell]
    heading: str = ""
    label: str = ""


def draw(
    models: Sequence[ImageAttention],
    folder: Path,
    *,
    query: str = "cls",
    heads: str = "mean",
    rollout: bool = False,
) -> list[Path]:
    """Pictures of one image: attention over it, its rollout, and the maps of its tokens.

    Args:
        models: of one image: the teacher's, then the student's.
        folder: for the PNGs; their names begin with the image's.
        query: ``cls``, the class token (for a layer without one, the mean over all patches as queries);
            ``all``, that mean; ``ROW,COL``, a patch of the first model's grid.
        heads: ``mean``; or ``all`` or ``0,3``, then one picture per model, row per layer, column per head.
        rollout: draw it too, for the models that have one.
    """
    every = [one.layers for one in models]
    at, single = parse_query(query, every), parse_heads(heads, every)
    folder.mkdir(parents=True, exist_ok=True)
    name, written = models[0].name, []
    shown = f"{name} · class {models[0].truth}" if models[0].truth else name

    def save(rows: Sequence[Row], kind: str, title: str, note: str = _SCALE) -> None:
        written.append(sheet(rows, folder / f"{file_name(name)}-{kind}.png", title, note))

    for number, one in enumerate(models if single else ()):
        kind = f"heads-{number}-{file_name(one.title)}"
        title = f"{one.title} · {shown}\n{_asked([one], at)}, by layer and head"
        save(_layers_by_heads(one, at, single), kind, title)
    if not single:
        side = max(120, min(240, 1900 // (1 + max(map(len, every)))))
        rows = _galleries(models, [over_cells(one, at, side) for one in models], wrap=13)
        save(rows, "layers", f"{shown}\n{_asked(models, at)}, mean over heads")
    rolled = [one.rolled_out() for one in models if rollout and one.rollout is not None]
    if rolled:
        rows = _galleries(rolled, [over_cells(one, at, 240) for one in rolled], wrap=2)
        save(rows, "rollout", f"{shown}\n{_asked(rolled, at)}, rolled out through all layers")
    maps = [[_token_map(*pair) for pair in zip(one.layers, one.maps, strict=True)] for one in models]
    title = f"{shown}\nwho looks at whom: a row a query, a column a key, mean over heads"
    note = "Scale: each map from 0 (dark) to its own 99th percentile (bright), the number below it."
    save(_galleries(models, maps, wrap=6), "tokens", title, note)
    return written


def _asked(models: Sequence[ImageAttention], query: Query) -> str:
    """Whose attention a picture shows, in words."""
    layers = [layer for one in models for layer in one.layers if isinstance(layer, OnImage)]
    if isinstance(query, tuple) and any(layer.patch_queries for layer in layers):
        return "attention of the patch that is outlined"
    who = sorted({layer.query_name(query) for layer in layers})
    return "attention of the " + (" or, where it does not ask, the ".join(who) or "layers")


def _layers_by_heads(one: ImageAttention, query: Query, heads: Sequence[int]) -> list[Row]:
    side = max(72, min(150, 1900 // (1 + len(heads))))
    titles = ["mean", *(f"head {head}" for head in heads)]
    rows = []
    for index, layer in enumerate(one.layers):
        cells = _head_cells(one, index, query, side, heads)
        if index == 0:
            cells = [replace(cell, above=title) for cell, title in zip(cells, titles, strict=True)]
        rows.append(Row(cells, label=f"{layer.name}\n{layer.label}"))
    return rows


def over_cells(one: ImageAttention, query: Query, side: int) -> list[Cell]:
    """The image, and each layer's attention over it, mean over heads."""
    image = Cell(_resized(one.image, side) / 255, above="image")
    cells = [_head_cells(one, index, query, side)[0] for index in range(len(one.layers))]
    return [image] + [
        replace(cell, above=layer.name, below="\n".join(filter(None, (cell.below, layer.label))))
        for cell, layer in zip(cells, one.layers, strict=True)
    ]


def _head_cells(
    one: ImageAttention, index: int, query: Query, side: int, heads: Sequence[int] = ()
) -> list[Cell]:
    """A layer's mean over heads (where it has no place on the image, every head), then single heads."""
    layer, map_ = one.layers[index], one.maps[index]
    grey = _resized(one.image, side).mean(-1) / 255
    empty = Cell(np.ones((*grey.shape, 3)))
    if map_ is None:
        return [_without(layer, *grey.shape), *[empty] * len(heads)]
    if isinstance(layer, OnImage):
        maps = layer.over_image(map_, query)
        mean = maps.mean(0)
    else:
        maps, mean = layer.matrices(map_), layer.matrix(map_)
    patch = None
    if isinstance(query, tuple) and layer.patch_queries:
        patch = divmod(patch_at(query, layer.grid), layer.grid[1])

    def cell(values: Array) -> Cell:
        top = float(np.nanmax(values, initial=0))
        if isinstance(layer, OnImage):
            return Cell(_over(grey, values, patch, layer.grid), below=_percent(top))
        picture, matrix = empty.picture.copy(), _matrix(values, min(grey.shape), top)
        picture[: len(matrix), : matrix.shape[1]] = matrix
        return Cell(picture, below=_percent(top))

    return [cell(mean), *(cell(maps[head]) if head < len(maps) else empty for head in heads)]


def _token_map(layer: AttentionLayer, map_: Array | None, side: int = 240) -> Cell:
    """The map itself, queries × keys; of windows their mean, of channels every head."""
    if map_ is None:
        return replace(_without(layer, side, side), above=layer.name)
    values = layer.matrix(map_)
    top = float(np.nanquantile(values, 0.99))
    below = "\n".join(filter(None, (_percent(top), layer.matrix_label(map_))))
    return Cell(_matrix(values, side, top, square=layer.square), layer.name, below)


def _without(layer: AttentionLayer, height: int, width: int) -> Cell:
    """In the place of a map that there is none of: why."""
    return Cell(np.full((height, width, 3), 0.93), inside=layer.why)


def _galleries(models: Sequence[ImageAttention], cells: Sequence[Sequence[Cell]], wrap: int) -> list[Row]:
    """Rows of at most ``wrap`` layers, each model's under the other's."""
    return [
        Row(some, heading=f"{one.title}: {one.prediction}" if one.prediction else one.title)
        for start in range(0, max(map(len, cells)), wrap)
        for one, own in zip(models, cells, strict=True)
        if (some := own[start : start + wrap])
    ]


def _percent(share: float) -> str:
    return f"{share:.1%}" if share < 0.1 else f"{share:.0%}"


# --- pixels ---------------------------------------------------------------------------------------------


def _over(grey: Array, map_: Array, patch: tuple[int, int] | None, grid: tuple[int, int]) -> Array:
    """A grey image ``[h, w]`` with a map over it, from 0 to its maximum; NaN lets the image through."""
    height, width = grey.shape
    heat = _stretched(map_, height, width)
    seen = ~np.isnan(heat)
    share = np.where(seen, heat, 0) / max(float(np.nanmax(map_, initial=0)), 1e-12)
    picture = np.repeat(grey[..., None], 3, -1)
    picture[seen] = 0.3 * picture[seen] + 0.7 * _magma(share[seen])
    if patch is not None:
        rows, columns = (
            [round(i * s / g) for i in (p, p + 1)] for p, s, g in zip(patch, grey.shape, grid, strict=True)
        )
        frame = np.zeros(grey.shape, bool)
        frame[rows[0] : rows[1], columns[0] : columns[1]] = True
        frame[rows[0] + 2 : rows[1] - 2, columns[0] + 2 : columns[1] - 2] = False
        picture[frame] = _MARK
    return picture


def _matrix(values: Array, side: int, top: float, *, square: bool = False) -> Array:
    """A matrix as a picture of its own, from 0 to ``top``; NaN is white.

    Args:
        square: stretch it to ``side``; else its longer edge is that, its cells are square, and a single
            row is 20 pixels high.
    """
    high, wide = (side if square else max(20, round(side * n / max(values.shape))) for n in values.shape)
    values = _stretched(values.astype(np.float32), high, wide)
    picture = _magma(np.clip(np.nan_to_num(values) / max(top, 1e-12), 0, 1))
    picture[np.isnan(values)] = 1
    return picture


def _magma(values: Array) -> Array:
    import matplotlib

    return matplotlib.colormaps["magma"](values)[..., :3]


def _stretched(values: Array, height: int, width: int) -> Array:
    """Enlarged without smoothing; where it must shrink, means of what falls together."""
    for axis, size in enumerate((height, width)):
        shrinks = values.shape[axis] > size
        kind = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
        to = (values.shape[1], size) if axis == 0 else (size, values.shape[0])
        values = np.asarray(Image.fromarray(values).resize(to, kind))
    return values


def _resized(image: Array, side: int) -> Array:
    height, width = image.shape[:2]
    kind = Image.Resampling.NEAREST if width < side // 2 else Image.Resampling.LANCZOS  # digits stay sharp
    return np.asarray(Image.fromarray(image).resize((side, max(1, round(side * height / width))), kind))


def sheet(rows: Sequence[Row], path: Path, title: str, note: str) -> Path:
    """Write rows of cells as one PNG: the cells as one array, print in its gaps and around it.

    An axes a cell would take a minute for 24 layers of 16 heads.
    """
    canvas, prints = laid_out(rows)
    height, width, _ = canvas.shape
    heading, _, below = title.partition("\n")
    note = textwrap.fill(note, max(60, width // 8))
    prints += [
        (0, -3.4 * _LINE, heading, {"va": "bottom", "size": 9, "weight": "bold"}),
        (0, -2 * _LINE, below, {"va": "bottom", "size": 7}),
        (0, height + _LINE, note, {"va": "top", "size": 6, "color": _SOFT}),
    ]
    size = (width / DPI, height / DPI)
    with figure_in(path, size, layout=None, bbox_inches="tight", pad_inches=0.12) as figure:
        axes = figure.add_axes((0, 0, 1, 1))  # a pixel of the array is one of the picture
        axes.imshow(canvas, interpolation="none")
        axes.set_axis_off()
        for x, y, text, style in prints:
            axes.text(x, y, text, **style)
    return path


def laid_out(rows: Sequence[Row]) -> tuple[Array, list[tuple[float, float, str, dict[str, Any]]]]:
    """All cells as one array ``[H, W, 3]`` uint8, and what is printed where: x, y, text, style."""
    placed, prints, y = [], [], 0
    for row in rows:
        if row.heading:
            prints.append((0, y, row.heading, {"va": "top", "size": 8, "weight": "bold"}))
        y += 2 * _LINE * bool(row.heading) + _LINE * any(cell.above for cell in row.cells)
        height = max(cell.picture.shape[0] for cell in row.cells)
        prints.append((-2 * _GAP, y + height / 2, row.label, {"va": "center", "ha": "right", "size": 6}))
        x = 0
        for cell in row.cells:
            placed.append((y, x, cell.picture))
            tall, wide, _ = cell.picture.shape
            inside = textwrap.fill(cell.inside, max(8, wide // 7))
            title_size = min(6, 0.8 * wide / max(1, len(cell.above)))  # a module's path may be long
            for at, text, style in (
                (y - 3, cell.above, {"va": "bottom", "size": title_size}),
                (y + tall / 2, inside, {"va": "center", "size": 5}),
                (y + tall + 3, cell.below, {"va": "top", "size": 5, "color": _SOFT, "linespacing": 1.1}),
            ):
                prints.append((x + wide / 2, at, text, {"ha": "center", **style}))
            x += wide + _GAP
        y += height + 2 * _GAP + _LINE * max(len(cell.below.splitlines()) for cell in row.cells)
    canvas = np.full((y, max(x + picture.shape[1] for _, x, picture in placed), 3), 255, np.uint8)
    for y, x, picture in placed:
        canvas[y : y + picture.shape[0], x : x + picture.shape[1]] = np.round(255 * picture)
    return canvas, [one for one in prints if one[2]]


def file_name(text: str) -> str:
    return re.sub(r"[^\w.=+-]+", "_", text).strip("._")[:80] or "image"


# --- numbers --------------------------------------------------------------------------------------------


def draw_matrix(values: Array, path: Path, *, title: str, rows: str, columns: str, note: str = "") -> Path:
    """Write a heat map of pairs of layers.

    Args:
        values: ``[rows, columns]``; what is NaN is left out.
        rows, columns: whose layers they are.
    """
    height, width = values.shape
    size = (1.9 + 0.34 * max(width, 6), 1.4 + 0.34 * max(height, 5))
    # A long label would be cut.
    with figure_in(path, size, bbox_inches="tight", pad_inches=0.12) as figure:
        axes = figure.add_subplot()
        axes.set_facecolor("#e4e4e4")
        finite = [0.0, *values[np.isfinite(values)]]
        low, high = min(finite), max(finite) or 1.0
        shown = axes.imshow(np.ma.masked_invalid(values), cmap="magma", vmin=low, vmax=high)
        figure.colorbar(shown, ax=axes, shrink=0.85).ax.tick_params(labelsize=7)
        if values.size <= 400:
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = (value - low) / (high - low) < 0.6
                    colour = "white" if dark else "black"
                    axes.text(column, row, f"{value:.2f}", ha="center", va="center", size=5, color=colour)
        axes.set_title(title, fontsize=9)
        room = 12 + 6 * max(width, 6)  # letters
        axes.set_ylabel(textwrap.fill(rows, 6 * max(height, 5)), fontsize=8)
        below = "\n\n".join(textwrap.fill(text, room) for text in (columns, note) if text)
        axes.set_xlabel(below, fontsize=8)
        axes.set_xticks(range(width))
        axes.set_yticks(range(height))
        axes.tick_params(labelsize=6)
    return path


_NUMBERS = {
    "entropy": "entropy (nats)",
    "distance": "attention distance (pixels)",
    "prefix_share": "share on prefix tokens",
}


def draw_numbers(models: Sequence[tuple[str, Sequence[dict[str, Any]]]], path: Path) -> Path:
    """Draw what was counted, by layer: one dot per head, a line their mean (Dosovitskiy et al. 2021, Fig. 7).

    Args:
        models: title, and for each layer and head its ``layer``, ``head`` and numbers; None is left out.
    """
    every = [line for _, lines in models for line in lines]
    rows = [key for key in _NUMBERS if any(line.get(key) is not None for line in every)]
    size = (1 + 3.6 * len(models), 0.8 + 2.1 * max(1, len(rows)))
    with figure_in(path, size) as figure:
        grid = figure.subplots(max(1, len(rows)), len(models), sharey="row", squeeze=False)
        for row, key in enumerate(rows):
            for column, (title, lines) in enumerate(models):
                axes = grid[row, column]
                known = [(n["layer"], n["head"], n[key]) for n in lines if n.get(key) is not None]
                layers, heads, values = np.array(known, float).reshape(-1, 3).T
                axes.scatter(layers, values, c=heads, cmap="viridis", s=14, alpha=0.8, linewidths=0)
                at = np.unique(layers)
                axes.plot(at, [values[layers == n].mean() for n in at], color="#444444", linewidth=1)
                plain_axes(axes)
                axes.tick_params(labelsize=7)
                axes.locator_params(axis="x", integer=True)
                if row == 0:
                    axes.set_title(title, fontsize=9)
                if column == 0:
                    axes.set_ylabel(_NUMBERS[key], fontsize=8)
                if row == len(rows) - 1:
                    axes.set_xlabel("layer (a dot a head, the line their mean)", fontsize=8)
            most = max(line[key] for line in every if line.get(key) is not None)
            grid[row, 0].set_ylim(0, 1.08 * most or 1)  # after all: the row shares it
    return path
