import numpy as np
import pytest
import torch

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.spectral import Spectral
from vitkd_cli.vit.taps import FINAL, Tap, features


def pooled(maps, channels):
    """The average of channels ⌊i·D/d⌋ to ⌈(i+1)·D/d⌉ of maps [B, D, H, W], for each i of d."""
    width = maps.shape[1]
    edges = [(i * width // channels, -(-(i + 1) * width // channels)) for i in range(channels)]
    return np.stack([maps[:, start:stop].mean(1) for start, stop in edges], axis=1)


@pytest.mark.parametrize("width", [4, 6, 11, 12])
def test_loss_is_that_of_the_equation(width, spec):
    torch.manual_seed(0)
    grid = (3, 5)
    term = Spectral(spec(6, grid=grid), spec(width, grid=grid), blocks=(0, -1))
    tokens = [torch.randn(2, 4, 15, d, dtype=torch.float64) for d in (6, width)]  # two blocks of each
    loss = term(list(zip(*tokens, strict=True)), Batch())
    losses = []
    for block in range(2):
        ours, theirs = (t[block].numpy().transpose(0, 2, 1).reshape(4, -1, *grid) for t in tokens)
        spectra = [np.fft.rfft2(maps, norm="ortho") for maps in (ours, pooled(theirs, 6))]
        assert spectra[0].shape == (4, 6, 3, 3)
        error = spectra[0] - spectra[1]
        losses.append(np.stack([error.real**2, error.imag**2]).mean())
    assert abs(loss.item() - np.mean(losses)) <= 1e-12 * np.mean(losses)


def test_gradient_is_that_of_the_loss(spec):
    torch.manual_seed(0)
    term = Spectral(spec(6, grid=(2, 5)), spec(9, grid=(4, 3)), blocks=(0,))
    student = torch.randn(3, 10, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 12, 9, dtype=torch.float64)
    term([(student, teacher)], Batch()).backward()
    direction = torch.randn_like(student)
    with torch.no_grad():
        ahead, behind = (term([(student + step * direction, teacher)], Batch()) for step in (1, -1))
    # quadratic in the student, so central differences are exact
    torch.testing.assert_close((student.grad * direction).sum(), (ahead - behind) / 2, rtol=1e-12, atol=0)


def test_equal_maps_have_no_distance(spec):
    tokens = torch.randn(2, 16, 8)
    assert Spectral(spec(8), spec(8), blocks=(0,))([(tokens, tokens)], Batch()) == 0


def test_a_difference_without_variation_weighs_as_in_a_squared_error(spec):
    """Parseval: all of the energy lies in one frequency, which has no twin."""
    term = Spectral(spec(8, grid=(30, 40)), spec(8, grid=(30, 40)), blocks=(0,))
    student = torch.randn(2, 1200, 8, dtype=torch.float64)
    loss = term([(student, student + 3)], Batch())
    torch.testing.assert_close(loss.item(), 9 * 40 / 42)


def test_by_default_the_blocks_are_the_authors(spec):
    term = Spectral(spec(8, depth=12), spec(8, depth=24))
    ours, theirs = zip(*term.compares, strict=True)
    assert [tap.block for tap in ours] == [0, 1, 6, 7, 8, 9, 10, 11]
    assert [tap.block for tap in theirs] == [0, 1, 18, 19, 20, 21, 22, 23]
    normed = Spectral(spec(8, depth=12), spec(8, depth=24), norm="auto")
    assert normed.compares[-1] == (FINAL, FINAL)


@pytest.mark.parametrize("depth", range(1, 10))
@pytest.mark.parametrize("teacher", [1, 3, 7, 12])
def test_by_default_shallow_models_compare_each_block_once(depth, teacher, spec):
    term = Spectral(spec(8, depth=depth), spec(8, depth=teacher))
    assert len(term.compares) == min(depth, teacher, 8)
    for taps in zip(*term.compares, strict=True):
        assert len(set(taps)) == len(taps)


def test_blocks_that_are_asked_for_must_be_there(spec):
    with pytest.raises(UserError, match="has no block -6, its depth is 3"):
        Spectral(spec(8, depth=3), spec(8, depth=12), blocks=(0, -6))


def test_it_has_no_parameters(spec):
    assert not list(Spectral(spec(8), spec(16)).parameters())


@pytest.mark.parametrize("options", ["", '(at="mha")', '(norm="final", blocks=-1)'])
@pytest.mark.parametrize("teacher", ["deep", "oblong", "registers", "tokenless", "swin"])
def test_models_of_every_shape_teach(teacher, options, learn):
    learn(f"spectral{options}", "flat", teacher)


def test_a_hierarchical_student_learns_from_a_flat_teacher(learn):
    _, learner = learn("spectral", "swin", "deep")
    assert learner.objective.student_taps == {features(0), features(1), features(2)}
    _, learner = learn('spectral(at="mha")', "swin", "deep")
    assert {tap.kind for tap in learner.objective.student_taps} == {Tap("attention_output", 0).kind}
