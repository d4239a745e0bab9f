"""What a model attends to: the map of every module that attends, out of one ordinary forward.

softmax(Q K^T / sqrt(d) + bias), as :mod:`vitkd_cli.vit.attention` records it. Maps are handed on module by
module and never kept, so that memory holds one of them, whatever the number of layers and images.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.inspection.kinds import Array, AttentionLayer, Query, TokenMap, layer_of
from vitkd_cli.inspection.windows import windows_of
from vitkd_cli.text import plain
from vitkd_cli.vit.attention import AttentionRecorder, heads_of, used_map
from vitkd_cli.vit.layout import in_rows, split_tokens
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import in_unit_range


@torch.no_grad()
def attention_layers(built: Model) -> tuple[AttentionLayer, ...]:
    """Every module that attends, in the order of the forward, with a map or without.

    A forward of noise shows whose rows do not sum to 1, another where windows lie, if there are any.
    """
    spec = built.spec
    noise = torch.rand(1, len(spec.mean), *spec.input_size, generator=torch.Generator().manual_seed(0))
    image = built.normalised(noise).to(next(built.net.parameters()))
    built.net.eval()
    layers, mixed = tuple(map(layer_of, spec.attention)), set()

    def check(layer: AttentionLayer, map_: Tensor) -> None:
        if map_.min() < 0 or (map_.sum(-1) - 1).abs().max() > 1e-3:
            mixed.add(layer.path)

    attend(built, layers, image, check)
    windows = windows_of(built, image)
    return tuple(layer_of(fact, windows.get(fact.path), mixed=fact.path in mixed) for fact in spec.attention)


def attend(
    built: Model,
    layers: Iterable[AttentionLayer],
    images: Tensor,
    on_map: Callable[[AttentionLayer, Tensor], None],
    on_block: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Run a model on images and hand on the map of every layer as it comes.

    Args:
        images: ``[B, C, H, W]``, normalised.
        on_map: is handed the map as :attr:`ImageAttention.maps` has it, with the images in front,
            ``[B, heads, ...]``.
        on_block: is handed the patch tokens of every block's output, ``[B, N, D]``, by the block's index.

    Returns:
        The logits, the model's own to the bit.
    """
    model, blocks = built.net, built.spec.blocks
    recorder = AttentionRecorder(maps=True, qkv=False)
    handles: list[Any] = []

    def read_map(layer: AttentionLayer, module: nn.Module) -> None:
        used = used_map(recorder.maps, heads_of(module), module)  # windows count as images
        on_map(layer, layer.arranged(used, len(images), built))

    def read_block(index: int, _module: nn.Module, _args: Any, output: Any) -> None:
        tokens = in_rows(model, output, blocks[index].layout, index)
        assert on_block is not None
        on_block(index, split_tokens(tokens, blocks[index].layout)[1])

    for layer in layers:
        if not layer.why:
            handles += recorder.listen(model.get_submodule(layer.path), partial(read_map, layer))
    for index, block in enumerate(blocks if on_block else ()):
        hook = partial(read_block, index)
        handles.append(model.get_submodule(block.path).register_forward_hook(hook))
    try:
        with torch.no_grad(), recorder:
            logits: Tensor = model(images)
    finally:
        for handle in handles:
            handle.remove()
    return logits


# One image ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ImageAttention:
    """What one model attends to in one image.

    Attributes:
        image: ``[H, W, 3]`` uint8, as the model saw it.
        layers: what attends.
        maps: one per layer, float16 (float32 for a dump), softmax(QK^T/sqrt(d) + bias):
            ``[heads, N_q, N_k]``; of windows ``[heads, windows, n_q, n_k]``; over channels ``[heads, d, d]``;
            None where there is none.
        rollout: ``[N, N]`` float32 (Abnar and Zuidema 2020, arXiv:2005.00928); None where some layer has no
            map of tokens.
        prediction: the class that the model names, and how sure it is; empty without classes.
        title, name: model and image, as pictures call them.
        truth: the image's own class; empty where nobody knows it.
    """

    image: Array
    layers: tuple[AttentionLayer, ...]
    maps: tuple[Array | None, ...]
    rollout: Array | None = None
    prediction: str = ""
    title: str = ""
    name: str = ""
    truth: str = ""

    def chosen(self, indices: Sequence[int]) -> ImageAttention:
        """The same with some of its layers; windows that have no place on the image say so instead."""
        layers = tuple(self.layers[index].placed() for index in indices)
        maps = (self.maps[index] for index in indices)
        kept = (None if layer.why else map_ for layer, map_ in zip(layers, maps, strict=True))
        return replace(self, layers=layers, maps=tuple(kept))

    def rolled_out(self) -> ImageAttention:
        """The same with its rollout as its one layer, of one head."""
        if self.rollout is None:
            raise ValueError(f"{self.title} has no rollout")
        layer = replace(self.layers[0], path="rollout", block=None, heads=1)
        return replace(self, layers=(layer,), maps=(self.rollout[None],))


