"""The facts about a vision transformer, read off the model and never off a table."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.vit.attention import AttentionSpec, heads_of, map_shape
from vitkd_cli.vit.blocks import Block, Trace, transformer_blocks, watch, widths_of
from vitkd_cli.vit.config import classes_of
from vitkd_cli.vit.layout import Layout, grid_of, layout_of

_NO_MAP = (
    "it takes no softmax of queries times keys: its attention is linear, factorised, or of fixed offsets"
)


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block that carries patch tokens.

    Attributes:
        path: the block's module path inside the model, such as ``blocks.3``.
        dim: width of its tokens.
        grid: rows and columns of its patch tokens.
        heads: attention heads; 0 if they cannot be told.
        num_prefix_tokens: tokens before the patch tokens in this block's output.
        form, item: of its :class:`Layout`.
        attention_output: path of the module whose *input* is the residual stream after attention;
            None where there is none, such as where attention and MLP run in parallel.
        middle: the layout of that input.
        attention: path of the module that attends.
        maps: what its attention map relates: ``tokens``, every token with every one; ``reduced``, with
            fewer keys; ``windows``, within each window; ``none``, it has no map of tokens.
        qkv: it attends by one fused call over its tokens, or would with timm's fused attention switched on,
            so queries, keys and values are to be had.
    """

    path: str
    dim: int
    grid: tuple[int, int]
    heads: int = 0
    num_prefix_tokens: int = 0
    attention_output: str | None = None
    form: str = "NLC"
    item: int = 0
    middle: Layout | None = None
    attention: str = ""
    maps: str = "tokens"
    qkv: bool = True

    @property
    def attention_dim(self) -> int:
        """Width of the attention output: MViTv2 may widen its tokens in the MLP."""
        return self.middle.dim if self.middle else self.dim

    @property
    def layout(self) -> Layout:
        return Layout(self.form, self.dim, self.grid, self.num_prefix_tokens, self.item)


@dataclass(frozen=True)
class ViTSpec:
    """What a term may know of a model: facts, never the model itself.

    Attributes:
        name: the timm name, with its tag where there is one.
        blocks: the blocks that carry patch tokens, from 0; blocks of class attention are none of them.
        num_prefix_tokens: class, distillation and register tokens of the final sequence.
        input_size: rows and columns of the image, in pixels, at which the grids were read.
        mean, std: per channel, for images in [0, 1].
        num_classes: classes of the logits; 0 if the model has no head, or one that embeds.
        embed_dim: width of ``embedding`` (``forward_head(pre_logits=True)``); 0 without a head.
        final_dim: width of the tokens after the final norm.
        final_grid: rows and columns of the patch tokens after the final norm; (0, 0) where the model
            ends without any, or in several sequences.
        final_form: of their :class:`Layout`.
        class_token: the first of the prefix tokens is a class token.
        distilled: it has a second head for distillation, which timm's ``set_distilled_training`` opens.
        attention: every module that attends, in the order of the forward.
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
    final_form: str = "NLC"
    class_token: bool = False
    distilled: bool = False
    attention: tuple[AttentionSpec, ...] = ()

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def hierarchical(self) -> bool:
        """Do the blocks carry grids of several sizes, as Swin's do?"""
        return len({block.grid for block in self.blocks}) > 1

    @property
    def final(self) -> Layout:
        return Layout(self.final_form, self.final_dim, self.final_grid, self.num_prefix_tokens)


def describe(model: nn.Module, *, name: str = "", img_size: tuple[int, int] | None = None) -> ViTSpec:
    """Read a model's facts off one forward of a blank image.

    Args:
        model: any timm model, on any device (``meta`` included). Its mode and weights stay.
        name: how to call it; its architecture and tag by default.
        img_size: rows and columns to read it at; the model's own by default.
    """
    from timm.data.model_config import resolve_input_data_config
    from timm.models._input import get_model_input_config

    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    data = resolve_input_data_config(model)
    # The size that the model was built for; for a flexible one, data["input_size"] is its weights'.
    channels, *own_size = get_model_input_config(model)["input_size"]
    size: tuple[int, int] = img_size or (own_size[0], own_size[1])
    name = name or ".".join(p for p in (config.get("architecture"), config.get("tag")) if p)
    parameter = next(model.parameters())
    blank = torch.zeros(1, channels, *size, dtype=parameter.dtype, device=parameter.device)

    modules = dict(model.named_modules())
    trace, final, embed_dim = _traced(model, modules, blank, name)
    prefixes = prefix_counts(model)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    unrolled = hasattr(model, "reroll")
    candidates = transformer_blocks(modules, trace)
    orders = _orders(candidates, modules, trace)
    found = (
        _block_spec(block, modules, trace, size, prefixes, channels_last, unrolled, orders)
        for block in candidates
    )
    blocks = tuple(block for block in found if block is not None)
    if not blocks:
        raise UserError(
            f"{name} has no transformer blocks that carry a grid of tokens",
            "name a vision transformer; logits-only methods need one too",
        )
    end = None
    if isinstance(final, Tensor):
        end = layout_of(final, size, prefixes=prefixes, channels_last=channels_last)
    if end is None:  # PiT ends in its class tokens alone, CrossViT in two sequences
        alone = isinstance(final, Tensor) and final.ndim == 3
        end = Layout("NLC", int(final.shape[-1]) if alone else 0, (0, 0), final.shape[1] if alone else 0)
    class_token = bool(end.prefix) and any("cls_token" in path for path, _ in model.named_parameters())
    attention: dict[str, AttentionSpec] = {}
    for path in filter(None, trace.events):
        attends = _attention_spec(path, modules, trace, blocks, size, prefixes, class_token)
        attention |= {path: attends} if attends else {}
    num_classes = int(getattr(model, "num_classes", 0) or 0)
    if num_classes == config.get("num_classes") and not getattr(model, "tells_classes", False):
        num_classes = classes_of(config)
    return ViTSpec(
        name=name,
        blocks=tuple(_with_its_map(block, attention[block.attention], modules, trace) for block in blocks),
        num_prefix_tokens=end.prefix,
        input_size=size,
        mean=_per_channel(data["mean"], channels),
        std=_per_channel(data["std"], channels),
        num_classes=num_classes,
        embed_dim=embed_dim,
        final_dim=end.dim,
        final_grid=end.grid,
        final_form=end.form,
        class_token=class_token,
        distilled=hasattr(model, "set_distilled_training"),
        attention=tuple(attention.values()),
    )


