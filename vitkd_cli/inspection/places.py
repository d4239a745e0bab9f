"""Where on the image a layer looks: its map, put back on the grid of its keys."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from vitkd_cli.errors import UserError
from vitkd_cli.inspection.layers import Array, AttentionLayer, Look

Query = str | tuple[float, float]
"""``cls``, ``all``, or a point of the image: shares of its height and width, in [0, 1)."""


def query_of(text: str, looks: Sequence[Look]) -> Query:
    """``ROW,COL``, on the first grid of the first model that has one, as a point: grids differ.

    Raises:
        UserError: it is no query, or lies outside that grid.
    """
    if text in ("cls", "all"):
        return text
    if not re.fullmatch(r"\d+,\d+", text):
        raise UserError(f"--query {text}: neither cls, all nor ROW,COL", "such as --query 3,5")
    row, column = map(int, text.split(","))
    grids = [layer.grid for look in looks for layer in look.layers if asked_by_patches(layer)]
    rows, columns = grids[0] if grids else (row + 1, column + 1)
    if row >= rows or column >= columns:
        raise UserError(
            f"--query {text}: the grid of patches ends at {rows - 1},{columns - 1}", "rows and columns from 0"
        )
    return (row + 0.5) / rows, (column + 0.5) / columns


def heads_of(text: str, looks: Sequence[Look]) -> tuple[int, ...]:
    """The single heads that ``mean``, ``all`` or ``0,3`` name: of ``mean`` none.

    Raises:
        UserError: it is none of these, or no layer has such a head.
    """
    most = max(layer.heads for look in looks for layer in look.layers)
    if text in ("mean", "all"):
        return tuple(range(most)) if text == "all" else ()
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--heads {text}: neither mean, all nor numbers", "such as --heads 0,3")
    heads = tuple(map(int, text.split(",")))
    if max(heads) >= most:
        raise UserError(f"--heads {text}: the last head is {most - 1}", "heads count from 0")
    return heads


def name_of(layer: AttentionLayer) -> str:
    return layer.path if layer.block is None else f"block {layer.block}"


def asker(look: Look, layer: AttentionLayer, query: Query) -> str:
    """Whose attention :func:`over_image` gives, in words."""
    if _class_token_asks(look, layer, query):
        return "class token"
    if isinstance(query, str):
        return "mean over patch queries"
    row, column = divmod(patch_at(query, layer.grid), layer.grid[1])
    return f"patch {row},{column}"


def over_image(look: Look, index: int, query: Query) -> Array:
    """How much layer ``index`` attends to each patch, for one query.

    ``cls`` is the class token, or where it does not ask, as ``all``, the mean over all patches as queries.
    Where the class token alone asks, it is the query.

    Returns:
        ``[heads, rows, columns]`` float32, on the grid of its keys; NaN outside the query's window. What
        goes to prefix tokens is left out: the rest sums to less than 1.
    """
    layer, map_ = look.layers[index], look.maps[index]
    assert map_ is not None and on_image(layer)
    if layer.kind == "windows":
        flat = _over_windows(layer, map_, query)
    else:
        flat = row_of(look, index, query)[:, layer.key_prefix :]
    return flat.reshape(len(flat), *layer.key_grid)


def row_of(look: Look, index: int, query: Query) -> Array:
    """The same with prefix tokens, ``[heads, N_k]`` float32, of a layer that has no windows."""
    layer, map_ = look.layers[index], look.maps[index]
    assert map_ is not None
    if _class_token_asks(look, layer, query):
        row = map_[:, 0]
    elif isinstance(query, str):
        row = map_[:, layer.prefix :].mean(1, dtype=np.float32)
    else:
        row = map_[:, layer.prefix + patch_at(query, layer.grid)]
    return row.astype(np.float32)


def patch_at(point: tuple[float, float], grid: tuple[int, int]) -> int:
    """The patch of a grid, in row-major order, that a point of the image lies in."""
    return int(point[0] * grid[0]) * grid[1] + int(point[1] * grid[1])


def rollout_of(look: Look) -> Look:
    """The same with its rollout as its one layer, of one head.

    Raises:
        ValueError: it has none.
    """
    if look.rollout is None:
        raise ValueError(f"{look.title} has no rollout")
    layer = replace(look.layers[0], path="rollout", block=None, heads=1)
    return replace(look, layers=(layer,), maps=(look.rollout[None],))


def on_image(layer: AttentionLayer) -> bool:
    """Has its map places on the image? Channels have none, nor have windows that pool their queries."""
    return layer.kind in ("tokens", "reduced", "class") or layer.windows is not None


def asked_by_patches(layer: AttentionLayer) -> bool:
    """Is a patch of its grid a query of its own?"""
    return on_image(layer) and layer.kind != "class"


def _class_token_asks(look: Look, layer: AttentionLayer, query: Query) -> bool:
    """Is the query, or the only one there is, the class token?"""
    one_of_many = look.class_token and layer.prefix > 0 and layer.kind in ("tokens", "reduced")
    return layer.kind == "class" or (query == "cls" and one_of_many)


def _over_windows(layer: AttentionLayer, map_: Array, query: Query) -> Array:
    """``[heads, patches]`` from ``[heads, windows, n, n]``."""
    assert layer.windows is not None
    places = layer.windows.numpy()  # [windows, n]
    real = places >= 0
    patches = layer.key_grid[0] * layer.key_grid[1]
    if isinstance(query, str):
        received = np.einsum("hwqk,wq->wkh", map_.astype(np.float32), real) / real.sum()
        total = np.zeros((patches, len(map_)), np.float32)
        np.add.at(total, places[real], received[real])
        return total.T
    flat = np.full((len(map_), patches), np.nan, np.float32)
    for window, token in np.argwhere(places == patch_at(query, layer.grid))[:1]:
        asked = real[window]
        flat[:, places[window, asked]] = map_[:, window, token, asked]
    return flat
