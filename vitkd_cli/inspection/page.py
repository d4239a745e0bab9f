"""One HTML page, whole in itself: click a patch, and see where it looks in every layer of every model."""

import html
import io
import json
import re
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vitkd_cli.files import write_text
from vitkd_cli.inspection.kinds import Array, OnImage, Query
from vitkd_cli.inspection.maps import ImageAttention, parse_heads

SIDE = 28
"""Of a larger grid are stored means over at most 28 × 28 equal cells of queries, sums over those of keys."""
BUDGET = 4_500_000
"""Bytes before base64 of a model's maps of one image, mean or one head; else half the side is tried."""

_MISSING = 255  # a key that is not asked; weights are stored from 0 to 254


class Page:
    """Collects images, then writes them as one file that fetches nothing.

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

    def add(self, models: Sequence[ImageAttention]) -> None:
        """One image, as one model saw it, or as teacher and student did."""
        single = parse_heads(self.heads, [one.layers for one in models])
        stored = [_stored(one, single) for one in models]
        self._images.append({"name": models[0].name, "truth": models[0].truth, "looks": stored})

    def write(self, path: Path) -> Path:
        import matplotlib

        magma = (255 * matplotlib.colormaps["magma"](np.arange(255))[:, :3]).round().astype(np.uint8)
        data = {"magma": magma, "images": self._images, "start": self._start}
        parts = {
            "TITLE": html.escape(self.title),
            "DATA": json.dumps(data, default=_base64).replace(
                "<", r"\u003c"
            ),  # so that no name ends the script
        }
        template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        page = re.sub("__(TITLE|DATA)__", lambda found: parts[found[1]], template)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
        return path


def _stored(one: ImageAttention, heads: Sequence[int]) -> dict[str, Any]:
    side = SIDE
    while True:
        layers = [_layer(one, index, heads, side) for index in range(len(one.layers))]
        if side == 1 or len(json.dumps(layers, default=_base64)) * 3 / 4 <= BUDGET * (1 + len(heads)):
            break
        side //= 2
    return {
        "title": one.title,
        "says": one.prediction,
        "image": _png(one.image),
        "layers": layers,
        "rollout": _layer(one.rolled_out(), 0, (), side) if one.rollout is not None else None,
    }


def _layer(one: ImageAttention, index: int, heads: Sequence[int], side: int) -> dict[str, Any]:
    """One layer as the page reads it.

    ``still`` is its answer to the class token, or what stands for it: one row over ``keys``. ``rows`` has
    one row per query on ``grid``; for windows ``row_of`` tells it for each of ``patches``. The keys of a row
    are those of its window, or all of ``keys``. Both hold the mean over heads and the single heads stored.
    What has no place on the image has no ``asker``, and for ``still`` the matrices of its heads.
    """
    layer, map_ = one.layers[index], one.maps[index]
    stored: dict[str, Any] = {"name": layer.name, "kind": layer.kind, "heads": layer.heads}
    if map_ is None:
        return {**stored, "why": layer.why}
    if not isinstance(layer, OnImage):
        tiles = layer.matrix(map_)
        still = {"mean": packed(tiles.reshape(1, -1))}
        return {**stored, "kind": layer.label, "keys": tiles.shape, "still": still}
    chosen = {"mean": slice(None), **{str(head): slice(head, head + 1) for head in heads if head < len(map_)}}
    stored |= {"asker": layer.query_name("cls"), "keys": layer.key_cells(side)}
    if layer.patch_queries:
        stored |= layer.cells(side)
        stored["rows"] = {
            name: packed(*layer.cell_rows(map_[of].mean(0, dtype=np.float32), side))
            for name, of in chosen.items()
        }
    row = layer.row(map_, "cls")  # [heads, N_k]
    over, prefix = layer.pooled(row[:, layer.key_prefix :], side), row[:, : layer.key_prefix].sum(1)
    stored["still"] = {
        name: packed(over[of].mean(0)[None], prefix[of].mean(keepdims=True)) for name, of in chosen.items()
    }
    return stored


def packed(rows: Array, prefix: Array | None = None) -> dict[str, str]:
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
