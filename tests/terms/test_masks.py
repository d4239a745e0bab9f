"""Neither the number of processes nor of accumulation steps changes a mask."""

import pytest
import torch

from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.vit.taps import FINAL

IMAGES = 8


def seeded(**facts):
    return Batch(generator=torch.Generator().manual_seed(11), **facts)


@pytest.fixture
def signals():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(IMAGES, 16, 12, generator=generator), torch.randn(IMAGES, 16, 16, generator=generator)


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 1, 2, 3], [4, 5, 6, 7]],  # two processes, or two accumulation steps
        [[0, 7], [1, 6], [2, 5], [3, 4]],  # the global batch dealt in mirrored pairs
    ],
)
def test_parts_of_the_global_batch_have_its_masks(parts, signals, spec):
    torch.manual_seed(0)
    objective = Objective("generate", spec(12), spec(16))
    student, teacher = signals
    whole, _ = objective({FINAL: student}, {FINAL: teacher}, seeded())
    shares = [
        objective(
            {FINAL: student[rows]},
            {FINAL: teacher[rows]},
            seeded(rows=torch.tensor(rows), global_size=IMAGES),
        )[0]
        for rows in parts
    ]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_rows_matter(signals, spec):
    """The test above would also pass if all images had one mask; they do not."""
    term = Objective("generate", spec(12), spec(16)).terms["generate"]
    first = term.draw(4, 16, seeded(rows=torch.arange(4), global_size=IMAGES))
    last = term.draw(4, 16, seeded(rows=torch.arange(4, 8), global_size=IMAGES))
    everything = term.draw(IMAGES, 16, seeded())
    assert torch.equal(torch.cat([first, last]), everything)
    assert not torch.equal(first, last)


def test_the_same_seed_repeats_a_mask_and_another_update_draws_a_new_one(signals, spec):
    objective = Objective("generate", spec(12), spec(16))
    student, teacher = ({FINAL: x} for x in signals)
    losses = [
        objective(student, teacher, Batch(generator=torch.Generator().manual_seed(seed)))[0]
        for seed in (11, 11, 12)
    ]
    assert losses[0] == losses[1] != losses[2]
