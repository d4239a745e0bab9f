from dataclasses import replace

import numpy as np
import pytest
import torch

from vitkd_cli.errors import UserError
from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.terms.features import Features
from vitkd_cli.vit.taps import EMBEDDING, FINAL, FINAL_PREFIX, Tap

SECOND = replace(FINAL, view=1)


@pytest.fixture
def vits(spec):
    """Student and teacher with class tokens, of one oblong grid."""
    return tuple(replace(spec(width, grid=(2, 3)), class_token=True) for width in (6, 8))


def batch(**fields):
    return Batch(generator=torch.Generator().manual_seed(3), **fields)


def double(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def head(layers, tokens):
    """LayerNorm and linear layer of a part, in numpy."""
    norm, linear = layers
    gain, shift, weight, bias = (
        p.detach().numpy() for p in (norm.weight, norm.bias, linear.weight, linear.bias)
    )
    centred = tokens - tokens.mean(-1, keepdims=True)
    normed = centred / np.sqrt(tokens.var(-1, keepdims=True) + 1e-5)
    return (normed * gain + shift) @ weight.T + bias


def test_loss_is_that_of_the_equation(vits):
    torch.manual_seed(0)
    term = Features(*vits, cls=0.5, patch=2, masked=3).double()
    for parameter in term.parameters():  # norms that start as the identity would hide a mistake
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert term.compares == [(FINAL_PREFIX, FINAL_PREFIX), (FINAL, FINAL), (SECOND, FINAL)]
    prefix, teachers_prefix = double(4, 1, 6), double(4, 1, 8)
    first, second, teacher = double(4, 6, 6), double(4, 6, 6), double(4, 6, 8)
    mask = torch.tensor([[1, 0, 1, 0, 1, 0], [0, 0, 0, 1, 1, 1]] * 2)
    loss = term([(prefix, teachers_prefix), (first, teacher), (second, teacher)], Batch(mask=mask))

    heads, t = term.heads, teacher.numpy()
    cls = head(heads["cls"], prefix.numpy()) - teachers_prefix.numpy()
    patch = head(heads["patch"], first.numpy()) - t
    masked = (head(heads["masked"], second.numpy()) - t)[mask.bool().numpy()]
    expected = (
        0.5 * (cls**2).mean() + 2 * (np.concatenate([cls, patch], 1) ** 2).mean() + 3 * (masked**2).mean()
    )
    assert abs(loss.item() - expected) <= 1e-12 * expected


def test_gradient_is_that_of_the_loss(vits):
    torch.manual_seed(0)
    term = Features(*vits).double()
    pairs = [(double(4, 1, 6), double(4, 1, 8)), *((double(4, 6, 6), double(4, 6, 8)) for _ in range(2))]
    given = [student.requires_grad_() for student, _ in pairs]
    term(pairs, batch()).backward()
    for student in given:
        assert student.grad.any()
        direction = torch.randn_like(student)
        ahead, behind = (
            term([(s + step * direction if s is student else s, t) for s, t in pairs], batch()).item()
            for step in (1e-5, -1e-5)
        )
        slope = (student.grad * direction).sum().item()
        assert slope == pytest.approx((ahead - behind) / 2e-5, rel=1e-7)


def test_the_view_hides_what_the_loss_compares(vits):
    """The masked patches are at the mean colour, the others untouched, and only they are compared."""
    images = torch.randn(64, 3, 8, 12)
    term = Features(*vits, cls=0, patch=0)
    seen = term.view(images, batch())
    hidden = (seen == 0).all(1)  # [B, H, W]
    assert torch.equal(seen, images * ~hidden[:, None])
    blocks = hidden.unflatten(2, (3, 4)).unflatten(1, (2, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
    assert torch.equal(blocks.all(-1), blocks.any(-1))  # whole patches
    masked = blocks.all(-1)  # [B, N]
    assert set(masked.sum(1).tolist()) == {0, 3} and masked.any(1).sum() == 32

    student, teacher = torch.randn(64, 6, 6, requires_grad=True), torch.randn(64, 6, 8)
    loss = term([(student, teacher)], batch())
    loss.backward()
    assert torch.equal(student.grad.any(-1), masked)
    torch.testing.assert_close(loss, (term.heads["masked"](student) - teacher)[masked].square().mean())


@pytest.mark.parametrize("size", [(9, 13), (8, 12), (20, 20)])
def test_views_of_any_size_are_masked(size, vits):
    images = torch.randn(8, 3, *size)
    seen = Features(*vits, mask_probability=1).view(images, batch())
    share = (seen == 0).all(1).float().mean()
    assert 0.4 < share < 0.6


def test_processes_and_accumulation_change_nothing(vits):
    torch.manual_seed(0)
    term = Features(*vits, cls=0, patch=0).double()
    student, teacher, images = double(12, 6, 6), double(12, 6, 8), double(12, 3, 8, 12)
    whole, view = term([(student, teacher)], batch()), term.view(images, batch())
    rows = torch.tensor([[0, 11, 1, 10], [2, 9, 3, 8], [4, 7, 5, 6]])
    parts = [term([(student[r], teacher[r])], batch(rows=r, global_size=12)) for r in rows]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    for r in rows:
        assert torch.equal(term.view(images[r], batch(rows=r, global_size=12)), view[r])


def test_a_batch_without_masked_images_has_a_loss_of_0_and_a_gradient(vits):
    term = Features(*vits, masked=2)
    student = torch.randn(2, 6, 6, requires_grad=True)
    pairs = [(torch.randn(2, 1, 6), torch.zeros(2, 1, 8)), (torch.randn(2, 6, 6), torch.zeros(2, 6, 8))]
    without = term([*pairs, (student, torch.zeros(2, 6, 8))], Batch(mask=torch.zeros(2, 6)))
    without.backward()
    assert without.isfinite() and not student.grad.any()
    assert all(parameter.grad is not None for parameter in term.parameters())


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"patch": 0.0, "masked": 0.0}, ["cls"]),
        ({"cls": 0.0, "patch": 0.0}, ["masked"]),
        ({"cls": 0.0, "masked": 0.0}, ["cls", "patch"]),  # the class token's layer serves in both
        ({"patch": 0.0}, ["cls", "masked"]),
    ],
)
def test_a_part_without_weight_has_no_layers_and_no_view(options, parts, vits):
    term = Features(*vits, **options)
    assert list(term.heads) == parts
    assert term.asks_second_view == ("masked" in parts) == any(ours.view for ours, _ in term.compares)


