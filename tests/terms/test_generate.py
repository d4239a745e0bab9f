"""The sparse generator against the dense one, the others against plain forms of them, every option."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.terms._generators import attention_heads, positions_of
from vitkd_cli.terms.generate import Generate
from vitkd_cli.vit.layout import resample
from vitkd_cli.vit.taps import FINAL, Tap, features

EVERY_GENERATOR = pytest.mark.parametrize("generator", ["conv", "cross_attention", "self_attention"])
ATTENTION = pytest.mark.parametrize("generator", ["cross_attention", "self_attention"])


def dense(term, student, teacher, mask):
    """The published form: both convolutions over the whole grid. mask: [B, N], 1 = masked."""
    tokens = torch.where(mask[..., None] > 0, term.mask_token, term.align(student))
    image = tokens.transpose(1, 2).unflatten(2, term.site.student.grid)  # [B, D, h, w]
    made = term.generate.conv2(term.generate.conv1(image).relu()).flatten(2).transpose(1, 2)  # [B, N, D]
    return ((made - teacher).square() * mask[..., None]).sum() / (len(student) * term.mask)


def seeded(seed, **facts):
    return Batch(generator=torch.Generator().manual_seed(seed), **facts)


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
    mask = term.draw(3, tokens, seeded(1)).double()
    assert (mask.sum(dim=1) == tokens - int(tokens * (1 - share))).all()

    ours = term([(student, teacher)], seeded(1))
    theirs = dense(term, student, teacher, mask)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = [student, *term.parameters()]
    for a, b in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(b.abs().max(), 1e-3)


def test_fewest_noise_values_are_kept_and_the_count_is_floored(spec):
    term = Generate(spec(4, grid=(10, 10)), spec(4, grid=(10, 10)), mask=0.9)
    noise = torch.rand(2, 100, generator=torch.Generator().manual_seed(3))
    masked = term.draw(2, 100, seeded(3))
    assert (
        (~masked).sum(dim=1) == 9
    ).all()  # 100 * (1 - 0.9) is 9.999… in floating point, as for the authors
    assert (noise.masked_fill(masked, 0).amax(1) < noise.masked_fill(~masked, 1).amin(1)).all()


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


# the attention generators ----------------------------------------------------------------------------------


def attend(attention, queries, seen):
    """Attention written out."""
    weights, biases = attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3)
    parts = zip((queries, seen, seen), weights, biases, strict=True)
    q, k, v = (F.linear(x, w, b).unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for x, w, b in parts)
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)  # [B, heads, queries, seen]
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


def by_gathering(term, student, kept, masked):
    """What the masked tokens become, of kept and masked tokens in two lists, as CAE and MAE have them."""
    images, width = len(student), term.mask_token.shape[-1]
    positions = term.generate.positions.expand(images, -1, -1)
    visible = (term.align(student) + positions).gather(1, kept[..., None].expand(-1, -1, width))
    asking = (term.mask_token + positions).gather(1, masked[..., None].expand(-1, -1, width))
    everyone = torch.cat([visible, asking], dim=1)
    for layer in term.generate.layers:
        if type(term.generate).__name__ == "CrossAttention":
            asking = asking + attend(layer.attn, layer.norm1(asking), layer.norm_seen(visible))
            asking = asking + layer.mlp(layer.norm2(asking))
        else:
            seen = layer.norm1(everyone)
            everyone = everyone + attend(layer.self_attn, seen, seen)
            everyone = everyone + layer.linear2(F.gelu(layer.linear1(layer.norm2(everyone))))
            asking = everyone[:, kept.shape[1] :]
    return term.generate.head(asking)


@ATTENTION
@pytest.mark.parametrize(("grid", "dims"), [((4, 4), (5, 8)), ((3, 5), (8, 10)), ((2, 3), (8, 130))])
def test_kept_tokens_make_the_masked_ones_in_six_layers(generator, grid, dims, spec):
    torch.manual_seed(0)
    models = (spec(dims[0], grid=grid), spec(dims[1], grid=grid))
    term = Generate(*models, generator=generator, mask=0.7).double()
    torch.nn.init.normal_(term.mask_token)
    tokens = grid[0] * grid[1]
    student = torch.randn(3, tokens, dims[0], dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, tokens, dims[1], dtype=torch.float64)
    order = term.draw(3, tokens, seeded(1)).long().argsort(dim=1, stable=True)
    kept, masked = order.split([int(tokens * 0.3), tokens - int(tokens * 0.3)], dim=1)
    made = by_gathering(term, student, kept, masked)
    target = teacher.gather(1, masked[..., None].expand(-1, -1, dims[1]))
    theirs = (made - target).square().sum() / (3 * 0.7)

    ours = term([(student, teacher)], seeded(1))
    assert len(term.generate.layers) == 6
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    wanted = [student, *term.parameters()]
    for a, b in zip(gradients(ours, wanted), gradients(theirs, wanted), strict=True):
        assert (a - b).abs().max() <= 1e-11 * max(b.abs().max(), 1e-3)


@EVERY_GENERATOR
@pytest.mark.parametrize("options", ["", ', masking="bernoulli"'])
def test_the_students_masked_tokens_are_not_seen(generator, options, spec):
    torch.manual_seed(0)
    objective = Objective(f'generate(generator="{generator}"{options})', spec(8), spec(8))
    student = torch.randn(2, 16, 8, requires_grad=True)
    mask = torch.rand(2, 16).argsort(dim=1) < 8
    total, _ = objective({FINAL: student}, {FINAL: torch.randn(2, 16, 8)}, Batch(mask=mask))
    total.backward()
    reached = student.grad.abs().sum(dim=2) > 0
    assert not reached[mask].any() and reached[~mask].all()


def test_where_nothing_is_visible_masked_tokens_ask_each_other(spec):
    term = Generate(spec(8), spec(8), generator="cross_attention")
    tokens, nothing = torch.randn(2, 16, 8), torch.zeros(2, 16, dtype=torch.bool)
    torch.testing.assert_close(term.generate(tokens, ~nothing), term.generate(tokens, nothing))


@ATTENTION
def test_positions_tell_masked_tokens_apart(generator, spec):
    term = Generate(spec(8, grid=(2, 3)), spec(8, grid=(2, 3)), generator=generator)
    made = term.generate(torch.zeros(1, 6, 8), torch.tensor([[1, 1, 1, 0, 0, 0]]).bool())
    assert torch.pdist(made[0]).min() > 1e-3


def test_positions_are_sines_and_cosines_of_row_and_column():
    table = positions_of((2, 3), 10)  # two frequencies, and two channels left over
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1.0]), torch.tensor([0, 1, 2, 0, 1, 2.0])
    assert table.shape == (6, 10) and not table[:, 8:].any()
    for axis in (rows, columns):
        for wave in (axis.sin(), axis.cos()):
            assert any(torch.allclose(wave, channel) for channel in table.T)


@pytest.mark.parametrize(
    ("dim", "heads"), [(384, 6), (768, 12), (1024, 16), (48, 1), (130, 2), (200, 2), (193, 1)]
)
def test_heads_are_about_64_wide(dim, heads):
    assert attention_heads(dim) == heads


# the text's way, and MGD's ---------------------------------------------------------------------------------


def pair(spec, width=8):
    torch.manual_seed(0)
    return torch.randn(3, 16, 5), torch.randn(3, 16, width)


def test_bernoulli_masks_each_token_whose_draw_is_below_the_share(spec):
    term = Generate(spec(4, grid=(20, 20)), spec(4, grid=(20, 20)), mask=0.3, masking="bernoulli")
    noise = torch.rand(8, 400, generator=torch.Generator().manual_seed(3))
    masked = term.draw(8, 400, seeded(3))
    assert torch.equal(masked, noise < 0.3)
    assert len(masked.sum(dim=1).unique()) > 1


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_bernoulli_is_the_dense_form_of_unequal_masks(reduce, spec):
    tokens, target = pair(spec)
    term = Generate(spec(5), spec(8), masking="bernoulli", mask=0.3, reduce=reduce)
    mask = torch.zeros(3, 16)
    mask[0, :5], mask[1, 3:] = 1, 1  # and none of the third image
    ours = term([(tokens, target)], Batch(mask=mask))
    alone = torch.stack(
        [dense(term, tokens[i : i + 1], target[i : i + 1], mask[i : i + 1]) for i in range(3)]
    )
    assert alone[2] == 0
    expected = alone.mean() if reduce == "sum" else (alone[:2] * 0.3 / (8 * torch.tensor([5, 13]))).sum() / 3
    torch.testing.assert_close(ours, expected)


@EVERY_GENERATOR
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_images_with_nothing_or_everything_masked_give_finite_gradients(generator, reduce, spec):
    term = Generate(spec(5), spec(8), generator=generator, masking="bernoulli", reduce=reduce)
    tokens, target = pair(spec)
    tokens.requires_grad_()
    mask = torch.zeros(3, 16)
    mask[1], mask[2, 4:] = 1, 1
    loss = term([(tokens, target)], Batch(mask=mask))
    loss.backward()
    for tensor in (tokens, *term.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()
    assert not tokens.grad[:2].any()  # the loss is not there, or nothing of the image is


@pytest.mark.parametrize("options", ['masking="bernoulli"', 'masking="bernoulli", reduce="mean"'])
def test_bernoulli_masks_do_not_depend_on_the_number_of_processes(options, spec):
    torch.manual_seed(0)
    objective = Objective(f"generate({options})", spec(5), spec(8))
    student, teacher = torch.randn(8, 16, 5), torch.randn(8, 16, 8)
    whole, _ = objective({FINAL: student}, {FINAL: teacher}, seeded(4))
    shares = [
        objective({FINAL: student[rows]}, {FINAL: teacher[rows]}, seeded(4, rows=rows, global_size=8))[0]
        for rows in torch.arange(8).chunk(2)
    ]
    torch.testing.assert_close(torch.stack(shares).mean(), whole)


def test_mgd_is_the_distance_at_all_tokens_with_no_share(spec):
    tokens, target = pair(spec)
    mask = torch.rand(3, 16).argsort(dim=1) < 8
    term = Generate(spec(5), spec(8), masked_only=False, divide_by_share=False)
    image = torch.where(mask[..., None], term.mask_token, term.align(tokens)).mT.unflatten(2, (4, 4))
    made = term.generate.conv2(term.generate.conv1(image).relu()).flatten(2).mT
    expected = (made - target).square().sum(dim=(1, 2)).mean()
    torch.testing.assert_close(term([(tokens, target)], Batch(mask=mask)), expected)
    term.reduce = "mean"
    torch.testing.assert_close(term([(tokens, target)], Batch(mask=mask)), expected / (16 * 8))


@pytest.mark.parametrize("options", [{}, {"masking": "bernoulli"}, {"masked_only": False}])
def test_without_its_share_the_sum_is_not_divided(options, spec):
    torch.manual_seed(0)
    term = Generate(spec(5), spec(8), mask=0.3, **options)
    torch.manual_seed(0)
    text = Generate(spec(5), spec(8), mask=0.3, divide_by_share=False, **options)
    torch.testing.assert_close(text([pair(spec)], seeded(2)), 0.3 * term([pair(spec)], seeded(2)))


def test_a_linear_layer_may_stand_between_equal_widths(spec):
    assert isinstance(Generate(spec(8), spec(8)).align, torch.nn.Identity)
    term = Generate(spec(8), spec(8), always_align=True)
    tokens, target = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    mask = torch.rand(2, 16).argsort(dim=1) < 8
    ours = term([(tokens, target)], Batch(mask=mask))
    torch.testing.assert_close(ours, dense(term, tokens, target, mask))
    torch.nn.init.zeros_(term.align.weight)
    assert term([(tokens, target)], Batch(mask=mask)) != ours


@EVERY_GENERATOR
@pytest.mark.parametrize("options", ["", ', masking="bernoulli"', ", masked_only=false", ', reduce="mean"'])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_every_generator_has_gradients_everywhere_in_every_precision(generator, options, dtype, spec):
    torch.manual_seed(0)
    student, teacher = spec(12, grid=(3, 5)), spec(24, grid=(6, 7), depth=5)
    objective = Objective(f'generate(generator="{generator}", block=0{options})', student, teacher)
    objective.to(torch.promote_types(dtype, torch.float32))
    tokens = torch.randn(2, 15, 12).to(dtype).requires_grad_()
    total, _ = objective({features(0): tokens}, {features(0): torch.randn(2, 42, 24).to(dtype)}, seeded(0))
    assert total.dtype == torch.promote_types(dtype, torch.float32)
    total.backward()
    for tensor in (tokens, *objective.parameters()):
        assert tensor.grad.isfinite().all() and tensor.grad.any()


@EVERY_GENERATOR
@pytest.mark.parametrize("block", [0, -1])
def test_grids_that_shrink_on_the_way_are_those_of_the_block(generator, block, spec):
    def hierarchical(dim, *grids):
        first, last = (spec(dim * (i + 1), grid=grid).blocks[0] for i, grid in enumerate(grids))
        return replace(spec(2 * dim, grid=grids[1]), blocks=(first, first, last))

    student, teacher = hierarchical(8, (4, 6), (2, 3)), hierarchical(12, (5, 7), (2, 4))
    objective = Objective(f'generate(generator="{generator}", block={block})', student, teacher)
    tap, ours, theirs = (features(0), (24, 8), (35, 12)) if block == 0 else (FINAL, (6, 16), (8, 24))
    signal = torch.randn(2, *ours, requires_grad=True)
    total, _ = objective({tap: signal}, {tap: torch.randn(2, *theirs)}, seeded(0))
    total.backward()
    assert total.isfinite() and signal.grad.any()


# its block -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "taps"),
    [
        (-1, (FINAL, FINAL)),
        (1, (features(1), features(1))),
        ("1:3", (features(1), features(3))),
        ("2:0", (FINAL, features(0))),
    ],
)
def test_a_block_is_a_number_or_a_pair(block, taps, spec):
    assert Generate(spec(4, depth=3), spec(4, depth=5), block=block).compares == [taps]


def test_an_attention_output_is_read_raw(spec):
    assert Generate(spec(4), spec(4), at="mha").compares == [(Tap("attention_output", 2),) * 2]


@pytest.mark.parametrize("block", ["0:0, 1:1", "all"])
def test_more_than_one_block_is_refused(block, spec):
    with pytest.raises(UserError, match=r"is [23] blocks, and generate compares one"):
        Generate(spec(4), spec(4), block=block)


@EVERY_GENERATOR
def test_a_checkpoint_knows_the_generator_by_its_option(generator, spec):
    keys = Generate(spec(64), spec(64), generator=generator).state_dict()
    assert {key.partition(".")[0] for key in keys} - {"align", "mask_token"} == {"generator"}
