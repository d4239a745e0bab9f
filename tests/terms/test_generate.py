"""The sparse generator against the dense one, and what it refuses."""

from itertools import product

import pytest
import torch

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.generate import Generate
from vitkd_cli.vit.spec import resample


def dense(term, student, teacher, mask):
    """The published form: both convolutions over the whole grid. mask: [B, N], 1 = masked."""
    tokens = torch.where(mask[..., None] > 0, term.mask_token, term.align(student))
    image = tokens.transpose(1, 2).unflatten(2, term.site.student.grid)  # [B, D, h, w]
    made = term.conv2(term.conv1(image).relu()).flatten(2).transpose(1, 2)  # [B, N, D]
    return ((made - teacher).square() * mask[..., None]).sum() / (len(student) * term.mask)


def gradients(loss, tensors):
    return torch.autograd.grad(loss, tensors)


@pytest.mark.parametrize(
    ("grid", "dims", "share"),
    [
        *product([(4, 4), (3, 5), (1, 6), (1, 1)], [(5, 8), (8, 8), (8, 5)], [0.5]),
        ((5, 3), (5, 8), 0.9),
        ((5, 3), (5, 8), 0.1),
        ((2, 2), (5, 8), 0.9),  # nothing is kept
    ],
)
def test_sparse_equals_dense(grid, dims, share, spec):
    torch.manual_seed(0)
    term = Generate(spec(dims[0], grid=grid), spec(dims[1], grid=grid), mask=share).double()
    torch.nn.init.normal_(term.mask_token)
    tokens = grid[0] * grid[1]
    student = torch.randn(3, tokens, dims[0], dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, tokens, dims[1], dtype=torch.float64)
    kept, masked = term.draw(3, tokens, Batch(generator=torch.Generator().manual_seed(1)))
    assert kept.shape == (3, int(tokens * (1 - share)))
    mask = torch.zeros(3, tokens, dtype=torch.float64).scatter(1, masked, 1)

    ours = term([(student, teacher)], Batch(generator=torch.Generator().manual_seed(1)))
    theirs = dense(term, student, teacher, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = [student, *term.parameters()]
    for a, b in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(b.abs().max(), 1e-3)


def test_fewest_noise_values_are_kept_and_the_count_is_floored(spec):
    term = Generate(spec(4, grid=(10, 10)), spec(4, grid=(10, 10)), mask=0.9)
    noise = torch.rand(2, 100, generator=torch.Generator().manual_seed(3))
    kept, masked = term.draw(2, 100, Batch(generator=torch.Generator().manual_seed(3)))
    assert kept.shape == (2, 9)  # 100 * (1 - 0.9) is 9.999… in floating point, as for the authors
    assert (noise.gather(1, kept).amax(1) < noise.gather(1, masked).amin(1)).all()


def test_mean_is_the_sum_over_its_count(spec):
    student, teacher = spec(5), spec(8)
    pair = (torch.randn(2, 16, 5), torch.randn(2, 16, 8))
    term = Generate(student, teacher)
    mask = torch.arange(16).remainder(2).expand(2, 16)
    total = term([pair], Batch(mask=mask))
    term.reduce = "mean"
    torch.testing.assert_close(term([pair], Batch(mask=mask)), total * 0.5 / (8 * 8))


def test_targets_are_resampled_and_standardised(spec):
    student, teacher = spec(5, grid=(3, 2)), spec(8, grid=(6, 4))
    torch.manual_seed(0)
    term = Generate(student, teacher, target_norm="layer")
    tokens, target = torch.randn(2, 6, 5), 7 + 3 * torch.randn(2, 24, 8)
    mask = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 1, 0]])
    small = resample(target, (6, 4), (3, 2))
    standardised = (small - small.mean(-1, keepdim=True)) / small.std(-1, keepdim=True, correction=0)
    expected = dense(term, tokens, standardised, mask)
    torch.testing.assert_close(term([(tokens, target)], Batch(mask=mask)), expected, rtol=1e-4, atol=0)


def test_a_mask_that_covers_images_unequally_is_refused(spec):
    term = Generate(spec(4, grid=(1, 2)), spec(4, grid=(1, 2)))
    pair = (torch.randn(2, 2, 4), torch.randn(2, 2, 4))
    with pytest.raises(ValueError, match="equally many"):
        term([pair], Batch(mask=torch.tensor([[0, 1], [1, 1]])))


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_outside_zero_to_one_is_refused(share, spec):
    with pytest.raises(UserError, match="mask"):
        Generate(spec(4), spec(4), mask=share)
