"""One HTML page, whole in itself: click a patch, and see where it looks in every layer of every model."""

from __future__ import annotations

import html
import io
import json
import math
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from vitkd_cli.files import write_text
from vitkd_cli.inspection.draw import kind_of, matrices, mosaic
from vitkd_cli.inspection.layers import Array, AttentionLayer, Look
from vitkd_cli.inspection.places import (
    Query,
    asker,
    heads_of,
    name_of,
    on_image,
    over_image,
    rollout_of,
    row_of,
)

SIDE = 28
"""Of a larger grid are stored means over at most 28 × 28 equal cells of queries, sums over those of keys."""
BUDGET = 4_500_000
"""Bytes before base64 of a model's maps of one image, mean or one head; else half the side is tried."""

_MISSING = 255  # a key that is not asked; weights are stored from 0 to 254


class Page:
    """Collects looks, then writes them as one file that fetches nothing.

    It holds at most 6 MB for each model and image, as much again for every single head, and the pictures;
    twelve layers on 14 × 14 patches take 0.7 MB. Weights are stored in 255 steps of each query's largest,
    which is stored as it is.

    Args:
        title: of the page.
        heads: ``mean``; or ``all`` or ``0,3``, to store single heads beside the mean.
        query: what it opens with: ``cls``, or a point of the image, by default its middle.
    """

    def __init__(self, title: str, heads: str = "mean", query: Query | None = None) -> None:
        self.title, self.heads = title, heads
        self._start: dict[str, Any] = {"query": "class"} if query == "cls" else {}
        if isinstance(query, tuple):
            self._start = {"at": query}
        self._images: list[dict[str, Any]] = []

    def add(self, looks: Sequence[Look]) -> None:
        """One image, as one model saw it, or as teacher and student did.

        Raises:
            UserError: no layer has such a head.
        """
        single = heads_of(self.heads, looks)
        stored = [_stored(look, single) for look in looks]
        self._images.append({"name": looks[0].name, "truth": looks[0].truth, "looks": stored})

    def write(self, path: Path) -> Path:
        magma = (255 * matplotlib.colormaps["magma"](np.arange(255))[:, :3]).round().astype(np.uint8)
        data = {"magma": _base64(magma), "images": self._images, "start": self._start}
        parts = {
            "TITLE": html.escape(self.title),
            "DATA": json.dumps(data).replace("<", r"\u003c"),  # so that no name ends the script
        }
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        page = re.sub("__(TITLE|DATA)__", lambda found: parts[found[1]], template)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        return path


def _stored(look: Look, heads: Sequence[int]) -> dict[str, Any]:
    side = SIDE
    while True:
        layers = [_layer(look, index, heads, side) for index in range(len(look.layers))]
        if side == 1 or len(json.dumps(layers)) * 3 / 4 <= BUDGET * (1 + len(heads)):
            break
        side //= 2
    rolled = rollout_of(look) if look.rollout is not None else None
    return {
        "title": look.title,
        "says": look.says,
        "image": _png(look.image),
        "layers": layers,
        "rollout": _layer(rolled, 0, (), side) if rolled else None,
    }


def _layer(look: Look, index: int, heads: Sequence[int], side: int) -> dict[str, Any]:
    """One layer as the page reads it.

    ``still`` is its answer to the class token, or what stands for it: one row over ``keys``. ``rows`` has
    one row per query on ``grid``; for windows ``row_of`` tells it for each of ``patches``. The keys of a row
    are those of its window, or all of ``keys``. Both hold the mean over heads and the single heads stored.
    What has no place on the image has no ``asker``, and for ``still`` the matrices of its heads.
    """
    layer, map_ = look.layers[index], look.maps[index]
    stored: dict[str, Any] = {"name": name_of(layer), "kind": layer.kind, "heads": layer.heads}
    if map_ is None:
        return {**stored, "kind": "none", "why": layer.why}
    if not on_image(layer):
        tiles = mosaic(matrices(layer, map_))
        still = {"mean": _rows(tiles.reshape(1, -1))}
        return {**stored, "kind": kind_of(layer), "keys": tiles.shape, "still": still}
    chosen = {"mean": slice(None), **{str(head): slice(head, head + 1) for head in heads if head < len(map_)}}
    over = over_image(look, index, "cls")  # [heads, rows, columns]
    stored["asker"] = asker(look, layer, "cls")
    stored["grid"], stored["keys"] = layer.grid, layer.key_grid
    if layer.kind == "windows":
        stored.update(_windows(layer, map_, chosen, side))
    else:
        queries, keys = (_cells(grid, side) for grid in (layer.grid, layer.key_grid))
        stored["keys"], over = keys, _pooled_keys(over.reshape(len(over), -1), layer.key_grid, keys)
        if layer.kind != "class":
            stored["grid"] = queries
            stored["rows"] = {
                name: _dense(layer, map_[of].mean(0, dtype=np.float32), queries, keys)
                for name, of in chosen.items()
            }
    over = over.reshape(len(over), -1)
    row = np.zeros((len(over), 0)) if layer.kind == "windows" else row_of(look, index, "cls")
    prefix = row[:, : layer.key_prefix].sum(1)  # [heads]
    stored["still"] = {
        name: _rows(over[of].mean(0)[None], prefix[of].mean(keepdims=True)) for name, of in chosen.items()
    }
    return stored


