"""Correlation against a derivation of its own, in numpy."""

import numpy as np
import pytest
import torch

from vitkd_cli.terms import Batch
from vitkd_cli.terms.correlation import Correlation
from vitkd_cli.vit.layout import resample
from vitkd_cli.vit.taps import FINAL, Tap, features


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_loss_and_gradient_are_those_of_the_equations(reduce, spec):
    generator = np.random.default_rng(0)
    students, teachers = ([generator.normal(size=(3, 6, width)) for _ in range(2)] for width in (5, 8))
    term = Correlation(spec(5, grid=(2, 3)), spec(8, grid=(2, 3)), reduce=reduce)
    tensors = [torch.from_numpy(student).requires_grad_() for student in students]
    loss = term(list(zip(tensors, map(torch.from_numpy, teachers), strict=True)), Batch())
    loss.backward()

    scale = 1 / 3 if reduce == "sum" else 1 / (2 * 3 * 6 * 6)
    expected = 0.0
    for tensor, student, teacher in zip(tensors, students, teachers, strict=True):
        gradient = np.zeros_like(student)
        for image in range(3):
            for n in range(6):
                for m in range(6):
                    ours = student[image, n] @ student[image, m] / np.sqrt(5)
                    theirs = teacher[image, n] @ teacher[image, m] / np.sqrt(8)
                    expected += scale * (theirs - ours) ** 2
                    slope = -2 * scale * (theirs - ours) / np.sqrt(5)
                    gradient[image, n] += slope * student[image, m]
                    gradient[image, m] += slope * student[image, n]
        np.testing.assert_allclose(tensor.grad, gradient, rtol=0, atol=1e-12 * abs(gradient).max())
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-12)


def test_it_has_no_weights_and_is_zero_for_the_same_tokens(spec):
    term = Correlation(spec(8), spec(8), blocks=(-1,))
    tokens = torch.randn(2, 16, 8)
    assert not list(term.parameters())
    assert term([(tokens, tokens)], Batch()) == 0
    rotation, _ = torch.linalg.qr(torch.randn(8, 8))
    turned = term([(tokens @ rotation, tokens)], Batch())
    assert turned < 1e-8 * term([(2 * tokens, tokens)], Batch())


def test_blocks_are_read_as_by_every_feature_term(spec):
    student, teacher = spec(8, depth=3), spec(8, depth=5)
    assert Correlation(student, teacher).compares == [(features(i), features(i)) for i in (0, 1)]
    assert Correlation(student, teacher, blocks=(-2, -1)).compares == [
        (features(1), features(3)),
        (FINAL, FINAL),
    ]
    middle = Correlation(student, teacher, blocks="0:4", at="mha")
    assert middle.compares == [(Tap("attention_output", 0), Tap("attention_output", 4))]


def test_targets_are_resampled_and_standardised_before_they_are_correlated(spec):
    student, teacher = spec(8, grid=(3, 2)), spec(8, grid=(6, 4))
    tokens, target = torch.randn(2, 6, 8), 7 + 3 * torch.randn(2, 24, 8)
    small = resample(target, (6, 4), (3, 2))
    standard = (small - small.mean(-1, keepdim=True)) / small.std(-1, keepdim=True, correction=0)
    for norm, wanted in (("none", small), ("layer", standard)):
        expected = Correlation(student, student, blocks=(0,))([(tokens, wanted)], Batch())
        ours = Correlation(student, teacher, blocks=(0,), target_norm=norm)([(tokens, target)], Batch())
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=0)
