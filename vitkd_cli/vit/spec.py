"""The facts about a vision transformer, read off the model and never off a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block that carries patch tokens.

    Attributes:
        path: the block's module path inside the model, such as ``blocks.3``.
        dim: width of its tokens.
        grid: rows and columns of its patch tokens.
        heads: attention heads.
        num_prefix_tokens: tokens before the patch tokens in this block's output.
        attention_output: path of the module whose *input* is the residual stream after attention.
    """

    path: str
    dim: int
    grid: tuple[int, int]
    heads: int
    num_prefix_tokens: int
    attention_output: str | None = None


@dataclass(frozen=True)
class ViTSpec:
    """What a term may know of a model: facts, never the model itself.

    Attributes:
        name: the timm name, with its tag where there is one.
        blocks: the blocks that carry patch tokens, from 0.
        num_prefix_tokens: class, distillation and register tokens of the final sequence.
        input_size: rows and columns of the image, in pixels, at which the grids were read.
        mean, std: per channel, for images in [0, 1].
        num_classes: classes of the logits; 0 if the model has no head, or one that embeds.
        embed_dim: width of ``embedding`` (``forward_head(pre_logits=True)``).
        final_dim: width of the tokens after the final norm.
        final_grid: rows and columns of the patch tokens after the final norm.
    """

    name: str
    blocks: tuple[BlockSpec, ...]
    num_prefix_tokens: int
    input_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    num_classes: int
    embed_dim: int = 0
    final_dim: int = 0
    final_grid: tuple[int, int] = (0, 0)

    @property
    def depth(self) -> int:
        return len(self.blocks)


def resample(tokens: Tensor, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """Patch tokens on another grid: bilinear, antialiased where the grid shrinks.

    Args:
        tokens: ``[B, N, D]``, row-major over ``grid``.

    Returns:
        ``[B, N', D]``, row-major over ``to``; the same tensor if the grids agree.
    """
    if grid == to:
        return tokens
    image = tokens.transpose(1, 2).unflatten(2, grid)  # [B, D, H, W]
    image = torch.nn.functional.interpolate(image, size=to, mode="bilinear", antialias=True)
    return image.flatten(2).transpose(1, 2)
