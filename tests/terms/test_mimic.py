import pytest
import torch
from torch import nn

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.mimic import Mimic
from vitkd_cli.vit.taps import FINAL, features


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