def _dense(
    layer: AttentionLayer, map_: Array, queries: tuple[int, int], keys: tuple[int, int]
) -> dict[str, str]:
    """Rows of a map ``[N_q, N_k]``: means over the patches of a cell."""
    asked = _shares(layer.grid, queries)
    asked = asked / asked.sum(1, keepdims=True)
    rows = asked @ map_[layer.prefix :]  # [cells, N_k]
    return _rows(
        _pooled_keys(rows[:, layer.key_prefix :], layer.key_grid, keys), rows[:, : layer.key_prefix].sum(1)
    )


def _windows(layer: AttentionLayer, map_: Array, chosen: dict[str, slice], side: int) -> dict[str, Any]:
    """Rows of ``[heads, windows, n, n]``: means over the patches of a cell that share a window."""
    assert layer.windows is not None
    places = layer.windows.numpy()  # [windows, n]
    cells = _cells(layer.grid, side)
    window, token = np.nonzero(places >= 0)
    row, column = np.divmod(places[window, token], layer.grid[1])
    cell = (row * cells[0] // layer.grid[0]) * cells[1] + column * cells[1] // layer.grid[1]
    groups, group_of = np.unique(np.stack([window, cell]), axis=1, return_inverse=True)
    group_of = group_of.reshape(-1)
    group_at = np.zeros(layer.grid[0] * layer.grid[1], np.int32)
    group_at[places[window, token]] = group_of
    rows = {}
    for name, of in chosen.items():
        mean = map_[of].mean(0, dtype=np.float32)  # [windows, n, n]
        means = np.zeros((groups.shape[1], places.shape[1]), np.float32)
        np.add.at(means, group_of, mean[window, token])
        means /= np.bincount(group_of)[:, None]
        rows[name] = _rows(np.where(places[groups[0]] >= 0, means, np.nan))
    return {
        "rows": rows,
        "grid": cells,
        "patches": layer.grid,
        "row_of": _base64(group_at),
        "windows": _base64(places.astype(np.int32)),
        "window_of": _base64(groups[0].astype(np.int32)),
    }


def _cells(grid: tuple[int, int], side: int) -> tuple[int, int]:
    """Rows and columns of cells: the grid's own, or a whole fraction of them, rounded up."""
    rows, columns = (math.ceil(n / math.ceil(n / side)) for n in grid)
    return rows, columns


def _shares(grid: tuple[int, int], cells: tuple[int, int]) -> Array:
    """``[cells, patches]``: the share of each patch that lies in each of as many equal cells."""

    def along(patches: int, parts: int) -> Array:
        edges = np.arange(parts + 1) * patches / parts
        at = np.arange(patches)
        inside = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
        return np.clip(inside, 0, 1).astype(np.float32)

    return np.kron(along(grid[0], cells[0]), along(grid[1], cells[1]))


def _pooled_keys(rows: Array, grid: tuple[int, int], cells: tuple[int, int]) -> Array:
    """``[n, cells]`` of ``[n, patches]``: what a cell gets is what its patches get together."""
    return rows if grid == cells else rows @ _shares(grid, cells).T


def _rows(rows: Array, prefix: Array | None = None) -> dict[str, str]:
    """Rows ``[n, keys]`` in bytes, with the largest of each and what each gives to prefix tokens.

    What is below 0, as it may be where heads are mixed after their softmax, is stored as 0.
    """
    most = np.nanmax(rows, axis=1, initial=0).astype(np.float32)
    steps = np.round(254 * rows / np.maximum(most, 1e-12)[:, None])
    values = np.where(np.isnan(rows), _MISSING, np.clip(np.nan_to_num(steps), 0, 254)).astype(np.uint8)
    given = np.zeros(len(rows)) if prefix is None else prefix
    return {"values": _base64(values), "most": _base64(most), "prefix": _base64(given.astype(np.float32))}


def _base64(values: Array) -> str:
    """The bytes of an array, little-endian, as text."""
    return b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _png(image: Array) -> str:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + b64encode(file.getvalue()).decode()
