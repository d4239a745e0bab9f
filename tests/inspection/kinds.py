"""Attention to draw: of real small models, and of layers of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import timm
import torch
from skimage import data

from vitkd_cli.inspection.kinds import Array, AttentionLayer, OnImage, layer_of
from vitkd_cli.inspection.maps import ImageAttention
from vitkd_cli.vit.attention import AttentionSpec
from vitkd_cli.vit.spec import as_seen_by, describe
from vitkd_cli.vit.taps import Tap, TappedViT

BLANK = np.full((64, 64, 3), (200, 100, 60), np.uint8)


def layer(
    path: str,
    block: int | None,
    kind: str,
    heads: int,
    grid: tuple[int, int],
    key_grid: tuple[int, int],
    prefix: int = 0,
    key_prefix: int = 0,
    *,
    class_token: bool | None = None,
    windows: torch.Tensor | None = None,
    why: str = "",
) -> AttentionLayer:
    """A layer whose first prefix token, where it has one, is a class token."""
    asks = prefix > 0 if class_token is None else class_token
    return layer_of(
        AttentionSpec(path, block, kind, heads, grid, key_grid, prefix, key_prefix, asks, why), windows
    )


def real(title: str, photo: str = "astronaut", *, seed: int = 0, **arguments: Any) -> ImageAttention:
    """What a small ViT with random weights, made to look sharply, sees in a photograph."""
    torch.manual_seed(seed)
    arguments = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3} | arguments
    model = timm.create_model("vit_tiny_patch16_224", **arguments).eval()
    for name, parameter in model.named_parameters():
        parameter.data *= 5 if "qkv.weight" in name or "pos_embed" in name else 1
    spec = describe(model)
    image = getattr(data, photo)()
    side = min(image.shape[:2]) // spec.input_size[0]
    image = image[:: side or 1, :: side or 1][: spec.input_size[0], : spec.input_size[1]]
    batch = torch.as_tensor(image.copy()).permute(2, 0, 1)[None] / 255
    taps = [Tap("attention", index) for index in range(spec.depth)]
    with torch.no_grad():
        signals = TappedViT(model, taps, spec)(as_seen_by(spec, batch))
    prefix = spec.num_prefix_tokens
    layers = [
        layer(b.attention, i, "tokens", b.heads, b.grid, b.grid, prefix, prefix, class_token=spec.class_token)
        for i, b in enumerate(spec.blocks)
    ]
    rollout = torch.eye(signals[taps[0]].shape[-1])
    for tap in taps:
        rollout = (signals[tap][0].mean(0) + torch.eye(len(rollout))) / 2 @ rollout
    maps = tuple(signals[tap][0].half().numpy() for tap in taps)
    return ImageAttention(image, tuple(layers), maps, rollout.numpy(), title=title, name=f"{photo}.png")


def softmax(*shape: int, seed: int = 0) -> Array:
    scores = np.exp(2 * np.random.default_rng(seed).normal(size=shape))
    return (scores / scores.sum(-1, keepdims=True)).astype(np.float16)


def windows(grid: tuple[int, int], size: int, shift: int = 0) -> torch.Tensor:
    """``[windows, size²]``, the windows of a grid that is rolled before it is cut, as Swin's."""
    patches = torch.arange(grid[0] * grid[1]).view(grid).roll((-shift, -shift), (0, 1))
    return patches.unfold(0, size, size).unfold(1, size, size).reshape(-1, size * size)


def every_kind() -> ImageAttention:
    grid = (8, 8)
    padded = windows((8, 8), 4)
    padded[0, 0] = -1
    layers = (
        layer("blocks.0.attn", 0, "tokens", 2, grid, grid, 1, 1),
        layer("blocks.1.attn", 1, "reduced", 4, grid, (2, 4), 1, 1),
        layer("blocks.2.attn", 2, "windows", 3, grid, grid, windows=padded),
        layer("blocks.3.attn", 3, "windows", 3, grid, grid, windows=windows(grid, 4, 2)),
        layer("blocks.4.attn", 4, "channels", 5, grid, grid),
        layer("blocks.5.attn", 5, "none", 0, grid, grid, why="it attends linearly"),
        layer("blocks.6.attn", 6, "windows", 2, grid, grid),
        layer("late.0.attn", None, "class", 4, grid, grid, 1, 1),
    )
    maps = (
        softmax(2, 65, 65, seed=0), softmax(4, 65, 9, seed=1), softmax(3, 4, 16, 16, seed=2),
        softmax(3, 4, 16, 16, seed=3), softmax(5, 6, 6, seed=4), None, softmax(2, 4, 4, 16, seed=6),
        softmax(4, 1, 65, seed=5),
    )  # fmt: skip
    return ImageAttention(BLANK, layers, maps, title="every kind", name="plain")


def hot(kind: str, grid: tuple[int, int], key_grid: tuple[int, int], query: int, key: int) -> ImageAttention:
    """One layer, one head: the patch ``query`` looks at the patch ``key`` alone, the others evenly."""
    map_ = np.full((1, grid[0] * grid[1], key_grid[0] * key_grid[1]), 1 / (key_grid[0] * key_grid[1]))
    map_[0, query] = 0
    map_[0, query, key] = 1
    layers = (layer("blocks.0.attn", 0, kind, 1, grid, key_grid),)
    return ImageAttention(BLANK, layers, (map_.astype(np.float16),), title="one hot", name="plain")


def over_image(seen: ImageAttention, index: int, query: Any) -> Array:
    """What layer ``index`` attends to: ``[heads, rows, columns]``."""
    map_, one = seen.maps[index], seen.layers[index]
    assert map_ is not None and isinstance(one, OnImage)
    return one.over_image(map_, query)