def _traced(
    model: nn.Module, modules: dict[str, nn.Module], blank: Tensor, name: str
) -> tuple[Trace, Any, int]:
    """One forward of a blank image: what it showed, the final tokens, and the width of the embedding."""
    modes = {module: module.training for module in modules.values()}  # a part may be frozen in eval
    model.eval()
    try:
        with torch.no_grad(), watch(modules) as trace:
            final = model.forward_features(blank)  # type: ignore[operator]
            try:
                width = int(model.forward_head(final, pre_logits=True).shape[-1])  # type: ignore[operator]
            except (NotImplementedError, TypeError):  # an encoder without any head
                width = 0
    except Exception as problem:  # whatever it makes of arguments that it should not have been built with
        rows, columns = blank.shape[-2:]
        raise UserError(
            f"{name} does not take {rows}×{columns} images: {first_line(problem)}",
            "choose a multiple of the patch size, or leave size and arguments to the model",
        ) from problem
    finally:
        for module, training in modes.items():
            module.training = training
    return trace, final, width


def as_seen_by(spec: ViTSpec, images: Tensor) -> Tensor:
    """Images in [0, 1] as this model takes them: its size, its mean, its standard deviation.

    Args:
        images: ``[B, C, H, W]`` in [0, 1].

    Returns:
        ``[B, C, *spec.input_size]``; resized with antialiasing only if the size differs.
    """
    if tuple(images.shape[-2:]) != spec.input_size:
        images = F.interpolate(images, size=spec.input_size, mode="bicubic", antialias=True).clamp(0, 1)
    mean = images.new_tensor(spec.mean).view(-1, 1, 1)
    std = images.new_tensor(spec.std).view(-1, 1, 1)
    return (images - mean) / std


def in_unit_range(images: Any, device: torch.device) -> Tensor:
    """uint8 images on a device, in [0, 1]."""
    moved: Tensor = images.to(device, non_blocking=True).float().div(255)
    return moved


def _block_spec(
    block: Block,
    modules: dict[str, nn.Module],
    trace: Trace,
    size: tuple[int, int],
    prefixes: tuple[int, ...],
    channels_last: bool,
    unrolled: bool,
    orders: dict[tuple[type, str], bool],
) -> BlockSpec | None:
    """A block's facts; None where it carries no grid of tokens, or lets only the class token attend."""
    taken, returned = widths_of(modules[block.mlp]) if block.mlp else (None, None)

    def read(output: Any, dim: int | None, what: str) -> Layout | None:
        last = orders.get((type(modules[block.path]), what), channels_last)
        found = layout_of(output, size, dim=dim, prefixes=prefixes, channels_last=last)
        return replace(found, form="unrolled") if found and unrolled and found.form == "NLC" else found

    layout = read(trace.outputs[block.path], returned, "output")
    if layout is None:
        return None
    events = trace.maps_of(block.attention)
    if events:
        windows, _, queries, _ = map_shape(modules[block.attention], events)
        if windows == 1 and queries <= layout.prefix:
            return None
    middle = None
    before = _before_mlp(block, trace)
    if before is not None:
        middle = read(trace.inputs[before], taken, "middle")
        if middle is None or (middle.grid, middle.prefix) != (layout.grid, layout.prefix):
            before = middle = None
    return BlockSpec(
        path=block.path,
        dim=layout.dim,
        grid=layout.grid,
        heads=heads_of(modules[block.attention]),
        num_prefix_tokens=layout.prefix,
        attention_output=before,
        form=layout.form,
        item=layout.item,
        middle=middle,
        attention=block.attention,
    )