def test_without_a_class_token_in_both_the_embeddings_are_compared(vits):
    student, teacher = vits
    for pair in (
        (student, replace(teacher, class_token=False)),
        (replace(student, class_token=False), teacher),
    ):
        term = Features(*pair)
        assert term.compares[0] == (EMBEDDING, EMBEDDING)
        [note] = term.warnings
        assert note == "features compares the embeddings of both models: vit has no class token"
    [note] = Features(*vits).warnings
    assert note == "features compares the class tokens of both models"


def test_the_patch_part_stands_alone_where_there_are_embeddings(vits):
    student, teacher = (replace(vit, class_token=False) for vit in vits)
    term = Features(student, teacher, cls=0, masked=0)
    assert term.compares == [(FINAL, FINAL)] and not term.warnings


def test_a_model_without_class_token_and_embedding_compares_patches_only(vits):
    student, teacher = vits[0], replace(vits[1], class_token=False, embed_dim=0, name="bare")
    with pytest.raises(UserError, match="bare has no embedding"):
        Features(student, teacher)
    assert list(Features(student, teacher, cls=0).heads) == ["patch", "masked"]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"cls": -1.0}, "cls must be at least 0, not -1"),
        ({"cls": 0.0, "patch": 0.0, "masked": 0.0}, "are no weights"),
        ({"mask": 1.0}, "mask must be below 1, not 1"),
        ({"mask": 0.0}, "mask must be above 0, not 0"),
        ({"mask_probability": 0.0}, "mask_probability must be above 0, not 0"),
        ({"mask_probability": 1.5}, "mask_probability must be at most 1, not 1.5"),
    ],
)
def test_values_out_of_range_are_refused(options, complaint, vits):
    with pytest.raises(UserError, match=complaint):
        Features(*vits, **options)


def test_two_second_views_are_refused(vits):
    with pytest.raises(UserError, match="both ask for a second view"):
        Objective("features + features(mask=0.7)", *vits)


@pytest.mark.parametrize("options", ["", "(patch=0, masked=0)", '(at="mha")'])
@pytest.mark.parametrize("teacher", ["deep", "oblong", "registers", "tokenless", "swin"])
def test_models_of_every_shape_teach(teacher, options, learn):
    _, learner = learn(f"features{options}", "flat", teacher)
    [note] = (text for text in learner.objective.warnings if "kd is the safer choice" not in text)
    assert ("class tokens" in note) == (teacher not in ("tokenless", "swin"))


def test_a_hierarchical_student_learns_from_a_flat_teacher(learn):
    _, learner = learn("features", "swin", "registers")
    assert learner.objective.student_taps == {EMBEDDING, FINAL, SECOND}


def test_the_patches_may_be_read_after_the_attention(vits):
    term = Features(*vits, at="mha")
    middle = Tap("attention_output", 2)
    assert [ours for ours, _ in term.compares] == [FINAL_PREFIX, middle, replace(middle, view=1)]
