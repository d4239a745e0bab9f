"""What a spec says and what a tap returns is what the model itself computes."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn
from zoo import small

from vitkd_cli import UserError
from vitkd_cli.vit.layout import resample
from vitkd_cli.vit.spec import as_seen_by, describe
from vitkd_cli.vit.taps import (
    DISTILL_LOGITS,
    FINAL,
    FINAL_PREFIX,
    LOGITS,
    Tap,
    TappedViT,
    cut,
    features,
)

WIDE = (48, (4, 4))
STAGE_ENDS = (24, (16, 16)), (48, (8, 8))
# name: (blocks, width and grid of first and last block, prefix tokens of blocks and in the end)
MODELS = {
    "vit_tiny_patch16_224": (3, WIDE, WIDE, 1, 1),
    "deit_tiny_patch16_224": (3, WIDE, WIDE, 1, 1),
    "deit3_small_patch16_224": (3, WIDE, WIDE, 1, 1),
    "deit_tiny_distilled_patch16_224": (3, WIDE, WIDE, 2, 2),
    "vit_small_patch14_reg4_dinov2": (3, WIDE, WIDE, 5, 5),
    "vit_base_patch16_siglip_224": (3, WIDE, WIDE, 0, 0),
    "eva02_tiny_patch14_224": (3, WIDE, WIDE, 1, 1),
    "vit_tiny_patch16_dinov3_qkvb": (3, WIDE, WIDE, 5, 5),
    "beit_base_patch16_224": (3, WIDE, WIDE, 1, 1),
    "cait_xxs24_224": (3, WIDE, WIDE, 0, 1),
    "vit_relpos_small_patch16_rpn_224": (3, WIDE, WIDE, 0, 0),
    "swin_tiny_patch4_window7_224": (4, *STAGE_ENDS, 0, 0),
    "swinv2_tiny_window8_256": (4, *STAGE_ENDS, 0, 0),
}  # fmt: skip


def make(name: str) -> nn.Module:
    return small(name, num_classes=10, depth=3).net


@pytest.fixture(scope="module", params=MODELS)
def vit(request):
    flat = {} if request.param.startswith("swin") else {"depth": 3}
    model = small(request.param, num_classes=10, **flat)
    return request.param, model.net, model.spec


def test_the_spec_is_read_off_the_model(vit):
    name, model, spec = vit
    depth, first, last, block_prefix, prefix = MODELS[name]
    assert (spec.depth, spec.num_classes) == (depth, 10)
    assert (spec.blocks[0].dim, spec.blocks[0].grid) == first
    assert (spec.blocks[-1].dim, spec.blocks[-1].grid) == (spec.final_dim, spec.final_grid) == last
    assert {block.num_prefix_tokens for block in spec.blocks} == {block_prefix}
    if spec.blocks[0].num_prefix_tokens:
        assert spec.num_prefix_tokens == prefix
    assert all(block.heads > 0 for block in spec.blocks)
    config = model.pretrained_cfg
    assert (spec.mean, spec.std) == (tuple(config["mean"]), tuple(config["std"]))
    assert spec.name.startswith(name)


@torch.no_grad()
def test_a_model_that_is_cut_has_the_signals_of_the_whole_to_the_bit(vit):
    _, model, spec = vit
    images, taps = torch.randn(2, 3, *spec.input_size), [features(0), Tap("attention_output", 1)]
    wanted = TappedViT(model, taps, spec)(images)
    short = cut(model, taps, spec)
    ran: list[str] = []
    for block in spec.blocks:
        part, whole = short.get_submodule(block.path), model.get_submodule(block.path)
        part.register_forward_hook(lambda *_, kind=type(part) is type(whole): ran.append(kind))
    found = TappedViT(short, taps, spec)(images)
    assert ran.count(True) == 2
    assert all(torch.equal(found[tap], wanted[tap]) for tap in wanted)
    assert {p.data_ptr() for p in short.parameters()} < {p.data_ptr() for p in model.parameters()}
    assert model(images).shape == (2, 10)  # the model itself is whole


@torch.no_grad()
def test_a_model_that_does_not_run_without_its_last_blocks_is_left_whole():
    """MViTv2 widens its tokens inside blocks, so what follows takes no others."""
    with torch.device("meta"):
        model = timm.create_model("mvitv2_tiny").eval()
        spec = describe(model)
    assert cut(model, [features(1)], spec) is model
    assert cut(model, [features(1), LOGITS], spec) is model


@torch.no_grad()
def test_it_runs_no_further_than_the_deepest_tap(vit):
    _, model, spec = vit
    images = torch.randn(1, 3, *spec.input_size)
    ran: list[str] = []
    handles = [
        model.get_submodule(block.path).register_forward_hook(lambda *_, path=block.path: ran.append(path))
        for block in spec.blocks
    ]
    early = TappedViT(model, [features(0), features(1)], spec, stop_early=True)(images)
    assert ran == [block.path for block in spec.blocks[:2]]
    whole = TappedViT(model, [features(0), features(1)], spec)(images)
    assert len(ran) == 2 + spec.depth
    assert all(torch.equal(early[tap], whole[tap]) for tap in early)
    assert model(images).shape == (1, 10)  # the model on its own is not cut short
    for handle in handles:
        handle.remove()


def test_gradients_flow_and_are_those_without_checkpointing(vit):
    name, model, spec = vit
    if not hasattr(model, "set_grad_checkpointing"):
        pytest.fail(f"{name} has no gradient checkpointing any more")
    images = torch.randn(2, 3, *spec.input_size)
    block, gradients = spec.blocks[0], []
    inside = {"attention": block.maps != "none", "qkv": block.qkv, "attention_output": block.attention_output}
    taps = [LOGITS, FINAL, features(0), *(Tap(kind, 0) for kind, there in inside.items() if there)]
    for checkpointing in (False, True):
        twin = copy.deepcopy(model).train()
        twin.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)  # stochastic depth
        signals = TappedViT(twin, taps, spec)(images)
        sum(signal.square().sum() for signal in signals.values()).backward()
        gradients.append({n: p.grad for n, p in twin.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for key in gradients[0]:
        torch.testing.assert_close(gradients[0][key], gradients[1][key])


def hooks_of(model: nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())


def settings_of(model: nn.Module) -> dict[str, dict[str, object]]:
    return {
        path: {name: value for name, value in vars(part).items() if not name.startswith("_")}
        for path, part in model.named_modules()
    }


@torch.no_grad()
def test_a_released_model_is_as_it_was_before(vit):
    _, model, spec = vit
    images, taps = torch.randn(1, 3, *spec.input_size), [LOGITS, features(1), Tap("attention", 1)]
    if spec.blocks[0].qkv:
        taps.append(Tap("qkv", 0))
    for part in model.modules():
        if hasattr(part, "fused_attn"):
            part.fused_attn = False
    before, settings, hooks = model(images), settings_of(model), hooks_of(model)  # other tests' are there
    one, other = TappedViT(model, taps, spec), TappedViT(model, [features(0), features(1)], spec)
    assert hooks_of(model) > hooks
    signals = one(images)
    assert other.release() is model
    assert torch.equal(one(images)[features(1)], signals[features(1)])  # one hears on when another stops
    assert one.release() is one.release() is model
    assert hooks_of(model) == hooks and features(1) not in one(images)
    assert settings_of(model) == settings
    assert torch.equal(model(images), before)
    assert torch.equal(TappedViT(model, taps, spec)(images)[features(1)], signals[features(1)])


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_both_heads_of_a_distilled_student(training):
    model = make("deit_tiny_distilled_patch16_224").train(training)
    images = torch.randn(2, 3, 32, 32)
    both = TappedViT(model, [LOGITS, DISTILL_LOGITS, FINAL_PREFIX])(images)
    final = model.forward_features(images)
    assert torch.equal(both[FINAL_PREFIX], final[:, :2])
    assert torch.equal(both[LOGITS], model.head(final[:, 0]))
    assert torch.equal(both[DISTILL_LOGITS], model.head_dist(final[:, 1]))
    assert torch.equal(model(images), (both[LOGITS] + both[DISTILL_LOGITS]) / 2)  # and as before on its own
    with pytest.raises(UserError, match="has no distillation head"):
        TappedViT(make("deit_tiny_patch16_224"), [DISTILL_LOGITS])


def test_a_copy_of_a_tapped_model_is_deaf():
    model = make("deit_tiny_patch16_224")
    tapped = TappedViT(model, [features(1)])
    twin = copy.deepcopy(model)
    twin(torch.randn(1, 3, 32, 32))
    assert not tapped._signals
    model(torch.randn(1, 3, 32, 32))
    assert not tapped._signals  # nor does a forward of its own leave anything in memory


@torch.no_grad()
def test_a_copy_of_the_whole_has_signals_of_its_own():
    tapped = TappedViT(make("deit_tiny_patch16_224"), [LOGITS, features(1), Tap("attention", 2)])
    images = torch.randn(1, 3, 32, 32)
    before = tapped(images)
    twin = copy.deepcopy(tapped)
    for parameter in twin.parameters():
        parameter *= 1.1
    theirs, after = twin(images), tapped(images)
    assert theirs.keys() == before.keys()
    for tap in before:
        assert torch.equal(after[tap], before[tap]) and not torch.equal(theirs[tap], before[tap])
    early = copy.deepcopy(TappedViT(tapped.model, [features(0)], stop_early=True).eval())
    early.model.blocks[1].register_forward_hook(lambda *_: pytest.fail("it runs on"))
    assert set(early(images)) == {features(0)} and not early.training


def test_a_compiled_model_gives_the_same_signals():
    model = make("deit_tiny_patch16_224")
    images = torch.randn(2, 3, 32, 32)
    for taps in ([LOGITS, FINAL, features(0)], [features(0)]):
        spec = describe(model)
        wanted = TappedViT(model, taps, spec)(images)
        found = torch.compile(TappedViT(cut(model, taps, spec), taps, spec), backend="eager")(images)
        assert all(torch.equal(found[tap], wanted[tap]) for tap in wanted)


def test_describing_leaves_no_trace():
    model = make("deit_tiny_patch16_224").train()
    state = torch.random.get_rng_state()
    describe(model)
    assert model.training and torch.equal(torch.random.get_rng_state(), state)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_describing_needs_no_weights():
    with torch.device("meta"):
        model = timm.create_model("deit3_small_patch16_224")
    spec = describe(model)
    assert (spec.depth, spec.final_dim, spec.final_grid, spec.num_classes) == (12, 384, (14, 14), 1000)


def test_embeddings_are_never_taken_for_classes():
    with torch.device("meta"):
        clip = describe(timm.create_model("vit_base_patch32_clip_224.openai"))
        headless = describe(timm.create_model("vit_small_patch14_dinov2"))
    assert clip.num_classes == headless.num_classes == 0
    assert (clip.embed_dim, headless.embed_dim) == (768, 384)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (features(3), "blocks 0 to 2"),
        (Tap("prefix", 0), "carries no prefix tokens"),
        (Tap("nonsense"), "no tap called nonsense"),
    ],
)
def test_taps_that_are_not_there(tap, message):
    with pytest.raises(UserError, match=message):
        TappedViT(make("vit_base_patch16_siglip_224"), [tap])


def test_a_parallel_block_has_no_attention_output():
    model = timm.create_model("vit_base_patch16_xp_224", depth=1, img_size=32, num_classes=10)
    with pytest.raises(UserError, match="attention and MLP in parallel"):
        TappedViT(model, [Tap("attention_output", 0)])


def test_a_convolutional_network_is_no_vit():
    with pytest.raises(UserError, match="no transformer blocks"):
        describe(timm.create_model("resnet18"))


def test_images_as_a_model_sees_them():
    spec = replace(describe(make("deit_tiny_patch16_224")), mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images = torch.rand(2, 3, 32, 32)
    seen = as_seen_by(spec, images)
    torch.testing.assert_close(seen[:, 0], images[:, 0] * 2 - 1)
    torch.testing.assert_close(seen[:, 2], images[:, 2])
    assert as_seen_by(spec, torch.rand(1, 3, 48, 48)).shape == (1, 3, 32, 32)


def test_tokens_on_another_grid():
    tokens = torch.randn(2, 12, 5)
    assert resample(tokens, (3, 4), (3, 4)) is tokens
    constant = torch.full((1, 12, 2), 3.0)
    torch.testing.assert_close(resample(constant, (3, 4), (7, 2)), torch.full((1, 14, 2), 3.0))
    # Rows and columns are told apart: a ramp along the rows stays one along the rows.
    rows = torch.arange(4.0).repeat_interleave(2).view(1, 8, 1)  # 4 rows of 2
    shrunk = resample(rows, (4, 2), (2, 2)).view(2, 2)
    assert (shrunk[:, 0] == shrunk[:, 1]).all() and shrunk[0, 0] < shrunk[1, 0]
    # Antialiased: every token counts when the grid shrinks, also the ones between the samples.
    spike = torch.zeros(1, 64, 1)
    spike[0, 9] = 1
    assert resample(spike, (8, 8), (2, 2)).abs().sum() > 0
