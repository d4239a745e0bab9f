from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.relations import Relations
from vitkd_cli.vit.taps import LOGITS, Tap, TappedViT

WHAT = pytest.mark.parametrize("what", ["qkv", "attention"])


def qkv(images, tokens, heads, width, dtype=torch.float64):
    return torch.randn(3, images, heads, tokens, width, dtype=dtype)


def test_each_model_s_own_number_of_attention_heads_does_not_matter(spec):
    student, teacher = qkv(2, 5, 3, 4), qkv(2, 5, 2, 9)
    term = Relations(spec(12), spec(18), heads=6)
    merged = [x.transpose(2, 3).flatten(3)[:, :, None] for x in (student, teacher)]
    torch.testing.assert_close(term([(student, teacher)], Batch()), term([tuple(merged)], Batch()))


def test_the_loss_is_least_where_both_agree(spec):
    teacher = qkv(2, 5, 2, 4)
    student = teacher.clone().requires_grad_()
    Relations(spec(8), spec(8))([(student, teacher)], Batch()).backward()
    assert student.grad.abs().max() < 1e-12


def test_relations_a_thousand_apart_are_finite(spec):
    teacher, student = 30 * qkv(2, 5, 1, 8, torch.float32), -30 * qkv(2, 5, 1, 8, torch.float32)
    student.requires_grad_()
    loss = Relations(spec(8), spec(8))([(student, teacher)], Batch())
    loss.backward()
    assert loss > 100 and loss.isfinite() and student.grad.isfinite().all()


def with_prefix(vit, count):
    return replace(vit, blocks=tuple(replace(block, num_prefix_tokens=count) for block in vit.blocks))


@WHAT
def test_prefix_tokens_take_part_only_where_both_have_as_many(what, spec):
    term = Relations(spec(8), with_prefix(spec(8), 5), what=what)
    if what == "qkv":
        student, teacher = qkv(2, 17, 2, 4), qkv(2, 21, 2, 4)
        patches = student[..., 1:, :], teacher[..., 5:, :]
    else:
        student, teacher = (torch.rand(2, 2, n, n, dtype=torch.float64).softmax(-1) for n in (17, 21))
        patches = student[..., 1:, 1:], teacher[..., 5:, 5:]
    alone = Relations(with_prefix(spec(8), 0), with_prefix(spec(8), 0), what=what)
    torch.testing.assert_close(term([(student, teacher)], Batch()), alone([patches], Batch()))
    equally = Relations(spec(8), spec(8), what=what)([(student, student.flip(-2))], Batch())
    assert equally != alone([(patches[0], patches[0].flip(-2))], Batch())


@pytest.mark.parametrize("heads", [(2, 2), (3, 2)])
def test_attention_is_kl_from_teacher_to_student(heads, spec):
    student, teacher = (torch.randn(4, h, 17, 17, dtype=torch.float64).softmax(-1) for h in heads)
    loss = Relations(spec(8), spec(8), what="attention")([(student, teacher)], Batch())
    q, p = student.numpy(), teacher.numpy()
    if heads[0] != heads[1]:
        q, p = q.mean(1), p.mean(1)
    expected = (p * np.log(p / q)).sum(-1).mean()
    assert abs(loss.item() - expected) <= 1e-12 * expected


def test_attention_that_underflows_is_finite(spec):
    scores = torch.linspace(-500, 500, 17).expand(2, 2, 17, 17).clone().requires_grad_()
    teacher = scores.detach().flip(-1).softmax(-1)
    loss = Relations(spec(8), spec(8), what="attention")([(scores.softmax(-1), teacher)], Batch())
    loss.backward()
    assert loss.isfinite() and loss > 10 and scores.grad.isfinite().all()


def test_maps_mixed_after_their_softmax_are_finite(spec):
    maps = torch.randn(2, 2, 17, 17)  # CaiT's talking heads leave negative entries
    loss = Relations(spec(8), spec(8), what="attention")([(maps, maps.flip(-1))], Batch())
    assert loss.isfinite() and loss > 0


def test_other_grids_are_refused_with_the_size_that_mends_it(spec):
    with pytest.raises(UserError, match="4×4 tokens, block 2 of big 7×7") as refused:
        Relations(spec(8, grid=(4, 4)), spec(8, grid=(7, 7), name="big"))
    assert "--teacher-img-size 16" in refused.value.hint


def test_heads_that_do_not_divide_a_width_are_refused(spec):
    with pytest.raises(UserError, match="5 heads do not divide a width of 8"):
        Relations(spec(8), spec(8), heads=5)([(qkv(2, 17, 2, 4), qkv(2, 17, 2, 4))], Batch())
    with pytest.raises(UserError, match="heads must be at least 1, not 0"):
        Relations(spec(8), spec(8), heads=0)


def test_blocks_pair_as_in_every_term(spec):
    term = Relations(spec(8, depth=3), spec(8, depth=12), blocks=(0, -1), what="attention")
    assert term.compares == [
        (Tap("attention", 0), Tap("attention", 0)),
        (Tap("attention", 2), Tap("attention", 11)),
    ]


@WHAT
@pytest.mark.parametrize("teacher", ["flat", "registers", "tokenless"])
def test_models_with_other_prefix_tokens_teach(teacher, what, learn):
    learn(f'relations(what="{what}")', "flat", teacher)


@WHAT
def test_models_with_windows_teach_each_other(what, learn):
    learn(f'relations(blocks="all", what="{what}")', "swin", "swin")


@torch.no_grad()
def test_queries_keys_and_values_of_shifted_windows_are_swins_own():
    """timm leaves Swin's fused attention off; switching it on changes its logits by rounding alone."""
    torch.manual_seed(0)
    sizes = {"depths": (1, 2), "embed_dim": 24, "num_heads": (2, 4), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=10, **sizes).eval()
    assert not model.layers[1].blocks[1].attn.fused_attn
    images, made = torch.rand(2, 3, 64, 64), []
    logits = model(images)
    model.layers[1].blocks[1].attn.qkv.register_forward_hook(lambda *call: made.append(call[-1]))
    signals = TappedViT(model, [LOGITS, Tap("qkv", 2)])(images)
    torch.testing.assert_close(signals[LOGITS], logits)
    windows = made[-1].unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)  # [3, windows, heads, n, d]
    assert torch.equal(signals[Tap("qkv", 2)], windows)


@WHAT
def test_other_windows_are_refused(what, spec):
    if what == "qkv":
        whole, windows = qkv(1, 16, 2, 4), qkv(4, 4, 2, 4)
    else:
        whole, windows = torch.rand(1, 2, 16, 16), torch.rand(4, 2, 4, 4)
    with pytest.raises(UserError, match="windows of other sizes"):
        Relations(spec(8), spec(8), what=what)([(whole, windows)], Batch())
