"""Maps as files that need nothing of ours to read: safetensors, and an index that says what is in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vitkd_cli.files import whole_file, write_text
from vitkd_cli.inspection.layers import Array, AttentionLayer, Look
from vitkd_cli.inspection.places import heads_of
from vitkd_cli.vit.model import Model


def tensor_name(layer: AttentionLayer, index: int) -> str:
    """``block.03.attention``; ``layer.25.attention``, by its place among all layers, if it is no block's."""
    return f"layer.{index:02d}.attention" if layer.block is None else f"block.{layer.block:02d}.attention"


class Dump:
    """A folder of maps: one file per image and model, written image by image, and ``index.json``.

    At most the chosen maps of one image and model are in memory, as float32.

    Args:
        preprocessing: how the images were cropped and resized.
        heads: ``mean``, ``all``, or ``0,3``.
    """

    def __init__(self, folder: Path, preprocessing: dict[str, Any], heads: str) -> None:
        self.folder, self.preprocessing, self.heads = folder, preprocessing, heads
        self.models: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []

    def add(
        self,
        name: str,
        size: tuple[int, int],
        models: Sequence[Model],
        looks: Sequence[Look],
        chosen: Sequence[Sequence[int]],
    ) -> None:
        """Write one image's maps, one file per model.

        Args:
            size: rows and columns of the image file, in pixels.
            looks: with all layers.
            chosen: indices of the layers to write, for each model.
        """
        if not self.models:
            self.models = [self._model(*each) for each in zip(models, looks, chosen, strict=True)]
        files, heads = [], heads_of(self.heads, looks)
        for model, (look, indices) in enumerate(zip(looks, chosen, strict=True)):
            tensors = {"image": look.image}
            if look.rollout is not None:
                tensors["rollout"] = look.rollout
            for index in indices:
                if (map_ := look.maps[index]) is not None:
                    tensors[tensor_name(look.layers[index], index)] = _chosen(map_, heads)
            files.append(f"{len(self.images):04d}-{model}.safetensors")
            whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
            with whole_file(self.folder / files[-1]) as beside:
                save_file(whole, beside)
        self.images.append({"name": name, "size": size, "files": files})

    def _model(self, built: Model, look: Look, chosen: Sequence[int]) -> dict[str, Any]:
        spec, layers = built.spec, look.layers
        size = {"input_size": spec.input_size, "mean": spec.mean, "std": spec.std}
        return {
            "model": spec.name,
            "weights": built.weights,
            "preprocessing": {**size, **self.preprocessing},
            "patch_grid": spec.blocks[-1].grid,
            "prefix_tokens": spec.blocks[-1].num_prefix_tokens,
            "class_token": spec.class_token,
            "heads": self.heads,
            "layers": {tensor_name(layers[i], i): _entry(layers[i]) for i in chosen},
        }

    def close(self) -> Path:
        """Write the index."""
        path = self.folder / "index.json"
        write_text(path, json.dumps({"models": self.models, "images": self.images}))
        return path


def _chosen(map_: Array, heads: Sequence[int]) -> Array:
    """Heads of ``[heads, ...]``; of none named one, their mean."""
    if not heads:
        return map_.mean(0, keepdims=True)
    return map_[[head for head in heads if head < len(map_)]]


def _entry(layer: AttentionLayer) -> dict[str, Any]:
    entry: dict[str, Any] = {
        key: getattr(layer, key)
        for key in (
            "path",
            "block",
            "kind",
            "heads",
            "grid",
            "key_grid",
            "prefix",
            "key_prefix",
            "why",
            "mixed",
        )
    }
    return {**entry, "windows": None if layer.windows is None else layer.windows.tolist()}
