"""What a model attends to: the map of every module that attends, out of one ordinary forward.

softmax(Q K^T / sqrt(d) + bias), as :mod:`vitkd_cli.vit.attention` records it. Maps are handed on module by
module and never kept, so that memory holds one of them, whatever the number of layers and images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkd_cli.errors import UserError
from vitkd_cli.inspection.layers import Array, AttentionLayer, Look
from vitkd_cli.text import plain
from vitkd_cli.vit.attention import AttentionRecorder, used_map
from vitkd_cli.vit.blocks import is_norm, watch
from vitkd_cli.vit.layout import grid_of, in_rows, split_tokens
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import BlockSpec, ViTSpec, as_seen_by, heads_of, in_unit_range, prefix_counts

Grid = tuple[int, int]
_NO_MAP = (
    "it takes no softmax of queries times keys: its attention is linear, factorised, or of fixed offsets"
)


@torch.no_grad()
def attention_layers(built: Model) -> tuple[AttentionLayer, ...]:
    """Every module that attends, in the order of the forward, and in which geometry; with a map or without.

    Read off a forward of noise, by the shapes of queries, keys and maps.
    """
    model, spec = built.net.eval(), built.spec
    modules = dict(model.named_modules())
    noise = torch.rand(1, len(spec.mean), *spec.input_size, generator=torch.Generator().manual_seed(0))
    image = as_seen_by(spec, noise).to(next(model.parameters()))
    with watch(modules) as trace:
        model(image)
    within = {path: _block_around(path, spec.blocks) for path in trace.events if path}
    with_map = [path for path in within if trace.maps_of(path)]
    shapes, mixed = {}, set()

    def read(path: str, map_: Tensor) -> None:
        shapes[path] = tuple(map_.shape)
        if map_.min() < 0 or (map_.sum(-1) - 1).abs().max() > 1e-3:
            mixed.add(path)

    with _recording(model, with_map, read):
        model(image)
    layers = []
    for path, block in within.items():
        own = next((i for i, b in enumerate(spec.blocks) if b.attention == path), None)
        layer = AttentionLayer(path, own, "none", heads_of(modules[path]), (0, 0), (0, 0), why=_NO_MAP)
        if path in shapes:
            width = trace.maps_of(path)[0].query[-1]
            layer = _geometry(layer, shapes[path], width, spec, prefix_counts(model))
            layers.append(replace(layer, mixed=path in mixed))
        elif block is not None:  # else it is no attention, such as a table of rotations
            layers.append(replace(layer, grid=block.grid, key_grid=block.grid))
    with _windows(built, layers) as found:
        model(image)
    return tuple(replace(layer, windows=found.get(layer.path)) for layer in layers)


def _block_around(path: str, blocks: Sequence[BlockSpec]) -> BlockSpec | None:
    return next((b for b in blocks if b.attention == path or path.startswith(f"{b.path}.")), None)


def _geometry(
    layer: AttentionLayer,
    shape: tuple[int, ...],
    width: int,
    spec: ViTSpec,
    prefixes: Sequence[int],
) -> AttentionLayer:
    """What a map relates.

    Args:
        shape: of the map of one image, ``[windows, heads, queries, keys]``.
        width: of a query.
        prefixes: how many prefix tokens there may be, the likeliest first.
    """
    windows, heads, queries, keys = shape

    def tokens(count: int) -> tuple[Grid, int]:
        """The grid that so many tokens make, and the prefix tokens before it."""
        found = ((grid_of(count - prefix, spec.input_size), prefix) for prefix in prefixes)
        return next(((grid, prefix) for grid, prefix in found if grid), ((0, 0), 0))

    def found(kind: str, grid: Grid, prefix: int, key_grid: Grid, key_prefix: int) -> AttentionLayer:
        return replace(layer, kind=kind, heads=heads, grid=grid, prefix=prefix, key_grid=key_grid,
                       key_prefix=key_prefix, why="")  # fmt: skip

    block = _block_around(layer.path, spec.blocks)
    if block is not None:
        prefixes = (block.num_prefix_tokens, *prefixes)
        grid, prefix = block.grid, block.num_prefix_tokens
        patches = grid[0] * grid[1]
        if windows == 1 and queries == patches + prefix:
            key_grid, key_prefix = (grid, prefix) if keys == queries else tokens(keys)
            return found("tokens" if keys == queries else "reduced", grid, prefix, key_grid, key_prefix)
        if width in (patches, patches + prefix):
            return found("channels", grid, prefix, grid, prefix)
        if windows * queries >= patches:
            asked = block if keys == queries else spec.blocks[spec.blocks.index(block) - 1]  # before pooling
            return found("windows", grid, 0, asked.grid, 0)
    key_grid, key_prefix = tokens(keys)
    if queries <= max(1, *prefixes) and queries < keys:
        return found("class", key_grid, queries, key_grid, key_prefix)
    grid, prefix = tokens(queries)  # pooled before they attend, or on the way to another stage
    if windows == 1 and all(grid) and all(key_grid):
        return found("tokens" if keys == queries else "reduced", grid, prefix, key_grid, key_prefix)
    return replace(layer, why=f"its maps of {queries} by {keys} relate neither tokens, windows nor channels")


@contextmanager
def _windows(built: Model, layers: Iterable[AttentionLayer]) -> Iterator[dict[str, Tensor]]:
    """Which tokens share a window, found by the forward that runs inside the block.

    The input of every block with windows is replaced by the indices of its tokens, in all channels; what
    its attention then multiplies its map with is the indices in the order of its windows, after whatever
    rolling, padding and partition there is.

    Yields:
        module path → ``[windows, n]`` as :attr:`AttentionLayer.windows`, where every token turned up once.
    """
    model, blocks = built.net, built.spec.blocks
    found: dict[str, Tensor] = {}
    recorder = AttentionRecorder(maps=True, qkv=False)
    indices = _Indices(recorder)
    handles: list[Any] = []

    def listen(path: str, block: BlockSpec) -> None:
        position = torch.empty(0)

        def number_tokens(_module: nn.Module, args: tuple[Any, ...]) -> Any:
            nonlocal position
            indices.inside = True
            one = args[0][:, :1] if block.form == "NCHW" else args[0][..., :1]
            ids = torch.arange(1.0, one.numel() + 1, device=one.device).view(one.shape)
            position = torch.full([one.numel() + 1], -1, device=one.device)
            with suppress(UserError):  # TNT's windows are of pixels, within patches
                rows = in_rows(model, ids, block.layout, blocks.index(block))
                tokens = split_tokens(rows, block.layout)[1].flatten().long()
                position[tokens] = torch.arange(len(tokens), device=one.device)
            return (ids.to(one.dtype).expand(args[0].shape).contiguous(), *args[1:])

        def read(module: nn.Module) -> None:
            ids = used_map(recorder.values, heads_of(module), module)[:, 0, :, 0]  # [windows, n]
            windows = position[ids.long()]
            tokens = windows[windows >= 0].sort().values
            if torch.equal(tokens, torch.arange(block.grid[0] * block.grid[1], device=tokens.device)):
                found[path] = windows.cpu()

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            indices.inside = False

        holder = model.get_submodule(block.path)
        handles.append(holder.register_forward_pre_hook(number_tokens))
        handles.extend(recorder.listen(model.get_submodule(path), read))
        handles.append(holder.register_forward_hook(leave))
        for part in holder.modules():
            if is_norm(part):
                handles.append(part.register_forward_hook(lambda _module, args, _output: args[0]))

    for layer in layers:
        block = _block_around(layer.path, blocks)
        if layer.kind == "windows" and block is not None and layer.grid == layer.key_grid:
            listen(layer.path, block)
    try:
        with recorder, indices:
            yield found
    finally:
        for handle in handles:
            handle.remove()


class _Indices(TorchFunctionMode):
    """Lets indices through a block: layers of its attention hand on their first channel, others say nothing.

    Args:
        recorder: records while attention runs.

    Attributes:
        inside: a block runs.
    """

    def __init__(self, recorder: AttentionRecorder) -> None:
        super().__init__()
        self.recorder, self.inside = recorder, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside or func not in (F.linear, F.conv2d):
            return out
        if not self.recorder.recording:
            return torch.zeros_like(out)  # a branch beside the skip
        first = args[0][..., :1] if func is F.linear else args[0][:, :1]
        return first.expand(out.shape).contiguous()


# Maps ---------------------------------------------------------------------------------------------------


def attend(
    built: Model,
    layers: Iterable[AttentionLayer],
    images: Tensor,
    each: Callable[[AttentionLayer, Tensor], None],
) -> Tensor:
    """Run a model on images and hand on the map of every layer as it comes.

    Args:
        images: ``[B, C, H, W]``, normalised.
        each: is handed the map as :attr:`Look.maps` has it, with the images in front, ``[B, heads, ...]``.

    Returns:
        The logits, the model's own to the bit.
    """
    with torch.no_grad(), attending(built, layers, len(images), each):
        logits: Tensor = built.net(images)
    return logits


@contextmanager
def attending(
    built: Model,
    layers: Iterable[AttentionLayer],
    images: int,
    each: Callable[[AttentionLayer, Tensor], None],
) -> Iterator[None]:
    """:func:`attend` for whatever forward of so many images runs inside the block."""
    model, by_path = built.net, {layer.path: layer for layer in layers if layer.kind != "none"}

    def arrange(path: str, used: Tensor) -> None:
        layer = by_path[path]
        if layer.kind == "windows":
            used = used.unflatten(0, (images, -1)).transpose(1, 2)  # [B, heads, windows, n, n]
        elif layer.block is not None:
            asked = layer.block - (layer.key_grid != layer.grid)  # a stage begins: keys of the block before
            for dim, index in ((-2, layer.block), (-1, asked)):
                used = in_rows(model, used, built.spec.blocks[index].layout, index, dims=(dim,))
        each(layer, used)

    with _recording(model, by_path, arrange):
        yield


@contextmanager
def _recording(
    model: nn.Module, paths: Iterable[str], handed: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Hand on the map of every module named, ``[B, heads, N_q, N_k]``, windows counted as images."""
    recorder = AttentionRecorder(maps=True, qkv=False)
    handles: list[Any] = []

    def read(path: str, module: nn.Module) -> None:
        handed(path, used_map(recorder.maps, heads_of(module), module))

    for path in paths:
        handles += recorder.listen(model.get_submodule(path), partial(read, path))
    try:
        with recorder:
            yield
    finally:
        for handle in handles:
            handle.remove()


