"""Attention maps, recorded during one ordinary forward with fused attention left on.

softmax(Q K^T / sqrt(d) + bias), ``[B, heads, N, N]``. Where a block attends through PyTorch's fused
call, the map is computed beside it from the same Q, K and bias; elsewhere it is what the block hands
to its ``attn_drop``, which is the map as it is used (CaiT's talking heads mix it after the softmax).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class AttentionRecorder(TorchFunctionMode):
    """Collects every fused attention's map while it is active.

    Attributes:
        maps: what was recorded since it was last cleared.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recording = False
        self.maps: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.recording and func is F.scaled_dot_product_attention:
            self.maps.append(attention_map(*args, **kwargs))
        return func(*args, **kwargs)


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