def why_no_rollout(layers: Sequence[AttentionLayer]) -> str:
    """What stands against a rollout; empty if nothing does."""
    first = layers[0]
    for index, layer in enumerate(layers):
        if not isinstance(layer, TokenMap):
            return f"layer {index} ({layer.path}) is of the kind {layer.kind}"
        if layer.block is None:
            return f"layer {index} ({layer.path}) is one of two side by side"
        if (layer.grid, layer.prefix) != (first.grid, first.prefix):
            return f"layer {index} ({layer.path}) attends among other tokens than layer 0"
    return ""


def image_attention(
    built: Model,
    layers: tuple[AttentionLayer, ...],
    view: Tensor,
    dtype: Any = np.float16,
    **called: str,
) -> ImageAttention:
    """What a model attends to in one image, with the attention rollout where there can be one.

    Rollout (Abnar and Zuidema 2020, arXiv:2005.00928): A' = (mean over heads of A + I) / 2, rows scaled to
    sum to 1, multiplied from the first layer to the last.

    Args:
        view: ``[C, H, W]`` uint8, as the model is to see it.
        dtype: of the maps.
        called: ``title``, ``name`` and ``truth``, as :class:`ImageAttention` has them.
    """
    maps: dict[str, Array] = {}
    rolls = not why_no_rollout(layers)
    rollout: Tensor | None = None

    def keep(layer: AttentionLayer, map_: Tensor) -> None:
        nonlocal rollout
        maps[layer.path] = map_[0].cpu().numpy().astype(dtype)
        if rolls:
            mean = layer.distribution(map_[0].float()).mean(0)  # [N, N]
            mean = mean + torch.eye(len(mean), device=mean.device)
            mean = mean / mean.sum(-1, keepdim=True)
            rollout = mean if rollout is None else mean @ rollout

    images = in_unit_range(view[None], built.device)
    logits = attend(built, layers, built.normalised(images), keep)
    return ImageAttention(
        image=view.expand(3, -1, -1).permute(1, 2, 0).numpy(),
        layers=layers,
        maps=tuple(maps.get(layer.path) for layer in layers),
        rollout=None if rollout is None else rollout.cpu().numpy(),
        prediction=_prediction(built, logits) if built.spec.num_classes else "",
        **called,
    )


def _prediction(built: Model, logits: Tensor) -> str:
    """The class with the highest probability, and that probability."""
    share, index = logits.float().softmax(-1).max(-1)
    names = built.class_names
    named = plain(names[int(index)]) if names else f"class {int(index)}"
    return f"{named} ({float(share):.0%})"


# What is to be shown of it ------------------------------------------------------------------------------


def parse_query(text: str, models: Sequence[Sequence[AttentionLayer]]) -> Query:
    """``ROW,COL``, on the first grid of the first model that has one, as a point: grids differ."""
    if text in ("cls", "all"):
        return text
    if not re.fullmatch(r"\d+,\d+", text):
        raise UserError(f"--query {text}: neither cls, all nor ROW,COL", "such as --query 3,5")
    row, column = map(int, text.split(","))
    grids = [layer.grid for layers in models for layer in layers if layer.patch_queries]
    rows, columns = grids[0] if grids else (row + 1, column + 1)
    if row >= rows or column >= columns:
        raise UserError(
            f"--query {text}: the grid of patches ends at {rows - 1},{columns - 1}", "rows and columns from 0"
        )
    return (row + 0.5) / rows, (column + 0.5) / columns


def parse_heads(text: str, models: Sequence[Sequence[AttentionLayer]]) -> tuple[int, ...]:
    """The single heads that ``mean``, ``all`` or ``0,3`` name: of ``mean`` none."""
    most = max(layer.heads for layers in models for layer in layers)
    if text in ("mean", "all"):
        return tuple(range(most)) if text == "all" else ()
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise UserError(f"--heads {text}: neither mean, all nor numbers", "such as --heads 0,3")
    heads = tuple(map(int, text.split(",")))
    if max(heads) >= most:
        raise UserError(f"--heads {text}: the last head is {most - 1}", "heads count from 0")
    return heads


def parse_layers(text: str, layers: Sequence[AttentionLayer], name: str) -> list[int]:
    """Indices of a model's layers from ``all`` or ``0,1,-1``."""
    if text == "all":
        return list(range(len(layers)))
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise UserError(f"--layers {text}: neither all nor numbers", "such as --layers 0,1,-1")
    indices = [int(part) for part in text.split(",")]
    for index in indices:
        if not -len(layers) <= index < len(layers):
            raise UserError(
                f"--layers {index}: {name} has {len(layers)} layers that attend",
                f"0 to {len(layers) - 1}, or -1 to {-len(layers)} from the end",
            )
    return list(dict.fromkeys(index % len(layers) for index in indices))
