"""How each family orders its tokens, and the one place where all become rows of a row-major grid."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.errors import UserError


@dataclass(frozen=True)
class Layout:
    """How a module's output holds its tokens.

    Attributes:
        form: ``NLC`` (prefix tokens, then the grid), ``NHWC``, ``NCHW``; ``blocked``, squares of the grid one
            after the other (Nest: ``[B, T, N, C]``); ``interleaved``, every p-th token in the batch
            (MobileViT: ``[B * p * p, N, C]``); ``unrolled``, Hiera's mask units, which its own
            ``reroll`` puts back.
        dim: width of a token.
        grid: rows and columns of the patch tokens.
        prefix: tokens before them.
        item: which of several outputs it is.
    """

    form: str
    dim: int
    grid: tuple[int, int]
    prefix: int = 0
    item: int = 0


def layout_of(
    output: Any,
    size: tuple[int, int],
    *,
    dim: int | None = None,
    prefixes: Iterable[int] = (0,),
    channels_last: bool = False,
) -> Layout | None:
    """Read the layout off the output for one image.

    Args:
        output: a tensor, or several, of which the last fitting one counts: TNT's pixels come before its
            patches.
        size: rows and columns of the image, in pixels.
        dim: width of a token, where it is known.
        prefixes: how many prefix tokens there may be, the likeliest first.
        channels_last: what a 4-D output is where ``dim`` cannot tell.

    Returns:
        None where it carries no grid of tokens.
    """
    if isinstance(output, (tuple, list)):
        for item in reversed(range(len(output))):
            found = layout_of(output[item], size, dim=dim, prefixes=prefixes, channels_last=channels_last)
            if found is not None:
                return Layout(found.form, found.dim, found.grid, found.prefix, item)
        return None
    shape = tuple(getattr(output, "shape", ()))
    if len(shape) == 4:
        return _of_map(shape, size, dim, channels_last)
    if len(shape) != 3 or (dim is not None and shape[2] != dim):
        return None
    images, length, width = shape
    if images > 1:  # of one image
        side = math.isqrt(images)
        grid = grid_of(length, size)
        return None if grid is None else Layout("interleaved", width, (grid[0] * side, grid[1] * side))
    for prefix in dict.fromkeys(prefixes):
        grid = grid_of(length - prefix, size)
        # A class token alone is no grid of one patch.
        if grid is not None and (length - prefix > 1 or prefix):
            return Layout("NLC", width, grid, prefix)
    return None


def _of_map(
    shape: tuple[int, ...], size: tuple[int, int], dim: int | None, channels_last: bool
) -> Layout | None:
    if dim is not None and dim not in (shape[1], shape[3]):
        return None
    if dim is not None and shape[1] != shape[3]:
        channels_last = shape[3] == dim
    if not channels_last:
        return Layout("NCHW", shape[1], shape[2:])  # type: ignore[arg-type]
    rows, columns = shape[1:3]
    if dim is not None and grid_of(rows * columns, size) != (rows, columns):  # Nest's squares of the grid
        outer, inner = grid_of(rows, size), grid_of(columns, size)
        if outer and inner:
            return Layout("blocked", shape[3], (outer[0] * inner[0], outer[1] * inner[1]))
    return Layout("NHWC", shape[3], (rows, columns))


def grid_of(count: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of that many patches in the shape of the image; None if they make no rectangle."""
    if count <= 0:
        return None
    rows, columns = round((count * size[0] / size[1]) ** 0.5), round((count * size[1] / size[0]) ** 0.5)
    return (rows, columns) if rows * columns == count else None


def split_tokens(output: Any, layout: Layout) -> tuple[Tensor, Tensor]:
    """Prefix tokens ``[B, P, D]`` and patch tokens ``[B, N, D]``, row-major, of an output in this layout.

    ``unrolled`` tokens must have been rerolled before.
    """
    tokens: Tensor = output[layout.item] if isinstance(output, (tuple, list)) else output
    rows, columns = layout.grid
    match layout.form:
        case "NCHW":
            tokens = tokens.flatten(2).transpose(1, 2)
        case "NHWC" | "unrolled":
            tokens = tokens.flatten(1, 2)
        case "blocked":
            side = math.isqrt(tokens.shape[1])
            inner = (rows // side, columns // side)
            tokens = tokens.unflatten(2, inner).unflatten(1, (side, side))  # [B, R, C, r, c, D]
            tokens = tokens.transpose(2, 3).flatten(1, 4)
        case "interleaved":
            side = math.isqrt(rows * columns // tokens.shape[1])
            tokens = tokens.unflatten(1, (rows // side, columns // side)).unflatten(0, (-1, side, side))
            tokens = tokens.permute(0, 3, 1, 4, 2, 5).flatten(1, 4)  # [B, R, r, C, c, D] -> [B, N, D]
    prefix = tokens.shape[1] - rows * columns
    if prefix != layout.prefix:
        raise UserError(
            f"{tokens.shape[1]} tokens are not {rows}×{columns} and {layout.prefix} prefix tokens",
            "this model's tokens change shape between images or blocks; distil its logits: labels + kd",
        )
    return tokens[:, :prefix], tokens[:, prefix:]


def in_rows(model: Any, tokens: Any, layout: Layout, block: int, dims: tuple[int, ...] = ()) -> Any:
    """Hiera's mask units in the order of the grid; anything else as it is.

    Args:
        block: whose tokens they are.
        dims: where the tokens are, if not in ``[B, N, D]``.
    """
    if layout.form != "unrolled":
        return tokens
    if not dims:
        return model.reroll(tokens, block)
    count = layout.grid[0] * layout.grid[1]
    for dim in dims:
        if tokens.shape[dim] == count:  # windows and pooled keys keep an order of their own
            order = torch.arange(count, device=tokens.device)
            tokens = tokens.index_select(dim, model.reroll(order.view(1, -1, 1), block).flatten())
    return tokens


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
    image = F.interpolate(image, size=to, mode="bilinear", antialias=True)
    return image.flatten(2).transpose(1, 2)
