"""The facts about a vision transformer, read off the model and never off a table."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkd_cli.errors import UserError
from vitkd_cli.vit.names import classes_of


@dataclass(frozen=True)
class BlockSpec:
    """One transformer block that carries patch tokens.

    Attributes:
        path: the block's module path inside the model, such as ``blocks.3``.
        dim: width of its tokens.
        grid: rows and columns of its patch tokens.
        heads: attention heads; 0 if the attention module does not say.
        num_prefix_tokens: tokens before the patch tokens in this block's output.
        attention_output: path of the module whose *input* is the residual stream after attention;
            None where attention and MLP run in parallel.
    """

    path: str
    dim: int
    grid: tuple[int, int]
    heads: int = 0
    num_prefix_tokens: int = 0
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
        channels_last: 4-D block outputs are [B, H, W, D] rather than [B, D, H, W].
        class_token: the first of the prefix tokens is a class token.
        distilled: it has a second head for distillation, which timm's ``set_distilled_training`` opens.
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
    channels_last: bool = False
    class_token: bool = False
    distilled: bool = False

    @property
    def depth(self) -> int:
        return len(self.blocks)

    @property
    def hierarchical(self) -> bool:
        """Do the blocks carry grids of several sizes, as Swin's do?"""
        return len({block.grid for block in self.blocks}) > 1


def describe(model: nn.Module, *, name: str = "", img_size: tuple[int, int] | None = None) -> ViTSpec:
    """Read a model's facts off one forward of a blank image.

    A transformer block is found, not looked up: an attention event is a fused attention call or a
    product of two activations; climbing from the module that owns it, the first one with another
    child that is an MLP (two or more linear or convolutional layers and no attention) is a block.

    Args:
        model: any timm model, on any device (``meta`` included). Its mode and weights stay.
        name: how to call it; its architecture and tag by default.
        img_size: rows and columns to read it at; the model's own by default.

    Raises:
        UserError: it is not a vision transformer, or does not take that image size.
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
    modes = {module: module.training for module in modules.values()}  # a part may be frozen in eval
    model.eval()
    try:
        with torch.no_grad(), _watch(modules) as trace:
            final = model.forward_features(blank)  # type: ignore[operator]
        with torch.no_grad():
            embed_dim = _width(lambda: model.forward_head(final, pre_logits=True))  # type: ignore[operator]
    except (AssertionError, RuntimeError, IndexError) as problem:
        if img_size is None:
            raise
        raise UserError(
            f"{name} does not take {size[0]}×{size[1]} images: {problem}",
            "choose a multiple of the patch size, or leave the size to the model",
        ) from None
    finally:
        for module, training in modes.items():
            module.training = training

    prefix = int(getattr(model, "num_prefix_tokens", 0) or 0)
    channels_last = getattr(model, "output_fmt", "NCHW") == "NHWC"
    blocks = []
    for path, owner in _transformer_blocks(modules, trace):
        layout = _layout(trace.shapes.get(path, ()), prefix, size, channels_last)
        if layout is None:  # a class-attention block: no patch tokens pass through it
            continue
        dim, grid, block_prefix = layout
        mlp = _mlp(path, modules, trace)
        blocks.append(
            BlockSpec(
                path,
                dim,
                grid,
                heads=int(getattr(modules[owner], "num_heads", 0) or 0),
                num_prefix_tokens=block_prefix,
                attention_output=None if mlp is None else trace.feeders.get(mlp, mlp),
            )
        )
    final_layout = _layout(_shape(final), prefix, size, channels_last)
    if not blocks or final_layout is None:
        raise UserError(
            f"{name} has no transformer blocks that carry a grid of tokens",
            "name a vision transformer; logits-only methods need one too",
        )
    num_classes = int(getattr(model, "num_classes", 0) or 0)
    if num_classes == config.get("num_classes"):
        num_classes = classes_of(config)
    return ViTSpec(
        name=name,
        blocks=tuple(blocks),
        num_prefix_tokens=prefix,
        input_size=size,
        mean=_per_channel(data["mean"], channels),
        std=_per_channel(data["std"], channels),
        num_classes=num_classes,
        embed_dim=embed_dim,
        final_dim=final_layout[0],
        final_grid=final_layout[1],
        channels_last=channels_last,
        class_token=any(path.endswith("cls_token") for path, _ in model.named_parameters()),
        distilled=hasattr(model, "set_distilled_training"),
    )


def with_statistics(spec: ViTSpec, mean: tuple[float, ...] | None, std: tuple[float, ...] | None) -> ViTSpec:
    """The same facts, with other image statistics where given."""
    return replace(spec, mean=mean or spec.mean, std=std or spec.std)


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


def split_tokens(
    output: Tensor, grid: tuple[int, int], num_prefix_tokens: int, channels_last: bool
) -> tuple[Tensor, Tensor]:
    """A block's output as prefix tokens ``[B, P, D]`` and patch tokens ``[B, N, D]``, row-major."""
    if output.ndim == 4:
        output = output.flatten(1, 2) if channels_last else output.flatten(2).transpose(1, 2)
    count = grid[0] * grid[1]
    prefix = output.shape[1] - count
    if prefix != num_prefix_tokens:
        raise UserError(
            f"{output.shape[1]} tokens are not {grid[0]}×{grid[1]} and {num_prefix_tokens} prefix tokens",
            "this model's tokens change shape between images or blocks; distil its logits: labels + kd",
        )
    return output[:, :prefix], output[:, prefix:]