def distribution(layer: AttentionLayer, map_: Tensor) -> Tensor:
    """Rows that are distributions: of a mixed map its magnitudes, scaled to sum to 1."""
    if not layer.mixed:
        return map_
    return map_.abs() / map_.abs().sum(-1, keepdim=True)


def why_no_rollout(layers: Sequence[AttentionLayer]) -> str:
    """What stands against a rollout; empty if nothing does."""
    first = layers[0]
    for index, layer in enumerate(layers):
        if layer.kind != "tokens":
            return f"layer {index} ({layer.path}) is of the kind {layer.kind}"
        if layer.block is None:
            return f"layer {index} ({layer.path}) is one of two side by side"
        if (layer.grid, layer.prefix) != (first.grid, first.prefix):
            return f"layer {index} ({layer.path}) attends among other tokens than layer 0"
    return ""


def look(
    built: Model,
    layers: tuple[AttentionLayer, ...],
    title: str,
    name: str,
    view: Tensor,
    *,
    truth: str = "",
    dtype: Any = np.float16,
) -> Look:
    """What a model looks at in one image, with the attention rollout where there can be one.

    Rollout (Abnar and Zuidema 2020, arXiv:2005.00928): A' = (mean over heads of A + I) / 2, rows scaled to
    sum to 1, multiplied from the first layer to the last.

    Args:
        view: ``[C, H, W]`` uint8, as the model is to see it.
        truth: the image's class.
        dtype: of the maps.
    """
    maps: dict[str, Array] = {}
    rolls = not why_no_rollout(layers)
    rollout: Tensor | None = None

    def keep(layer: AttentionLayer, map_: Tensor) -> None:
        nonlocal rollout
        maps[layer.path] = map_[0].cpu().numpy().astype(dtype)
        if rolls:
            mean = distribution(layer, map_[0].float()).mean(0)  # [N, N]
            mean = mean + torch.eye(len(mean), device=mean.device)
            mean = mean / mean.sum(-1, keepdim=True)
            rollout = mean if rollout is None else mean @ rollout

    images = in_unit_range(view[None], built.device)
    logits = attend(built, layers, built.normalised(images), keep)
    return Look(
        title=title,
        name=name,
        image=view.expand(3, -1, -1).permute(1, 2, 0).numpy(),
        layers=layers,
        maps=tuple(maps.get(layer.path) for layer in layers),
        rollout=None if rollout is None else rollout.cpu().numpy(),
        class_token=built.spec.class_token,
        says=_answer(built, logits) if built.spec.num_classes else "",
        truth=truth,
    )


def _answer(built: Model, logits: Tensor) -> str:
    """The class named first, and its probability."""
    share, index = logits.float().softmax(-1).max(-1)
    names = built.class_names
    named = plain(names[int(index)]) if names else f"class {int(index)}"
    return f"{named} ({float(share):.0%})"
