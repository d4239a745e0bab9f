"""Where the tokens of a window lie, against timm's own partitions of an image of indices; and the rollout."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from small import small
from timm.models import maxxvit, swin_transformer, vision_transformer_sam
from torch import Tensor

from vitkd_cli.inspection.maps import attention_layers, image_attention, why_no_rollout


def windows_of(name: str) -> tuple[list[Tensor], list[tuple[int, int]]]:
    layers = [layer for layer in attention_layers(small(name)) if layer.kind == "windows"]
    return [layer.windows for layer in layers if layer.windows is not None], [layer.grid for layer in layers]


def indices(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns).view(1, rows, columns, 1)


@pytest.mark.parametrize(
    "name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224"]
)
def test_swin_rolls_and_partitions(name):
    found, grids = windows_of(name)
    assert grids == [(16, 16), (16, 16), (8, 8), (8, 8)]
    for windows, grid, shift in zip(found, grids, (0, 2, 0, 2), strict=True):
        rolled = torch.roll(indices(*grid), (-shift, -shift), (1, 2))
        by_timm = swin_transformer.window_partition(rolled, (4, 4)).flatten(1)
        assert torch.equal(windows, by_timm)


def test_sam_pads_its_windows():
    [windows], [grid] = windows_of("samvit_base_patch16_224")  # the other block attends everywhere
    assert grid == (16, 16)
    by_timm, padded = vision_transformer_sam.window_partition(indices(16, 16) + 1, 5)
    assert padded == (20, 20)
    assert torch.equal(windows, by_timm.flatten(1) - 1)
    assert (windows == -1).sum() == 20 * 20 - 16 * 16


def test_maxvit_partitions_in_windows_and_in_grids():
    for name in ("test_maxvit", "maxvit_tiny_pm_256"):
        found, grids = windows_of(name)
        assert len(found) == len(grids) > 2
        for index, (windows, grid) in enumerate(zip(found, grids, strict=True)):
            side = math.isqrt(windows.shape[1])
            partition = maxxvit.grid_partition if index % 2 else maxxvit.window_partition
            assert torch.equal(windows, partition(indices(*grid), (side, side)).flatten(1))


def test_hieras_mask_units_are_squares_of_the_image():
    found, grids = windows_of("hiera_tiny_224")
    for windows, (_, columns) in zip(found, [grids[0], grids[2]], strict=True):
        side = math.isqrt(windows.shape[1])
        for window in windows:
            row, column = window // columns, window % columns
            assert len(set(window.tolist())) == side**2
            assert int(row.max() - row.min()) == int(column.max() - column.min()) == side - 1
            assert row.min() % side == column.min() % side == 0
    assert [len(windows) for windows in found] == [4, 4]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("davit_tiny", 2), ("efficientvit_m0", 1), ("gcvit_xxtiny", 4), ("mobilevit_xxs", 9),
        ("nest_tiny", 4), ("sam2_hiera_tiny", 6), ("tiny_vit_5m_224", 1), ("twins_svt_small", 3),
    ],
)  # fmt: skip
def test_every_patch_is_in_one_window_and_windows_are_lattices(name, count):
    found, _ = windows_of(name)
    assert len(found) >= count
    for windows in found:
        patches = windows[windows >= 0]
        assert torch.equal(patches.sort().values, torch.arange(len(patches)))
        columns = math.isqrt(len(patches))
        for window in windows:
            real = window[window >= 0]
            if len(real):
                # a product of rows and columns
                rows, along = torch.unique(real // columns), torch.unique(real % columns)
                assert len(real) == len(rows) * len(along)


def test_where_they_cannot_be_told_nothing_is_said():
    layers = attention_layers(small("tnt_s_patch16_224"))
    assert [layer.kind for layer in layers] == ["windows", "tokens"] * 2
    assert layers[0].windows is None
    pooled = [layer for layer in attention_layers(small("hiera_tiny_224")) if layer.grid != layer.key_grid]
    assert {layer.kind for layer in pooled} == {"windows", "reduced"}
    assert all(layer.windows is None for layer in pooled)


# Rollout ------------------------------------------------------------------------------------------------


def test_rollout_by_hand():
    built = small("vit_tiny_patch16_224")
    built.net.float()
    layers = attention_layers(built)
    view = (torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 255).byte()
    seen = image_attention(built, layers, view, dtype=np.float32)
    by_hand = np.eye(17)
    for map_ in seen.maps:
        assert map_ is not None and map_.dtype == np.float32
        with_identity = (map_.mean(0) + np.eye(17)) / 2
        by_hand = with_identity / with_identity.sum(-1, keepdims=True) @ by_hand
    assert seen.rollout is not None
    np.testing.assert_allclose(seen.rollout, by_hand, atol=1e-6)
    np.testing.assert_allclose(seen.rollout.sum(-1), 1, atol=1e-5)
    assert np.array_equal(seen.image, view.permute(1, 2, 0).numpy())
    assert image_attention(built, layers, view).maps[0].dtype == np.float16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("cait_xxs24_224", "layer 2 .* is of the kind class"),
        ("swin_tiny_patch4_window7_224", "layer 0 .* is of the kind windows"),
        ("pit_ti_224", "layer 2 .* attends among other tokens than layer 0"),
        ("vit_small_patch16_18x2_224", "layer 0 .* is one of two side by side"),
    ],
)
def test_why_there_is_no_rollout(name, reason):
    built = small(name)
    built.net.float()
    layers = attention_layers(built)
    assert re.match(reason, why_no_rollout(layers))
    size = built.spec.input_size
    assert image_attention(built, layers, torch.zeros(3, *size, dtype=torch.uint8)).rollout is None


def test_magnitudes_stand_in_for_mixed_maps():
    built = small("cait_xxs24_224")
    layer = attention_layers(built)[0]
    assert layer.mixed
    map_ = torch.tensor([[[[0.5, -1.5]]]])
    assert torch.equal(layer.distribution(map_), torch.tensor([[[[0.25, 0.75]]]]))
    other = attention_layers(small("vit_tiny_patch16_224"))[0]
    assert other.distribution(map_) is map_
