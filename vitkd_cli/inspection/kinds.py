"""The kinds of attention maps: how each lies on the image, is drawn, labelled, measured and stored.

Maps of one image are arrays ``[heads, ...]``, those of a batch tensors ``[B, heads, ...]``.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from vitkd_cli.vit.attention import AttentionSpec
from vitkd_cli.vit.layout import in_rows
from vitkd_cli.vit.model import Model

Array = np.ndarray[Any, Any]
Grid = tuple[int, int]
Query = str | tuple[float, float]
"""``cls``, ``all``, or a point of the image: shares of its height and width, in [0, 1)."""

_NO_PLACE = "its windows pool their queries, or are of pixels within patches: they have no place on the grid"


@dataclass(frozen=True, eq=False)
class AttentionLayer(AttentionSpec):
    """One module that attends. There is a subclass for each kind of map; this one has none.

    Attributes:
        windows: ``[windows, n]`` which patch of the grid each token of a window is, -1 for padding; None
            where it is no map of windows, or one that pools its queries.
        mixed: its rows need not sum to 1, nor be positive: talking heads mix the maps of the heads after
            the softmax, differential attention takes one map from another.
        label: what pictures say of it beside its name.
        patch_queries: a patch of its grid is a query of its own.
        square: its matrix is drawn as a square, whatever its shape.
    """

    windows: Tensor | None = None
    mixed: bool = False

    label: ClassVar[str] = "no map"
    patch_queries: ClassVar[bool] = False
    square: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return self.path if self.block is None else f"block {self.block}"

    # A batch ------------------------------------------------------------------------------------------

    def arranged(self, used: Tensor, images: int, model: Model) -> Tensor:
        """A map as its module used it, windows counted as images, as ``[images, heads, ...]``."""
        if self.block is None:
            return used
        asked = self.block - (self.key_grid != self.grid)  # a stage begins: keys of the block before
        for dim, index in ((-2, self.block), (-1, asked)):
            used = in_rows(model.net, used, model.spec.blocks[index].layout, index, dims=(dim,))
        return used

    def distribution(self, map_: Tensor) -> Tensor:
        """Rows that are distributions: of a mixed map its magnitudes, scaled to sum to 1."""
        return map_.abs() / map_.abs().sum(-1, keepdim=True) if self.mixed else map_

    def of_queries(self, values: Tensor) -> Tensor:
        """``[B, heads, queries]`` of values that each row of the map has."""
        return values.flatten(2)

    def numbers(self, map_: Tensor, size: Grid) -> dict[str, Tensor]:
        """``[B, heads]`` each: what its geometry has of ``distance`` and the shares of prefix tokens.

        Args:
            map_: its rows are distributions.
            size: rows and columns of the image, in pixels.
        """
        return {}

    # One image ----------------------------------------------------------------------------------------

    def placed(self) -> "AttentionLayer":
        """The same, or where its windows cannot be put back on the image, a layer that says so."""
        return self

    def matrices(self, map_: Array) -> Array:
        """``[heads, n_q, n_k]`` of a map without places on the image."""
        return map_

    def matrix(self, map_: Array) -> Array:
        """The map itself, queries × keys: every head, or where it has places on the image their mean."""
        return mosaic(self.matrices(map_))

    def matrix_label(self, map_: Array) -> str:
        return self.label


class Channels(AttentionLayer):
    """Channels ask channels: ``[heads, d, d]``."""

    label = "over channels"


class OnImage(AttentionLayer):
    """``[heads, N_q, N_k]``, whose keys are prefix tokens and patches of the image."""

    def is_class_query(self, query: Query) -> bool:
        """Is the query, or the only one there is, the class token?"""
        return query == "cls" and self.class_token

    def query_name(self, query: Query) -> str:
        """Whose attention :meth:`row` is, in words."""
        if self.is_class_query(query):
            return "class token"
        if isinstance(query, str):
            return "mean over patch queries"
        row, column = divmod(patch_at(query, self.grid), self.grid[1])
        return f"patch {row},{column}"

    def row(self, map_: Array, query: Query) -> Array:
        """How much it attends to each key, for one query: ``[heads, N_k]`` float32, prefix tokens first.

        ``cls`` is the class token, or where it does not ask, as ``all``, the mean over all patches as
        queries. Where the class token alone asks, it is the query.
        """
        if self.is_class_query(query):
            row = map_[:, 0]
        elif isinstance(query, str):
            row = map_[:, self.prefix :].mean(1, dtype=np.float32)
        else:
            row = map_[:, self.prefix + patch_at(query, self.grid)]
        return row.astype(np.float32)

    def over_image(self, map_: Array, query: Query) -> Array:
        """The same on the grid of its keys: ``[heads, rows, columns]``; NaN outside the query's window.

        What goes to prefix tokens is left out: the rest sums to less than 1.
        """
        return self.row(map_, query)[:, self.key_prefix :].reshape(-1, *self.key_grid)

    def matrix(self, map_: Array) -> Array:
        return map_.mean(0, dtype=np.float32)

    def numbers(self, map_: Tensor, size: Grid) -> dict[str, Tensor]:
        if not (self.class_token and self.key_prefix):
            return {}
        return {"class_prefix_share": map_[:, :, 0, : self.key_prefix].sum(-1)}

    # The page: keys, and queries that are patches, pooled to at most side × side cells ----------------

    def key_cells(self, side: int) -> Grid:
        return cells_of(self.key_grid, side)

    def pooled(self, rows: Array, side: int) -> Array:
        """``[n, cells]`` of ``[n, patches]``: what a cell gets is what its patches get together."""
        cells = self.key_cells(side)
        return rows if cells == self.key_grid else rows @ shares(self.key_grid, cells).T

    def cell_rows(self, map_: Array, side: int) -> tuple[Array, Array]:
        """Rows of one head, means over the patches of a cell, and what each gives to prefix tokens."""
        asked = shares(self.grid, cells_of(self.grid, side))
        rows = (asked / asked.sum(1, keepdims=True)) @ map_[self.prefix :]  # [cells, N_k]
        return self.pooled(rows[:, self.key_prefix :], side), rows[:, : self.key_prefix].sum(1)

    def cells(self, side: int) -> dict[str, Any]:
        """Which of these rows answers for which patch."""
        return {"grid": cells_of(self.grid, side)}


class ClassToken(OnImage):
    """The class token alone asks: ``[heads, 1, N_k]``."""

    label = "class token only"

    def is_class_query(self, query: Query) -> bool:
        return True


class Reduced(OnImage):
    """Every token asks fewer keys, which lie on a grid of their own."""

    label = "reduced"
    patch_queries = True
    square = True

    def numbers(self, map_: Tensor, size: Grid) -> dict[str, Tensor]:
        patches = map_[:, :, self.prefix :]
        asking, asked = (centres(grid, size, map_.device) for grid in (self.grid, self.key_grid))
        weights = patches[..., self.key_prefix :]
        found = {"distance": weighted(weights, torch.cdist(asking, asked)).mean(-1)}
        if self.key_prefix:
            found["prefix_share"] = patches[..., : self.key_prefix].sum(-1).mean(-1)
        return found | super().numbers(map_, size)


class TokenMap(Reduced):
    """Every token asks every one."""

    label = ""

    def patch_to_patch(self, map_: Tensor) -> Tensor:
        """``[B, N, N]``: mean over heads of the attention among patches, rows scaled to sum to 1."""
        mean = self.distribution(map_.float()).mean(1)[:, self.prefix :, self.key_prefix :]
        return mean / mean.sum(-1, keepdim=True).clamp(min=1e-12)


class ScatteredWindows(AttentionLayer):
    """Tokens ask those of their window, ``[heads, windows, n_q, n_k]``; where they lie is not known."""

    label = "in windows, queries pooled"

    def arranged(self, used: Tensor, images: int, model: Model) -> Tensor:
        return used.unflatten(0, (images, -1)).transpose(1, 2)

    def placed(self) -> AttentionLayer:
        if self.windows is not None:
            return self
        return AttentionLayer(self.path, self.block, "none", self.heads, why=_NO_PLACE)

    def matrices(self, map_: Array) -> Array:
        return map_.mean(1, dtype=np.float32)


class Windows(ScatteredWindows, OnImage):
    """The same, put back to where its tokens lie."""

    label = "windows"
    patch_queries = True

    @property
    def places(self) -> Array:
        """:attr:`windows` as an array."""
        assert self.windows is not None
        return self.windows.numpy()

    def of_queries(self, values: Tensor) -> Tensor:
        return values[:, :, torch.from_numpy(self.places >= 0)]  # padding asks nothing

    def numbers(self, map_: Tensor, size: Grid) -> dict[str, Tensor]:
        windows = torch.from_numpy(self.places).to(map_.device)
        patches = centres(self.grid, size, map_.device)[
            windows
        ]  # [windows, n, 2]; padding counts for nothing
        weights = map_ * (windows >= 0)[:, None]
        return {"distance": self.of_queries(weighted(weights, torch.cdist(patches, patches))).mean(-1)}

    def row(self, map_: Array, query: Query) -> Array:
        places, patches = self.places, self.key_grid[0] * self.key_grid[1]
        real = places >= 0
        if isinstance(query, str):
            received = np.einsum("hwqk,wq->wkh", map_.astype(np.float32), real) / real.sum()
            total = np.zeros((patches, len(map_)), np.float32)
            np.add.at(total, places[real], received[real])
            return total.T
        flat = np.full((len(map_), patches), np.nan, np.float32)
        for window, token in np.argwhere(places == patch_at(query, self.grid))[:1]:
            asked = real[window]
            flat[:, places[window, asked]] = map_[:, window, token, asked]
        return flat

    def matrix(self, map_: Array) -> Array:
        """``[n, n]``, mean over heads and windows; padding counts for nothing."""
        real = self.places >= 0
        pairs = (real[:, :, None] & real[:, None]).astype(np.float32)  # [windows, n, n]
        return (map_.mean(0, dtype=np.float32) * pairs).sum(0) / np.maximum(pairs.sum(0), 1)

    def matrix_label(self, map_: Array) -> str:
        return f"mean of {map_.shape[1]} windows"

    def key_cells(self, side: int) -> Grid:
        return self.key_grid  # a window has few keys

    def cell_rows(self, map_: Array, side: int) -> tuple[Array, Array]:
        """Means over the patches of a cell that share a window; the keys of a row are its window's."""
        window, token, window_of, row_of = self._grouped(side)
        rows = np.zeros((len(window_of), self.places.shape[1]), np.float32)
        np.add.at(rows, row_of, map_[window, token])
        rows /= np.bincount(row_of)[:, None]
        return np.where(self.places[window_of] >= 0, rows, np.nan), np.zeros(len(rows))

    def cells(self, side: int) -> dict[str, Any]:
        window, token, window_of, row_of = self._grouped(side)
        of_patch = np.zeros(self.grid[0] * self.grid[1], np.int32)
        of_patch[self.places[window, token]] = row_of
        windows, window_of = (values.astype(np.int32) for values in (self.places, window_of))
        rows = {"row_of": of_patch, "windows": windows, "window_of": window_of}
        return {"grid": cells_of(self.grid, side), "patches": self.grid, **rows}

    def _grouped(self, side: int) -> tuple[Array, Array, Array, Array]:
        """Window and place of every real token; the window of every row; the row of every real token."""
        cells = cells_of(self.grid, side)
        window, token = np.nonzero(self.places >= 0)
        row, column = np.divmod(self.places[window, token], self.grid[1])
        cell = (row * cells[0] // self.grid[0]) * cells[1] + column * cells[1] // self.grid[1]
        rows, row_of = np.unique(np.stack([window, cell]), axis=1, return_inverse=True)
        return window, token, rows[0], row_of.reshape(-1)


KINDS: dict[str, type[AttentionLayer]] = {
    "tokens": TokenMap,
    "reduced": Reduced,
    "windows": ScatteredWindows,
    "class": ClassToken,
    "channels": Channels,
    "none": AttentionLayer,
}


def layer_of(spec: AttentionSpec, windows: Tensor | None = None, *, mixed: bool = False) -> AttentionLayer:
    """A module that attends, by the facts about it; of windows, where their tokens lie, if it is known."""
    kind = KINDS[spec.kind] if windows is None else Windows
    return kind(**vars(spec), windows=windows, mixed=mixed)


# Geometry ---------------------------------------------------------------------------------------------


def patch_at(point: tuple[float, float], grid: Grid) -> int:
    """The patch of a grid, in row-major order, that a point of the image lies in."""
    return int(point[0] * grid[0]) * grid[1] + int(point[1] * grid[1])


def centres(grid: Grid, size: Grid, device: torch.device) -> Tensor:
    """``[N, 2]`` rows and columns of the centres of a grid's patches, in pixels."""
    sides = (
        (torch.arange(count, device=device) + 0.5) * pixels / count
        for count, pixels in zip(grid, size, strict=True)
    )
    return torch.cartesian_prod(*sides).float()


def weighted(weights: Tensor, values: Tensor) -> Tensor:
    """The mean of values over the last dimension, by weight."""
    return (weights * values).sum(-1) / weights.sum(-1).clamp(min=1e-12)


def mosaic(maps: Array) -> Array:
    """Maps ``[heads, n_q, n_k]`` side by side in one matrix, a line of NaN between them."""
    heads, high, wide = maps.shape
    columns = math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / columns)
    tiles = np.full((rows * (high + 1) - 1, columns * (wide + 1) - 1), np.nan, np.float32)
    for head, one in enumerate(maps):
        y, x = (high + 1) * (head // columns), (wide + 1) * (head % columns)
        tiles[y : y + high, x : x + wide] = one
    return tiles


def cells_of(grid: Grid, side: int) -> Grid:
    """Rows and columns of cells: the grid's own, or a whole fraction of them, rounded up."""
    rows, columns = (math.ceil(n / math.ceil(n / side)) for n in grid)
    return rows, columns


def shares(grid: Grid, cells: Grid) -> Array:
    """``[cells, patches]``: the share of each patch that lies in each of as many equal cells."""

    def along(patches: int, parts: int) -> Array:
        edges = np.arange(parts + 1) * patches / parts
        at = np.arange(patches)
        inside = np.minimum(edges[1:, None], at + 1) - np.maximum(edges[:-1, None], at)
        return np.clip(inside, 0, 1).astype(np.float32)

    return np.kron(along(grid[0], cells[0]), along(grid[1], cells[1]))
