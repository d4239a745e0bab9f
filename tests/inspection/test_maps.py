"""Maps against arithmetic that does not pass through the recorder: fused attention off, hooks and patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small import FAMILIES, noise, small
from torch import Tensor, nn

from vitkd_cli.inspection.kinds import AttentionLayer
from vitkd_cli.inspection.maps import attend, attention_layers
from vitkd_cli.vit.model import Model


def maps_by_hand(
    built: Model, layers: tuple[AttentionLayer, ...], images: Tensor, monkeypatch: Any
) -> dict[str, list[Tensor]]:
    """What each module drops out of its attention or, without dropout, what its softmax returns."""
    model = built.net
    found: dict[str, list[Tensor]] = {layer.path: [] for layer in layers}
    inside: list[str] = []
    handles = []
    for layer in layers:
        module = model.get_submodule(layer.path)

        def enter(_module: nn.Module, _args: Any, path: str = layer.path) -> None:
            inside.append(path)

        def leave(_module: nn.Module, _args: Any, _output: Any) -> None:
            inside.pop()

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        dropout = getattr(module, "attn_drop", None)
        if isinstance(dropout, nn.Module):

            def dropped(_module: nn.Module, args: Any, path: str = layer.path) -> None:
                found[path].append(args[0])

            handles.append(dropout.register_forward_pre_hook(dropped))

    softmax = Tensor.softmax

    def record(scores: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = softmax(scores, *args, **kwargs)
        if inside and not isinstance(getattr(model.get_submodule(inside[-1]), "attn_drop", None), nn.Module):
            found[inside[-1]].append(out)
        return out

    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(Tensor, "softmax", record)  # functional and nn.Softmax call it too
        model(images)
    for handle in handles:
        handle.remove()
    return found


def in_place(by_hand: list[Tensor], built: Model, layer: AttentionLayer, images: int) -> Tensor:
    """One map ``[B, heads, ...]`` out of what was dropped or softmaxed."""
    module: Any = built.net.get_submodule(layer.path)
    map_ = torch.stack(by_hand, 1) if len(by_hand) == layer.heads > 1 else by_hand[0]
    if hasattr(module, "_compute_lambda"):  # differential: two maps a head
        first, second = map_.unflatten(1, (layer.heads, 2)).unbind(2)
        return first - module._compute_lambda() * second
    if hasattr(module, "talking_head2"):
        return module.talking_head2(map_)
    if map_.ndim == 3:
        map_ = map_.unflatten(0, (-1, layer.heads))
    if layer.kind == "windows":
        if map_.ndim == 4:
            map_ = map_.unflatten(0, (images, -1)).transpose(1, 2)
        elif type(module).__name__ == "LocallyGroupedAttn":
            map_ = map_.transpose(1, 2)
        return map_
    map_ = map_.squeeze(2) if map_.ndim == 5 else map_  # Nest's last level is a single square
    if hasattr(built.net, "reroll"):
        assert layer.block is not None
        for dim, grid in ((2, layer.grid), (3, layer.key_grid)):
            block = layer.block - (grid != layer.grid)
            order = built.net.reroll(torch.arange(grid[0] * grid[1]).view(1, -1, 1), block).flatten()
            map_ = map_.index_select(dim, order)
    return map_


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_map_is_what_is_attended_with(name, monkeypatch):
    built = small(name)
    layers, images = attention_layers(built), noise(built)
    maps: dict[str, Tensor] = {}
    logits = attend(built, layers, images, lambda layer, map_: maps.__setitem__(layer.path, map_))
    assert torch.equal(logits, built.net(images))
    by_hand = maps_by_hand(built, layers, images, monkeypatch)
    assert maps.keys() == {layer.path for layer in layers if layer.kind != "none"} != set()
    for layer in layers:
        if layer.kind == "none":
            assert layer.why
            continue
        map_ = maps[layer.path]
        assert map_.shape[:2] == (2, layer.heads)
        assert map_.std() > 1e-6
        torch.testing.assert_close(
            map_,
            in_place(by_hand[layer.path], built, layer, 2),
            atol=1e-5,
            rtol=0,
            msg=lambda m, path=layer.path: f"{path}: {m}",
        )
        sums = map_.sum(-1)
        assert ((sums - 1).abs().max() > 1e-3) == layer.mixed