def _attention_spec(
    path: str,
    modules: dict[str, nn.Module],
    trace: Trace,
    blocks: Sequence[BlockSpec],
    size: tuple[int, int],
    prefixes: Sequence[int],
    class_token: bool,
) -> AttentionSpec | None:
    """What the map of a module relates, by its shape for one image; None if it is no attention."""
    events, heads = trace.maps_of(path), heads_of(modules[path])
    index = next((i for i, b in enumerate(blocks) if f"{path}.".startswith(f"{b.path}.")), None)
    around = None if index is None else blocks[index]
    spec = AttentionSpec(path, index if around and around.attention == path else None, "none", heads)
    if not events:  # or a table of rotations, which is in no block
        return replace(spec, grid=around.grid, key_grid=around.grid, why=_NO_MAP) if around else None
    windows, heads, queries, keys = map_shape(modules[path], events)
    if around is not None:
        prefixes = (around.num_prefix_tokens, *prefixes)

    def tokens(count: int) -> tuple[tuple[int, int], int]:
        """The grid that so many tokens make, and the prefix tokens before it."""
        found = ((grid_of(count - prefix, size), prefix) for prefix in prefixes)
        return next(((grid, prefix) for grid, prefix in found if grid), ((0, 0), 0))

    def of(
        kind: str, grid: tuple[int, int], prefix: int, key_grid: tuple[int, int], key_prefix: int
    ) -> AttentionSpec:
        asks = kind == "class" or (kind in ("tokens", "reduced") and class_token and prefix > 0)
        return AttentionSpec(path, spec.block, kind, heads, grid, key_grid, prefix, key_prefix, asks)

    key_grid, key_prefix = tokens(keys)
    if around is not None and index is not None:
        grid, prefix = around.grid, around.num_prefix_tokens
        patches = grid[0] * grid[1]
        if windows == 1 and queries == patches + prefix:
            if keys == queries:
                return of("tokens", grid, prefix, grid, prefix)
            return of("reduced", grid, prefix, key_grid, key_prefix)
        if events[0].query[-1] in (patches, patches + prefix):
            return of("channels", grid, prefix, grid, prefix)
        if windows * queries >= patches:  # where queries are pooled, they ask the tokens of the block before
            return of("windows", grid, 0, grid if keys == queries else blocks[index - 1].grid, 0)
    if queries <= max(1, *prefixes) and queries < keys:
        return of("class", key_grid, queries, key_grid, key_prefix)
    grid, prefix = tokens(queries)  # pooled before they attend, or on the way to another stage
    if windows == 1 and all(grid) and all(key_grid):
        return of("tokens" if keys == queries else "reduced", grid, prefix, key_grid, key_prefix)
    why = f"its maps of {queries} by {keys} relate neither tokens, windows nor channels"
    return replace(spec, why=why)


def _with_its_map(
    block: BlockSpec, attention: AttentionSpec, modules: dict[str, nn.Module], trace: Trace
) -> BlockSpec:
    """A block, and whether its attention relates the tokens of its output."""
    maps, events = attention.kind, trace.maps_of(attention.path)
    same = (attention.grid, attention.prefix) == (block.grid, block.num_prefix_tokens)
    if maps == "channels" or (maps in ("tokens", "reduced") and not same):
        maps = "none"
    unfused = getattr(modules[attention.path], "fused_attn", None) is False  # as timm leaves Swin's
    whole = maps in ("tokens", "windows") and len(events) == 1
    return replace(block, maps=maps, qkv=whole and (events[0].kind == "fused" or unfused))


def _before_mlp(block: Block, trace: Trace) -> str | None:
    """The module that takes the residual stream between attention and MLP: the MLP, or the norm before it."""
    return trace.norm_before.get(block.mlp, block.mlp) if block.mlp else None


def _orders(blocks: list[Block], modules: dict[str, nn.Module], trace: Trace) -> dict[tuple[type, str], bool]:
    """Whether a class of blocks keeps its channels last, told where they are not as many as the rows."""
    orders = {}
    for block in blocks:
        if block.mlp is None:
            continue
        taken, returned = widths_of(modules[block.mlp])
        middle = trace.inputs[_before_mlp(block, trace) or ""]
        for what, output, dim in (("output", trace.outputs[block.path], returned), ("middle", middle, taken)):
            shape: tuple[int, ...] = getattr(output, "shape", ())
            if len(shape) == 4 and shape[1] != shape[3]:
                orders[type(modules[block.path]), what] = shape[3] == dim
    return orders


def prefix_counts(model: nn.Module) -> tuple[int, ...]:
    """How many prefix tokens a sequence may carry: all, none, or as many as the model has class tokens."""
    counts = [int(getattr(model, "num_prefix_tokens", 0) or 0), 0]
    for path, parameter in model.named_parameters():
        if re.search(r"cls_token\w*$", path):
            counts.append(parameter.shape[1] if parameter.ndim == 3 else 1)
    return tuple(counts)


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    return values * channels if len(values) == 1 else values
