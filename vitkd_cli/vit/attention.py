"""Attention maps, recorded during one ordinary forward with fused attention left on.

softmax(Q K^T / sqrt(d) + bias), ``[B, heads, N, N]``, as it is used: what V is multiplied with. Where a
block attends through PyTorch's fused call, the map is computed beside it from the same Q, K and bias.
Elsewhere it is the operand, of the shape of the softmax, of the product that follows; so it is CaiT's and
EfficientFormerV2's after their talking heads, and ConViT's after its gate. Differential
attention (Ye et al. 2024, arXiv:2410.05258) uses one map minus lambda times another.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from vitkd_cli.vit.blocks import SOFTMAX, Event, is_product, same_storage


@dataclass(frozen=True)
class AttentionSpec:
    """One module that attends: what its map relates.

    Attributes:
        path: of the module.
        block: of the model's blocks, counted from 0; None where it is none of them, such as CaiT's class
            attention.
        kind: ``tokens``, every token asks every one; ``reduced``, every token asks fewer keys; ``windows``,
            tokens ask those of their window; ``class``, the class token alone asks; ``channels``, channels
            ask channels; ``none``, there is no map.
        heads: of the map.
        grid, key_grid: rows and columns of the patch tokens that ask, and of those that are asked; the same
            where the class token alone asks.
        prefix, key_prefix: tokens before them.
        class_token: the first query is a class token, or that of a pooling head.
        why: why there is no map; empty if there is one.
    """

    path: str
    block: int | None
    kind: str
    heads: int
    grid: tuple[int, int] = (0, 0)
    key_grid: tuple[int, int] = (0, 0)
    prefix: int = 0
    key_prefix: int = 0
    class_token: bool = False
    why: str = ""


def map_shape(module: nn.Module, events: Sequence[Event]) -> tuple[int, ...]:
    """``[windows, heads, queries, keys]`` of a module's map of one image."""
    scores = [torch.empty(event.scores, device="meta") for event in events]
    if len(scores) == 2 and hasattr(module, "_compute_lambda"):  # the difference of both
        return tuple(scores[0].shape)
    return tuple(used_map(scores, heads_of(module), module).shape)


class AttentionRecorder(TorchFunctionMode):
    """Collects what one attention module computes with while it is active.

    Attributes:
        recording: off between the modules that are listened to.
        maps: the maps in order of their use.
        values: what each was multiplied with, ``[..., keys, d]``.
        qkv: queries, keys and values of every fused call.
    """

    def __init__(self, *, maps: bool, qkv: bool) -> None:
        super().__init__()
        self.wants_maps, self.wants_qkv = maps, qkv
        self.begin(recording=False)

    def begin(self, recording: bool) -> None:
        """Forget what was recorded."""
        self.recording = recording
        self.maps: list[Tensor] = []
        self.values: list[Tensor] = []
        self.qkv: list[tuple[Tensor, Tensor, Tensor]] = []
        self._softmax: Tensor | None = None

    def listen(
        self, module: nn.Module, read: Callable[[Any], None], when: Callable[[], bool] = lambda: True
    ) -> list[RemovableHandle]:
        """Record while a module runs, hand it to ``read``, and forget; ``when`` says whether, each time."""

        def begin(_module: nn.Module, _args: Any) -> None:
            self.begin(recording=when())

        def end(module: nn.Module, _args: Any, _output: Any) -> None:
            self.recording = False
            if when():
                with beside_checkpoints():
                    read(module)
            self.begin(recording=False)

        return [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not self.recording:
            return out
        if func is F.scaled_dot_product_attention:
            self.recording = False  # computing the map is no event
            if self.wants_maps:
                self._softmax = None
                value = args[2] if len(args) > 2 else kwargs["value"]
                with beside_checkpoints():
                    self._keep(attention_map(*args, **kwargs), value)
            if self.wants_qkv:
                query, key, value = (_windows_first(part, args[2]) for part in args[:3])
                self.qkv.append((query, key, value))
            self.recording = True
        elif self.wants_maps and self._softmax is not None and is_product(func, args):
            a, b = (a for a in args if isinstance(a, Tensor))
            self._product(a, b, self._softmax)
        elif func in SOFTMAX:
            self._softmax = out
        return out

    def _product(self, a: Tensor, b: Tensor, softmax: Tensor) -> None:
        def is_map(tensor: Tensor) -> bool:
            return tensor.shape[0] == len(softmax) and tensor.shape[-2:] == softmax.shape[-2:]

        turned = b.transpose(-2, -1)  # v @ map.T
        if is_map(turned) and (not is_map(a) or same_storage(b, softmax)):
            self._keep(turned, a.transpose(-2, -1))
        elif is_map(a):
            self._keep(a, b)
        else:
            return
        self._softmax = None  # the next head's scores are to come

    def _keep(self, map_: Tensor, value: Tensor) -> None:
        self.maps.append(_windows_first(map_, value))
        self.values.append(_windows_first(value, value))


def beside_checkpoints() -> AbstractContextManager[Any]:
    """Whatever is computed here keeps what its own gradient needs, in a block that is checkpointed, too.

    Such a block is run again in the backward pass, without us, and would miss what we added.
    """
    if torch.compiler.is_compiling():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _windows_first(tensor: Tensor, value: Tensor) -> Tensor:
    """Five dimensions with as many heads as windows, windows first: the strides tell which are which.

    A head's channels lie side by side in the output of the layer that made the values.
    """
    if tensor.ndim != 5 or tensor.shape[1] != tensor.shape[2] or value.stride(1) >= value.stride(2):
        return tensor
    return tensor.transpose(1, 2)


def heads_of(attention: Any) -> int:
    """Attention heads, as timm's modules call them."""
    return int(getattr(attention, "num_heads", 0) or getattr(attention, "heads", 0) or 1)


def used_map(maps: list[Tensor], heads: int, attention: Any) -> Tensor:
    """The maps of one attention module as one ``[B, heads, N_q, N_k]``; windows count as images.

    Args:
        maps: as they were used: ``[B, heads, N, N]``; ``[B, N, N]``, heads in the batch or a call each;
            five dimensions, with windows behind or before the heads.
    """
    if len(maps) == 2 and hasattr(attention, "_compute_lambda"):  # differential
        difference: Tensor = maps[0] - attention._compute_lambda().to(maps[0].dtype) * maps[1]
        return difference
    if len(maps) > 1 and len(maps) == heads:
        return torch.stack(maps, dim=1)
    return with_heads(maps[0], heads)


def with_heads(tensor: Tensor, heads: int) -> Tensor:
    """``[B, heads, N, d]`` of one with the heads in the batch, or with windows on either side of them."""
    if tensor.ndim == 3:
        return tensor.unflatten(0, (-1, heads))
    if tensor.ndim == 5:
        tensor = tensor.transpose(1, 2) if tensor.shape[1] == heads != tensor.shape[2] else tensor
        return tensor.flatten(0, 1)
    return tensor


def attention_map(
    query: Tensor,
    key: Tensor,
    value: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The map that ``scaled_dot_product_attention`` uses for the same arguments, before dropout.

    Args:
        query, key: ``[..., N, d]``.
        attn_mask: added to the scores, or boolean with True where attention is allowed.

    Returns:
        ``[..., N_q, N_k]``; rows sum to 1.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            scores = scores.masked_fill(~attn_mask, float("-inf"))
        else:
            scores = scores + attn_mask
    return scores.softmax(-1)