# How the blocks are found ---------------------------------------------------------------------------

_PRODUCTS = {torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass
class _Trace:
    """What one forward showed: who attended, in which order modules ran, who fed whom."""

    attends: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # in order of completion
    feeders: dict[str, str] = field(default_factory=dict)  # module -> sibling whose output it takes


@contextmanager
def _watch(modules: dict[str, nn.Module]) -> Iterator[_Trace]:
    trace = _Trace()
    running: list[str] = [""]
    produced: dict[str, weakref.ref[Tensor]] = {}

    class Events(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is F.scaled_dot_product_attention or (func in _PRODUCTS and _of_activations(args)):
                trace.attends.append(running[-1])
            return func(*args, **(kwargs or {}))

    def enter(path: str) -> Callable[..., None]:
        siblings = path.rpartition(".")[0]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            running.append(path)
            taken = args[0] if args else None
            for other, output in produced.items():
                if other.rpartition(".")[0] == siblings and taken is not None and output() is taken:
                    trace.feeders[path] = other

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            trace.shapes.pop(path, None)
            trace.shapes[path] = _shape(output)
            if isinstance(output, Tensor):
                produced[path] = weakref.ref(output)

        return hook

    handles: list[Any] = []
    for path, module in modules.items():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave(path)))
    try:
        with Events():
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def _of_activations(args: Any) -> bool:
    tensors = [a for a in args if isinstance(a, Tensor)]
    return len(tensors) == 2 and all(t.ndim >= 3 and not isinstance(t, nn.Parameter) for t in tensors)


def _transformer_blocks(modules: dict[str, nn.Module], trace: _Trace) -> list[tuple[str, str]]:
    """(block, the module in it that attends), in the order in which the blocks ran."""
    found: dict[str, str] = {}
    for owner in dict.fromkeys(trace.attends):
        block = owner if owner.rpartition(".")[2].isdigit() else None
        path = owner
        while block is None and path:
            parent = path.rpartition(".")[0]
            if parent and _mlp(parent, modules, trace) is not None:
                block = parent
            path = parent
        if block:
            found.setdefault(block, owner)
    outer = [b for b in found if not any(b.startswith(other + ".") for other in found)]
    order = {path: index for index, path in enumerate(trace.shapes)}
    return [(block, found[block]) for block in sorted(outer, key=lambda path: order.get(path, -1))]


def _mlp(path: str, modules: dict[str, nn.Module], trace: _Trace) -> str | None:
    """The last child of a module to run that is an MLP: layers, and no attention."""
    ran = {
        child: module
        for child in trace.shapes
        if child.rpartition(".")[0] == path and (module := modules[child]) is not None
    }
    mlps = [
        child
        for child, module in ran.items()
        if sum(isinstance(layer, _LAYERS) for layer in module.modules()) >= 2
        and not any(owner == child or owner.startswith(child + ".") for owner in trace.attends)
    ]
    return mlps[-1] if mlps else None


def _layout(
    shape: tuple[int, ...], prefix: int, size: tuple[int, int], channels_last: bool
) -> tuple[int, tuple[int, int], int] | None:
    """(width, grid, prefix tokens) of a block's output; None where it carries no grid of tokens."""
    if len(shape) == 4:
        _, rows, columns, dim = shape if channels_last else (shape[0], *shape[2:], shape[1])
        return dim, (rows, columns), 0
    if len(shape) != 3:
        return None
    _, length, dim = shape
    for count in dict.fromkeys((prefix, 0)):
        rows = round(((length - count) * size[0] / size[1]) ** 0.5) if length > count else 0
        columns = (length - count) // rows if rows else 0
        # A class token alone is no grid of one patch.
        if columns and rows * columns == length - count and (length - count > 1 or count):
            return dim, (rows, columns), count
    return None


def _shape(output: Any) -> tuple[int, ...]:
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return tuple(output.shape) if isinstance(output, Tensor) else ()


def _width(forward: Callable[[], Tensor]) -> int:
    try:
        return int(forward().shape[-1])
    except NotImplementedError:  # an encoder without any head
        return 0


def _per_channel(values: Any, channels: int) -> tuple[float, ...]:
    values = tuple(float(v) for v in values)
    return values * channels if len(values) == 1 else values
