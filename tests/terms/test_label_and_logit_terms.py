import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.terms.kd import KD
from vitkd_cli.terms.labels import Labels
from vitkd_cli.terms.nkd import NKD

HARD = torch.tensor([3, 0, 23, 7])
MIXED = 0.7 * torch.nn.functional.one_hot(HARD, 24) + 0.3 * torch.nn.functional.one_hot(HARD.flip(0), 24)


@pytest.fixture
def student():
    return torch.randn(4, 24, generator=torch.Generator().manual_seed(0))


def test_bce_on_labels_is_timms_with_the_same_smoothing(student, spec):
    ours = Labels(spec(4), None, smoothing=0.1, bce=True)([(student, None)], Batch(HARD))
    torch.testing.assert_close(ours, BinaryCrossEntropy(smoothing=0.1)(student, HARD))


def test_bce_on_mixed_labels_smooths_before_timms_sees_them(student, spec):
    ours = Labels(spec(4), None, smoothing=0.1, bce=True)([(student, None)], Batch(MIXED))
    torch.testing.assert_close(ours, BinaryCrossEntropy()(student, 0.9 * MIXED + 0.1 / 24))


def test_mixed_labels_are_soft_targets(student, spec):
    ours = Labels(spec(4), None, smoothing=0.0)([(student, None)], Batch(MIXED))
    torch.testing.assert_close(ours, SoftTargetCrossEntropy()(student, MIXED))


def test_soft_cross_entropy_has_the_gradient_of_kl_and_the_teachers_entropy_more(student, spec):
    teacher = student.flip(0)
    losses, gradients = [], []
    for soft_ce in (False, True):
        logits = student.clone().requires_grad_()
        losses.append(KD(spec(4), spec(4), temperature=2.0, soft_ce=soft_ce)([(logits, teacher)], Batch()))
        gradients.append(torch.autograd.grad(losses[-1], logits)[0])
    torch.testing.assert_close(*gradients)
    entropy = torch.distributions.Categorical(logits=teacher / 2).entropy().mean()
    torch.testing.assert_close(losses[1] - losses[0], 4 * entropy)


def test_nkd_takes_the_largest_class_of_mixed_labels(student, spec):
    nkd, pair = NKD(spec(4), spec(4)), [(student, student.flip(0))]
    assert nkd(pair, Batch(MIXED)) == nkd(pair, Batch(HARD))
    assert nkd(pair, Batch(HARD)) != nkd(pair, Batch(HARD.flip(0)))


def test_nkd_wants_classes_beside_the_label(spec):
    with pytest.raises(UserError, match="2 classes") as refusal:
        NKD(spec(4, classes=2), spec(4, classes=2))
    assert "kd" in refusal.value.hint
    assert "19 classes" in NKD(spec(4, classes=19), spec(4, classes=19)).warnings[0]
    assert not NKD(spec(4, classes=20), spec(4, classes=20)).warnings


@pytest.mark.parametrize(
    ("term", "options"),
    [
        (Labels, {"smoothing": 1.0}),
        (Labels, {"smoothing": -0.1}),
        (KD, {"temperature": 0.0}),
        (NKD, {"temperature": -1.0}),
        (NKD, {"gamma": -1.0}),
    ],
)
def test_options_out_of_range_are_refused_by_name(term, options, spec):
    [(option, value)] = options.items()
    with pytest.raises(UserError, match=f"{option} is {value:g}"):
        term(spec(4), spec(4), **options)
