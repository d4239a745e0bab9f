"""Maps as files that need nothing of ours to read: safetensors, and an index that says what is in them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from vitkd_cli.files import whole_file, write_text
from vitkd_cli.inspection.kinds import AttentionLayer
from vitkd_cli.inspection.maps import ImageAttention, parse_heads
from vitkd_cli.vit.model import Model


def tensor_name(layer: AttentionLayer, index: int) -> str:
    """``block.03.attention``; ``layer.25.attention``, by its place among all layers, if it is no block's."""
    return f"layer.{index:02d}.attention" if layer.block is None else f"block.{layer.block:02d}.attention"


class Dump:
    """A folder of maps: one file per image and model, written image by image, and ``index.json``.

    At most the chosen maps of one image and model are in memory, as float32.

    Args:
        models: with all their layers, and the indices of those to write.
        preprocessing: how the images were cropped and resized.
        heads: ``mean``, ``all``, or ``0,3``.
    """

    def __init__(
        self,
        folder: Path,
        models: Sequence[tuple[Model, Sequence[AttentionLayer], Sequence[int]]],
        preprocessing: dict[str, Any],
        heads: str,
    ) -> None:
        self.folder, self.chosen = folder, [chosen for _, _, chosen in models]
        self.heads = parse_heads(heads, [layers for _, layers, _ in models])
        self.images: list[dict[str, Any]] = []
        self.models = [
            {
                "model": model.spec.name,
                "weights": model.weights,
                "preprocessing": {key: getattr(model.spec, key) for key in ("input_size", "mean", "std")}
                | preprocessing,
                "patch_grid": model.spec.blocks[-1].grid,
                "prefix_tokens": model.spec.blocks[-1].num_prefix_tokens,
                "class_token": model.spec.class_token,
                "heads": heads,
                "layers": {tensor_name(layers[i], i): _entry(layers[i]) for i in chosen},
            }
            for model, layers, chosen in models
        ]

    def add(self, name: str, size: tuple[int, int], seen: Sequence[ImageAttention]) -> None:
        """Write one image's maps, one file per model.

        Args:
            size: rows and columns of the image file, in pixels.
            seen: what each model attends to, in all its layers.
        """
        files = []
        for model, (one, chosen) in enumerate(zip(seen, self.chosen, strict=True)):
            tensors = {"image": one.image}
            if one.rollout is not None:
                tensors["rollout"] = one.rollout
            for index in chosen:
                if (map_ := one.maps[index]) is not None:
                    heads = map_[[head for head in self.heads if head < len(map_)]]
                    mean = map_.mean(0, keepdims=True)
                    tensors[tensor_name(one.layers[index], index)] = heads if self.heads else mean
            files.append(f"{len(self.images):04d}-{model}.safetensors")
            whole = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
            with whole_file(self.folder / files[-1]) as beside:
                save_file(whole, beside)
        self.images.append({"name": name, "size": size, "files": files})

    def close(self) -> Path:
        """Write the index."""
        path = self.folder / "index.json"
        write_text(path, json.dumps({"models": self.models, "images": self.images}))
        return path


_FACTS = ("path", "block", "kind", "heads", "grid", "key_grid", "prefix", "key_prefix", "why", "mixed")


def _entry(layer: AttentionLayer) -> dict[str, Any]:
    windows = None if layer.windows is None else layer.windows.tolist()
    return {**{key: getattr(layer, key) for key in _FACTS}, "windows": windows}
