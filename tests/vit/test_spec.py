"""The facts of a model, at any size, and tokens and images brought to another one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from vitkd_cli import UserError
from vitkd_cli.vit.layout import Layout, layout_of, resample, split_tokens
from vitkd_cli.vit.spec import as_seen_by, describe
from vitkd_cli.vit.taps import FINAL, TappedViT, features

SLIM = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}


def make(name: str = "vit_tiny_patch16_224", **arguments) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{**SLIM, **arguments}).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_base_patch16_siglip_224"])
def test_the_grid_of_an_oblong_image_is_row_major(name):
    model = make(name, img_size=(32, 48))
    images = torch.randn(2, 3, 32, 48)
    spec = describe(model)
    assert (spec.input_size, spec.blocks[1].grid, spec.final_grid) == ((32, 48), (8, 12), (8, 12))
    signals = TappedViT(model, [features(1), FINAL], spec)(images)
    _, maps = model.forward_intermediates(images)  # [B, D, 8, 12]
    assert torch.equal(signals[features(1)].unflatten(1, (8, 12)).permute(0, 3, 1, 2), maps[1])


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (48, 48), (32, 64)])
def test_a_flexible_model_is_described_at_the_size_asked_for(size):
    model = make("vit_tiny_patch16_dinov3_qkvb")
    spec = describe(model, img_size=size)
    grid = (size[0] // 4, size[1] // 4)
    assert (spec.input_size, spec.final_grid) == (size, grid)
    assert {block.grid for block in spec.blocks} == {grid}
    signals = TappedViT(model, [features(0), FINAL], spec)(torch.randn(1, 3, *size))
    assert signals[features(0)].shape == signals[FINAL].shape == (1, grid[0] * grid[1], 48)


def test_a_model_of_one_size_refuses_another():
    with pytest.raises(UserError, match="vit_tiny_patch16_224 does not take 48×48 images") as refused:
        describe(make(), name="vit_tiny_patch16_224", img_size=(48, 48))
    assert refused.value.hint


def test_tokens_behind_a_convolutional_stem():
    model = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, depth=2, num_classes=10)
    spec = describe(model.eval())
    assert (spec.depth, spec.final_grid, spec.num_prefix_tokens) == (2, (2, 2), 1)
    assert spec.blocks[0].path == "blocks.0" and spec.blocks[0].attention_output == "blocks.0.norm2"


@pytest.mark.parametrize(
    "name", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224"]
)
def test_a_model_without_storage_tells_the_same_facts(name):
    with torch.device("meta"):
        weightless = make(name)
    assert next(weightless.parameters()).is_meta
    assert describe(weightless) == describe(make(name))


def test_a_part_that_is_frozen_in_eval_stays_so():
    model = make().train()
    model.blocks[0].eval()
    before = {path: module.training for path, module in model.named_modules()}
    assert len(set(before.values())) == 2
    describe(model)
    assert {path: module.training for path, module in model.named_modules()} == before


def test_a_refused_size_leaves_the_model_as_it_was():
    model = make().train()
    with pytest.raises(UserError):
        describe(model, img_size=(48, 48))
    assert model.training and model.blocks[1].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_images_are_normalised_after_they_are_resized():
    spec = replace(describe(make()), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    assert spec.input_size == (32, 32)
    grey = torch.tensor([0.75, 0.5, 0.25]).view(1, 3, 1, 1).expand(2, 3, 80, 40)
    wanted = torch.tensor([0.5, 1.0, 0.25]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    torch.testing.assert_close(as_seen_by(spec, grey), wanted)
    # bicubic overshoots at an edge; a pixel brighter than white is none
    edge = torch.zeros(1, 3, 64, 64)
    edge[..., 31:] = 1
    seen = as_seen_by(spec, edge)[:, 2]  # mean 0, standard deviation 1
    assert seen.min() == 0 and seen.max() == 1


def test_images_of_the_right_size_are_not_touched():
    spec = replace(describe(make()), mean=(0.0,) * 3, std=(1.0,) * 3)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(as_seen_by(spec, images), images)


def triangle(of: int, to: int) -> Tensor:
    """Antialiased linear resampling as a matrix ``[to, of]``: a triangle as wide as the step, normalised."""
    step = max(of / to, 1.0)
    centres = (torch.arange(to) + 0.5) * of / to
    distance = (torch.arange(of) + 0.5 - centres[:, None]).abs() / step
    weights = (1 - distance).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("grid", "to"), [((8, 6), (4, 3)), ((6, 8), (2, 5)), ((3, 4), (6, 8)), ((4, 6), (8, 3))]
)
def test_tokens_are_resampled_as_by_hand(grid, to):
    tokens = torch.randn(2, grid[0] * grid[1], 5)
    by_hand = torch.einsum(
        "ir,jc,brcd->bijd", triangle(grid[0], to[0]), triangle(grid[1], to[1]), tokens.unflatten(1, grid)
    )
    torch.testing.assert_close(resample(tokens, grid, to), by_hand.flatten(1, 2))


def test_no_token_is_skipped_when_the_grid_shrinks():
    for place in range(64):
        spike = torch.zeros(1, 64, 1)
        spike[0, place] = 1
        assert resample(spike, (8, 8), (2, 2)).sum() > 0.005, place  # plain bilinear skips all but 16


def test_tokens_that_do_not_fit_their_grid_are_refused():
    before, patches = split_tokens(torch.arange(14.0).view(1, 7, 2), Layout("NLC", 2, (2, 3), prefix=1))
    assert before.flatten().tolist() == [0, 1] and patches.shape == (1, 6, 2)
    with pytest.raises(UserError, match="8 tokens are not 2×3 and 1 prefix tokens"):
        split_tokens(torch.zeros(1, 8, 2), Layout("NLC", 2, (2, 3), prefix=1))


def test_maps_become_rows_of_tokens_in_both_layouts():
    image = torch.arange(24.0).view(1, 2, 3, 4)  # [B, D, H, W]
    _, tokens = split_tokens(image, Layout("NCHW", 2, (3, 4)))
    _, same = split_tokens(image.permute(0, 2, 3, 1), Layout("NHWC", 2, (3, 4)))
    assert torch.equal(tokens, same)
    assert tokens[0, 4 * 1 + 2].tolist() == image[0, :, 1, 2].tolist()  # row 1, column 2


def test_squares_of_the_grid_become_rows():
    grid = torch.arange(36.0).view(1, 6, 6, 1)
    squares = grid.unflatten(2, (2, 3)).unflatten(1, (2, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    layout = layout_of(squares.expand(-1, -1, -1, 5), (96, 96), dim=5)
    assert squares.shape == (1, 4, 9, 1) and layout == Layout("blocked", 5, (6, 6))
    _, tokens = split_tokens(squares, Layout("blocked", 1, (6, 6)))
    assert tokens.flatten().tolist() == list(range(36))


def test_tokens_in_the_batch_become_rows():
    grid = torch.arange(24.0).view(4, 6)
    parts = torch.stack([grid[i::2, j::2].flatten() for i in (0, 1) for j in (0, 1)])[..., None]  # [4, 6, 1]
    layout = layout_of(parts, (64, 96))
    assert layout == Layout("interleaved", 1, (4, 6))
    _, tokens = split_tokens(torch.cat([parts, parts + 24]), layout)
    assert tokens[1].flatten().tolist() == list(range(24, 48))


@pytest.mark.parametrize(
    ("shape", "options", "wanted"),
    [
        ((1, 197, 8), {"prefixes": (1, 0)}, Layout("NLC", 8, (14, 14), 1)),
        ((1, 198, 8), {"prefixes": (0, 2)}, Layout("NLC", 8, (14, 14), 2)),
        ((1, 1, 8), {"prefixes": (1, 0)}, None),  # a class token alone
        ((1, 2, 8), {"prefixes": (0, 2)}, None),  # two of them are no grid of 1×2
        ((1, 196, 8), {"dim": 16}, None),
        ((1, 8, 14, 14), {"dim": 8}, Layout("NCHW", 8, (14, 14))),
        ((1, 14, 14, 8), {"dim": 8}, Layout("NHWC", 8, (14, 14))),
        ((1, 8, 8, 8), {"dim": 8, "channels_last": True}, Layout("NHWC", 8, (8, 8))),
        ((1, 8), {}, None),
    ],
)
def test_layouts(shape, options, wanted):
    assert layout_of(torch.zeros(shape), (224, 224), **options) == wanted


def test_of_several_outputs_the_last_fitting_one_counts():
    pixels, patches = torch.zeros(196, 16, 24), torch.zeros(1, 197, 384)
    found = layout_of([pixels, patches], (224, 224), dim=384, prefixes=(1, 0))
    assert found == Layout("NLC", 384, (14, 14), 1, item=1)
    assert layout_of((patches, (14, 14)), (224, 224), dim=384, prefixes=(1,)).item == 0


def test_a_product_with_values_as_wide_as_there_are_keys_is_no_second_map():
    spec = describe(timm.create_model("levit_256d", img_size=128))  # 64 tokens, values of 64 channels
    assert {block.maps for block in spec.blocks} == {"tokens", "reduced"}
