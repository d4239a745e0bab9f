"""Which tokens share a window, found by a forward in which their indices take the place of their features."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vitkd_cli.errors import UserError
from vitkd_cli.vit.attention import AttentionRecorder, heads_of, used_map
from vitkd_cli.vit.blocks import is_norm
from vitkd_cli.vit.layout import in_rows, split_tokens
from vitkd_cli.vit.model import Model


def windows_of(built: Model, image: Tensor) -> dict[str, Tensor]:
    """Where the tokens of every window lie.

    The input of every block with windows is replaced by the indices of its tokens, in all channels; what
    its attention then multiplies its map with is the indices in the order of its windows, after whatever
    rolling, padding and partition there is.

    Args:
        image: ``[1, C, H, W]``, any one that the model takes.

    Returns:
        module path → ``[windows, n]`` which patch each token is, -1 for padding, where every patch turned up
        once.
    """
    spec, found = built.spec, dict[str, Tensor]()
    recorder = AttentionRecorder(maps=True, qkv=False)
    indices = _Indices(recorder)
    handles: list[Any] = []
    for layer in spec.attention:
        if layer.kind == "windows" and layer.grid == layer.key_grid:
            own = (i for i, b in enumerate(spec.blocks) if f"{layer.path}.".startswith(f"{b.path}."))
            handles += _listen(built, layer.path, next(own), indices, found)
    if handles:
        try:
            with torch.no_grad(), recorder, indices:
                built.net(image)
        finally:
            for handle in handles:
                handle.remove()
    return found


def _listen(built: Model, path: str, index: int, indices: _Indices, found: dict[str, Tensor]) -> list[Any]:
    """Replace a block's input by indices, and read them behind its attention."""
    model, block = built.net, built.spec.blocks[index]
    position = torch.empty(0)

    def number_tokens(_module: nn.Module, args: tuple[Any, ...]) -> Any:
        nonlocal position
        indices.inside = True
        one = args[0][:, :1] if block.form == "NCHW" else args[0][..., :1]
        ids = torch.arange(1.0, one.numel() + 1, device=one.device).view(one.shape)
        position = torch.full([one.numel() + 1], -1, device=one.device)
        with suppress(UserError):  # TNT's windows are of pixels, within patches
            rows = in_rows(model, ids, block.layout, index)
            tokens = split_tokens(rows, block.layout)[1].flatten().long()
            position[tokens] = torch.arange(len(tokens), device=one.device)
        return (ids.to(one.dtype).expand(args[0].shape).contiguous(), *args[1:])

    def read(module: nn.Module) -> None:
        ids = used_map(indices.recorder.values, heads_of(module), module)[:, 0, :, 0]  # [windows, n]
        windows = position[ids.long()]
        tokens = windows[windows >= 0].sort().values
        if torch.equal(tokens, torch.arange(block.grid[0] * block.grid[1], device=tokens.device)):
            found[path] = windows.cpu()

    def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
        indices.inside = False

    holder = model.get_submodule(block.path)
    norms = (part for part in holder.modules() if is_norm(part))
    return [
        holder.register_forward_pre_hook(number_tokens),
        *indices.recorder.listen(model.get_submodule(path), read),
        holder.register_forward_hook(leave),
        *(norm.register_forward_hook(lambda _module, args, _output: args[0]) for norm in norms),
    ]


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
