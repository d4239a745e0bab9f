"""What attends in a vision transformer, in which geometry; and what one model looked at in one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One module that attends; a model's are in the order of its forward.

    Attributes:
        path: of the module.
        block: of :class:`vitkd_cli.vit.spec.ViTSpec`, counted from 0; None where it is none of its blocks,
            such as CaiT's class attention.
        kind: ``tokens``, every token asks every one; ``reduced``, every token asks fewer keys; ``windows``,
            tokens ask those of their window; ``class``, the class token alone asks; ``channels``, channels
            ask channels; ``none``, there is no map.
        heads: of the map.
        grid, key_grid: rows and columns of the patch tokens that ask, and of those that are asked; the same
            where the class token alone asks.
        prefix, key_prefix: tokens before them.
        windows: ``[windows, n]`` which patch of the grid each token of a window is, -1 for padding; None
            where it is no map of windows, or one that pools its queries.
        why: why there is no map; empty if there is one.
        mixed: its rows need not sum to 1, nor be positive: talking heads mix the maps of the heads after
            the softmax, differential attention takes one map from another.
    """

    path: str
    block: int | None
    kind: str
    heads: int
    grid: tuple[int, int]
    key_grid: tuple[int, int]
    prefix: int = 0
    key_prefix: int = 0
    windows: Tensor | None = None
    why: str = ""
    mixed: bool = False


@dataclass(frozen=True, eq=False)
class Look:
    """What one model looked at in one image.

    Attributes:
        title: the model, as pictures call it.
        name: the image, as pictures call it.
        image: ``[H, W, 3]`` uint8, as the model saw it.
        layers: what attends.
        maps: one per layer, float16 (float32 for a dump), softmax(QK^T/sqrt(d) + bias):
            ``[heads, N_q, N_k]``; of windows ``[heads, windows, n_q, n_k]``; over channels ``[heads, d, d]``;
            None where there is none.
        rollout: ``[N, N]`` float32 (Abnar and Zuidema 2020, arXiv:2005.00928); None where some layer has no
            map of tokens.
        class_token: where there are prefix tokens, the first is a class token and no register.
        says: the class that the model names, and how sure it is; empty without classes.
        truth: the image's own class; empty where nobody knows it.
    """

    title: str
    name: str
    image: Array
    layers: tuple[AttentionLayer, ...]
    maps: tuple[Array | None, ...]
    rollout: Array | None = None
    class_token: bool = True
    says: str = ""
    truth: str = ""
