"""Recorded attention maps against arithmetic that does not pass through the recorder."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_cli import UserError
from vitkd_cli.vit.attention import attention_map
from vitkd_cli.vit.taps import LOGITS, Tap, TappedViT

SLIM = {"img_size": 32, "patch_size": 4, "depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10}
# The second block's windows are shifted: its mask counts.
SWIN = {
    "img_size": 32,
    "num_classes": 10,
    "depths": (2,),
    "embed_dim": 24,
    "num_heads": (2,),
    "window_size": 4,
}


def make(name: str, arguments: dict[str, object]) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for parameter in model.parameters():  # else many maps are all but uniform
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def recorded(model: nn.Module, block: int) -> tuple[Tensor, Tensor, nn.Module]:
    """The tap's map ``[B, heads, N, N]``, the tokens its attention took ``[B, N, D]``, and that attention."""
    tapped = TappedViT(model, [Tap("attention", block), LOGITS])
    attention = model.get_submodule(tapped.spec.blocks[block].path).attn
    taken: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _module, args: taken.append(args[0]))
    images = torch.randn(2, 3, *tapped.spec.input_size)
    signals = tapped(images)
    handle.remove()
    assert torch.equal(signals[LOGITS], model(images))
    return signals[Tap("attention", block)], taken[0], attention


def heads_of(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-3, -2)  # [B, N, D] -> [B, heads, N, d]


@torch.no_grad()
@pytest.mark.parametrize(
    "name", ["deit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch14_reg4_dinov2"]
)
def test_softmax_of_scaled_products(name):
    attended, tokens, attention = recorded(make(name, SLIM), 1)
    query, key, _ = (heads_of(part, 3) for part in attention.qkv(tokens).chunk(3, -1))
    by_hand = torch.einsum("bhnd,bhmd->bhnm", query, key).div(16**0.5).softmax(-1)
    assert attended.std() > 1e-3  # not uniform: there is something to compare
    torch.testing.assert_close(attended, by_hand, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_talking_heads_are_mixed_before_and_after_the_softmax():
    attended, tokens, attention = recorded(make("cait_xxs24_224", SLIM), 1)
    query, key, _ = (heads_of(part, 3) for part in attention.qkv(tokens).chunk(3, -1))
    scores = torch.einsum("bhnd,bhmd->bhnm", query, key) / 16**0.5
    mixed = torch.einsum("gh,bhnm->bgnm", attention.proj_l.weight, scores)
    mixed = (mixed + attention.proj_l.bias[:, None, None]).softmax(-1)
    used = torch.einsum("gh,bhnm->bgnm", attention.proj_w.weight, mixed)
    used = used + attention.proj_w.bias[:, None, None]
    torch.testing.assert_close(attended, used, atol=1e-5, rtol=1e-4)
    assert (attended.sum(-1) - 1).abs().max() > 1e-2  # so it is the used map, not the softmax


@torch.no_grad()
def test_cosine_attention_in_windows():
    attended, tokens, attention = recorded(make("swinv2_tiny_window8_256", SWIN), 0)
    assert attended.shape == (2 * 4, 2, 16, 16)  # four windows of 4×4 an image
    bias = torch.cat((attention.q_bias, torch.zeros(24), attention.v_bias))
    query, key, _ = (heads_of(p, 2) for p in F.linear(tokens, attention.qkv.weight, bias).chunk(3, -1))
    cosine = torch.einsum("bhnd,bhmd->bhnm", query / query.norm(dim=-1, keepdim=True), key)
    cosine = cosine / key.norm(dim=-1)[..., None, :]
    table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, 2)  # [(2·4-1)², heads]
    position = 16 * table[attention.relative_position_index].sigmoid().permute(2, 0, 1)
    by_hand = (cosine * attention.logit_scale.exp().clamp(max=100) + position).softmax(-1)
    torch.testing.assert_close(attended, by_hand, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_shifted_windows_do_not_attend_across_the_border(name):
    model = make(name, SWIN)
    plain, _, _ = recorded(model, 0)
    shifted, _, _ = recorded(model, 1)
    for attended in (plain, shifted):
        torch.testing.assert_close(attended.sum(-1), torch.ones(8, 2, 16))
    assert (plain > 0).all()
    first, *_, last = shifted.unflatten(0, (2, 4))[0]  # windows of the first image, row-major
    assert (first > 0).all()  # an inner window is one piece of the image
    # The last one is put together of four corners, 2×2 tokens each: a token sees its own corner only.
    corner = torch.tensor([[2 * (i // 8) + (i % 4) // 2 for i in range(16)]])
    assert torch.equal(last[0] > 1e-20, corner == corner.T)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_map_is_the_one_that_fused_attention_uses(scale):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 4, 7, 8) for _ in range(3))
    allowed = torch.rand(2, 1, 7, 7) < 0.6
    allowed |= torch.eye(7, dtype=torch.bool)
    grouped = {"key": key[:, :2], "value": value[:, :2], "enable_gqa": True}
    for options in (
        {},
        {"attn_mask": torch.randn(7, 7)},
        {"attn_mask": allowed},
        {"is_causal": True},
        grouped,
    ):
        arguments = {"query": query, "key": key, "value": value, "scale": scale, **options}
        by_torch = F.scaled_dot_product_attention(**arguments)
        values = arguments["value"].repeat_interleave(4 // arguments["value"].shape[1], dim=1)
        torch.testing.assert_close(attention_map(**arguments) @ values, by_torch, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_dropout_is_no_part_of_the_map():
    model = make("deit_tiny_patch16_224", {**SLIM, "attn_drop_rate": 0.5}).train()
    attended = TappedViT(model, [Tap("attention", 0)])(torch.randn(1, 3, 32, 32))[Tap("attention", 0)]
    torch.testing.assert_close(attended.sum(-1), torch.ones(1, 3, 65))


@torch.no_grad()
def test_a_map_of_a_single_block_is_enough():
    model = make("deit_tiny_patch16_224", SLIM)
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    images = torch.randn(1, 3, 32, 32)
    whole = TappedViT(model, [Tap("attention", 0), Tap("attention", 1)])(images)
    short = TappedViT(model, [Tap("attention", 0)], stop_early=True)
    ran.clear()
    early = short(images)
    assert set(early) == {Tap("attention", 0)} and ran == [0]
    assert torch.equal(early[Tap("attention", 0)], whole[Tap("attention", 0)])


@torch.no_grad()
def test_an_attention_pool_behind_the_blocks_is_not_taken_for_one():
    model = make("vit_base_patch16_siglip_224", SLIM)
    attended, _, _ = recorded(model, 1)
    assert attended.shape == (2, 3, 64, 64)


@pytest.mark.parametrize("name", ["efficientvit_b0", "xcit_nano_12_p16_224", "coat_lite_tiny"])
def test_attention_without_a_map_of_tokens_is_refused(name):  # linear, over channels, factorised
    with torch.device("meta"):
        model = timm.create_model(name).eval()
        for kind, message in (("attention", "has no attention map"), ("qkv", "cannot be read")):
            with pytest.raises(UserError, match=message):
                TappedViT(model, [Tap(kind, 0)])
