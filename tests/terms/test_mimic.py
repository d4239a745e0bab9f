from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.mimic import Mimic
from vitkd_cli.vit.taps import FINAL, FINAL_PREFIX, Tap, features


def test_each_model_counts_negative_blocks_from_its_own_end(spec):
    term = Mimic(spec(4, depth=3), spec(4, depth=12), blocks=(0, -2, -1))
    assert term.compares == [(features(0), features(0)), (features(1), features(10)), (FINAL, FINAL)]


def test_the_last_block_of_one_model_may_be_an_inner_one_of_the_other(spec):
    term = Mimic(spec(4, depth=2), spec(4, depth=3), blocks=(1,))
    assert term.compares == [(FINAL, features(1))]


def test_raw_reads_no_block_after_the_final_norm(spec):
    term = Mimic(spec(4), spec(4), blocks=(-1,), norm="raw")
    assert term.compares == [(features(2), features(2))]


def test_a_final_norm_of_an_inner_block_is_refused(spec):
    assert Mimic(spec(4), spec(4), blocks=(-1,), norm="final").compares == [(FINAL, FINAL)]
    with pytest.raises(UserError, match="block 0 of vit is not its last"):
        Mimic(spec(4), spec(4), blocks=(0,), norm="final")


@pytest.mark.parametrize("block", [3, -4])
def test_a_block_beyond_the_depth_is_refused_by_the_model_that_lacks_it(block, spec):
    with pytest.raises(UserError, match=f"small has no block {block}, its depth is 3"):
        Mimic(spec(4, depth=3, name="small"), spec(4, depth=12), blocks=(block,))


def test_a_linear_layer_stands_only_between_different_widths(spec):
    assert isinstance(Mimic(spec(4), spec(4)).align[0], nn.Identity)
    assert isinstance(Mimic(spec(4), spec(8)).align[0], nn.Linear)


def test_mean_is_the_sum_over_blocks_tokens_and_channels(spec):
    pairs = [(torch.randn(2, 16, 8), torch.randn(2, 16, 8)) for _ in range(2)]
    total = Mimic(spec(8), spec(8))(pairs, Batch())
    mean = Mimic(spec(8), spec(8), reduce="mean")(pairs, Batch())
    torch.testing.assert_close(mean, total / (2 * 16 * 8))


def test_a_standardised_target_ignores_the_teachers_scale(spec):
    student, teacher = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    term = Mimic(spec(8), spec(8), blocks=(0,), target_norm="layer")
    once, again = (term([(student, t)], Batch()) for t in (teacher, 5 + 100 * teacher))
    torch.testing.assert_close(once, again, rtol=1e-4, atol=0)
    assert term([(teacher, teacher)], Batch()) > 0.01


def test_a_finer_teacher_is_brought_to_the_students_grid(spec):
    term = Mimic(spec(8, grid=(4, 4)), spec(8, grid=(7, 7)), blocks=(0,))
    constant = torch.ones(2, 1, 8)
    loss = term([(3 * constant.expand(2, 16, 8), constant.expand(2, 49, 8))], Batch())
    torch.testing.assert_close(loss, torch.tensor(4.0 * 16 * 8))


@pytest.mark.parametrize("widths", [(8, 8), (5, 8)])
def test_patient_distillation_is_that_of_unit_class_tokens(widths, classy):
    generator = np.random.default_rng(0)
    term = Mimic(*map(classy, widths), blocks=(0, 2), tokens="class", normalize=True).double()
    assert term.compares == [(Tap("prefix", 0),) * 2, (FINAL_PREFIX,) * 2]
    students, teachers = ([generator.normal(size=(3, 2, width)) for _ in range(2)] for width in widths)
    tensors = [torch.from_numpy(student).requires_grad_() for student in students]
    loss = term(list(zip(tensors, map(torch.from_numpy, teachers), strict=True)), Batch())
    loss.backward()

    expected = 0.0
    for tensor, student, teacher, align in zip(tensors, students, teachers, term.align, strict=True):
        weight, bias = np.eye(8), np.zeros(8)
        if widths[0] != widths[1]:
            weight, bias = (parameter.detach().numpy() for parameter in (align.weight, align.bias))
        ours, target = student[:, 0] @ weight.T + bias, teacher[:, 0]  # the first token is the class token
        length = np.linalg.norm(ours, axis=1, keepdims=True)
        unit = ours / length
        difference = unit - target / np.linalg.norm(target, axis=1, keepdims=True)
        expected += (difference**2).sum() / 3
        along = unit * (unit * difference).sum(axis=1, keepdims=True)
        gradient = np.zeros_like(student)
        gradient[:, 0] = 2 / 3 * (difference - along) / length @ weight
        np.testing.assert_allclose(tensor.grad, gradient, rtol=0, atol=1e-12 * abs(gradient).max())
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


@pytest.fixture
def classy(spec):
    """A model whose first of two prefix tokens is a class token."""

    def make(dim, **facts):
        vit = spec(dim, **facts)
        blocks = tuple(replace(block, num_prefix_tokens=2) for block in vit.blocks)
        return replace(vit, blocks=blocks, num_prefix_tokens=2, class_token=True)

    return make


def test_a_class_token_is_asked_of_models_that_have_one(spec, classy):
    with pytest.raises(UserError, match="block 0 of bare carries no class token"):
        Mimic(classy(8), spec(8, name="bare"), tokens="class")
    with pytest.raises(UserError, match='at="mha" reads patch tokens'):
        Mimic(classy(8), classy(8), tokens="class", at="mha")


def test_the_last_six_are_counted_from_each_models_end(spec):
    term = Mimic(spec(4, depth=12), spec(4, depth=24), blocks=(-6, -5, -4, -3, -2, -1))
    inner = [(features(i), features(i + 12)) for i in range(6, 11)]
    assert term.compares == [*inner, (FINAL, FINAL)]


def test_a_linear_layer_may_stand_between_equal_widths(spec):
    term = Mimic(spec(8), spec(8), always_align=True)
    pairs = [(torch.randn(2, 16, 8), torch.randn(2, 16, 8)) for _ in range(2)]
    aligned = [(layer(student), teacher) for layer, (student, teacher) in zip(term.align, pairs, strict=True)]
    expected = Mimic(spec(8), spec(8))(aligned, Batch())
    torch.testing.assert_close(term(pairs, Batch()), expected)
    assert expected != Mimic(spec(8), spec(8))(pairs, Batch())


def test_unit_tokens_ignore_both_scales(spec):
    term = Mimic(spec(8), spec(8), blocks=(0,), normalize=True)
    student, teacher = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    once = term([(student, teacher)], Batch())
    torch.testing.assert_close(term([(30 * student, 0.1 * teacher)], Batch()), once)
    assert 0 < once < 4 * 16
