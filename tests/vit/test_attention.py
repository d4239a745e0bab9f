"""Recorded attention maps against arithmetic that does not pass through the recorder."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_cli import UserError
from vitkd_cli.vit.attention import attention_map
from vitkd_cli.vit.spec import describe
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
def test_a_gate_between_content_and_position():
    attended, tokens, attention = recorded(make("convit_tiny", {**SLIM, "num_heads": 4}), 1)
    query, key = (heads_of(part, 4) for part in attention.qk(tokens).chunk(2, -1))
    content = torch.einsum("bhnd,bhmd->bhnm", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    down, right = (x.flatten()[None] - x.flatten()[:, None] for x in (rows, columns))  # [N, N]
    offsets = torch.stack((right, down, right**2 + down**2), -1)
    position = torch.einsum("nmc,hc->hnm", offsets, attention.pos_proj.weight)
    position = (position + attention.pos_proj.bias[:, None, None]).softmax(-1)
    gate = attention.gating_param.sigmoid()[:, None, None]
    torch.testing.assert_close(attended, (1 - gate) * content + gate * position, atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_dwee_patch16_reg1_gap_256", "vit_dpwee_patch16_reg1_gap_256"])
def test_one_map_minus_another(name):
    model = make(name, {"img_size": 64, "depth": 2})
    tapped = TappedViT(model, [Tap("attention", 1)])
    block = model.blocks[1]
    attention = getattr(block, "attn", block)
    projection = attention.qkv if attention is not block else block.in_proj
    seen: list[Tensor] = []
    handle = projection.register_forward_hook(lambda _m, _a, out: seen.append(out))
    attended = tapped(torch.randn(2, 3, 64, 64))[Tap("attention", 1)]
    handle.remove()
    query, key, _ = seen[0][..., -3 * 256 :].chunk(3, -1)  # behind the MLP's share, where there is one
    # heads of 64 channels, each of two halves of 32
    query, key = (x.unflatten(-1, (4, 2, 32)).permute(0, 2, 3, 1, 4) for x in (query, key))
    query, key = attention.q_norm(query), attention.k_norm(key)
    first, second = torch.einsum("bhsnd,bhsmd->bhsnm", query, key).div(32**0.5).softmax(-1).unbind(2)
    if attention.dual_lambda:
        gains = attention.lambda_a.exp(), attention.lambda_b.exp()
    else:
        halves = ((attention.lambda_q1, attention.lambda_k1), (attention.lambda_q2, attention.lambda_k2))
        gains = [(q * k).sum().exp() for q, k in halves]
    by_hand = first - (gains[0] - gains[1] + attention.lambda_init) * second
    torch.testing.assert_close(attended, by_hand, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_talking_heads_between_convolutions():
    model = make("efficientformerv2_s0", {"num_classes": 10})
    spec = describe(model)
    index = next(i for i, block in enumerate(spec.blocks) if block.maps == "tokens")
    tapped = TappedViT(model, [Tap("attention", index)], spec)
    attention = model.get_submodule(spec.blocks[index].attention)
    seen: list[Tensor] = []
    handle = attention.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    attended = tapped(torch.randn(2, 3, 224, 224))[Tap("attention", index)]
    handle.remove()
    query, key = (part(seen[0]).flatten(2).unflatten(1, (8, -1)) for part in (attention.q, attention.k))
    scores = torch.einsum("bhdn,bhdm->bhnm", query, key) * attention.scale
    scores = scores + attention.attention_biases[:, attention.attention_bias_idxs]
    by_hand = attention.talking_head2(attention.talking_head1(scores).softmax(-1))
    torch.testing.assert_close(attended, by_hand, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_mask_units_of_hiera_are_put_in_rows():
    model = make("hiera_tiny_224", {"img_size": 64, "num_classes": 10})
    spec = describe(model)
    index = next(i for i, block in enumerate(spec.blocks) if block.maps == "tokens" and block.grid[0] > 2)
    attention = model.get_submodule(spec.blocks[index].attention)
    seen: list[Tensor] = []
    handle = attention.register_forward_hook(lambda _m, args, _out: seen.append(args[0]))
    attended = TappedViT(model, [Tap("attention", index)], spec)(torch.randn(2, 3, 64, 64))
    handle.remove()
    rows = model.reroll(seen[0], index).flatten(1, 2)  # [B, N, D], row by row
    heads = spec.blocks[index].heads
    query, key, _ = (heads_of(part, heads) for part in attention.qkv(rows).chunk(3, -1))
    by_hand = torch.einsum("bhnd,bhmd->bhnm", query, key).div(query.shape[-1] ** 0.5).softmax(-1)
    torch.testing.assert_close(attended[Tap("attention", index)], by_hand, atol=1e-5, rtol=1e-4)


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
