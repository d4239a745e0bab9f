import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy

from vitkd_cli.errors import UserError
from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.terms.dist import DIST, pearson
from vitkd_cli.terms.dkd import DKD
from vitkd_cli.terms.kd import KD
from vitkd_cli.terms.labels import Labels
from vitkd_cli.terms.nkd import NKD
from vitkd_cli.terms.token import Token

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


def test_standardised_logits_have_no_size_and_no_mean(student, spec):
    kd, teacher = KD(spec(4), spec(4), standardize=True), student.flip(0)
    torch.testing.assert_close(
        kd([(3 * student - 5, 0.1 * teacher + 2)], Batch()), kd([(student, teacher)], Batch())
    )


@pytest.mark.parametrize("term", [NKD, DKD])
def test_the_largest_class_of_mixed_labels_is_taken(term, student, spec):
    built, pair = term(spec(4), spec(4)), [(student, student.flip(0))]
    assert built(pair, Batch(MIXED)) == built(pair, Batch(HARD))
    assert built(pair, Batch(HARD)) != built(pair, Batch(HARD.flip(0)))


@pytest.mark.parametrize("term", [NKD, DKD])
def test_classes_beside_the_label_are_wanted(term, spec):
    with pytest.raises(UserError, match="2 classes") as refusal:
        term(spec(4, classes=2), spec(4, classes=2))
    assert "kd" in refusal.value.hint
    assert "19 classes" in term(spec(4, classes=19), spec(4, classes=19)).warnings[0]
    assert not term(spec(4, classes=20), spec(4, classes=20)).warnings


def test_dkd_is_kd_where_the_others_weigh_what_the_teacher_leaves_them(student, spec):
    pair, label = [(student[:1], student[1:2])], HARD[:1]
    p_y = (student[1:2] / 2).softmax(1)[0, label]
    dkd = DKD(spec(4), spec(4), alpha=1.0, beta=float(1 - p_y), temperature=2.0)
    torch.testing.assert_close(dkd(pair, Batch(label)), KD(spec(4), spec(4), temperature=2.0)(pair, Batch()))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_dist_compares_the_images_of_all_processes_and_sends_sums(spec, processes):
    """Processes are threads here, which wait for each other where processes would."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 8, 24, dtype=torch.float64)
    student.requires_grad_()
    dist = DIST(spec(4), spec(4), beta=0.0)
    whole = 1 - pearson(student.softmax(1).T, teacher.softmax(1).T).mean()
    slots, sent, barrier = {}, [], threading.Barrier(processes)

    def gathered(rank, rows):
        slots[rank] = rows
        sent.append(rows.numel())
        barrier.wait(10)
        found = torch.cat([slots[other] for other in range(processes)])
        barrier.wait(10)
        return found

    def across(rank):
        mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
        return dist([(student[mine], teacher[mine])], Batch(gather=partial(gathered, rank)))

    with ThreadPoolExecutor(processes) as pool:
        losses = list(pool.map(across, range(processes)))
    [wanted] = torch.autograd.grad(whole, student, retain_graph=True)
    for loss in losses:
        torch.testing.assert_close(loss, whole)
        [gradient] = torch.autograd.grad(loss, student, retain_graph=True)
        torch.testing.assert_close(gradient, wanted)
    assert max(sent) == 3 * 24  # however many images
    assert dist([(student[:4], teacher[:4])], Batch()) != whole


def test_dist_of_agreeing_models_is_zero_and_one_image_has_no_relations(student, spec):
    dist = DIST(spec(4), spec(4))
    assert dist([(student, student)], Batch()) == pytest.approx(0, abs=1e-4)
    assert dist([(student[:1], student[:1])], Batch()) == pytest.approx(1, abs=1e-4)


def test_a_token_wants_a_distillation_head_for_the_teachers_classes(spec):
    with pytest.raises(UserError, match="vit has no distillation head") as refusal:
        Token(spec(4), spec(4))
    assert "deit_tiny_distilled" in refusal.value.hint and "kd" in refusal.value.hint
    with pytest.raises(UserError, match="token compares logits, and vit has 23 classes"):
        Objective("token", spec(4, distilled=True), spec(4, classes=23))
    with pytest.raises(UserError, match="token reads the student's logits"):
        Objective("token", spec(4, classes=0, distilled=True), spec(4))


def test_hard_targets_refuse_a_temperature(spec):
    with pytest.raises(UserError, match="hard targets have no temperature"):
        Token(spec(4, distilled=True), spec(4), temperature=3.0)


@pytest.mark.parametrize(
    ("term", "options"),
    [
        (Labels, {"smoothing": 1.0}),
        (Labels, {"smoothing": -0.1}),
        (KD, {"temperature": 0.0}),
        (NKD, {"temperature": -1.0}),
        (NKD, {"gamma": -1.0}),
        (DKD, {"alpha": -1.0}),
        (DKD, {"beta": -1.0}),
        (DKD, {"temperature": 0.0}),
        (DIST, {"beta": -1.0}),
        (DIST, {"gamma": -1.0}),
        (DIST, {"temperature": 0.0}),
        (Token, {"temperature": 0.0}),
    ],
)
def test_options_out_of_range_are_refused_by_name(term, options, spec):
    [(option, value)] = options.items()
    with pytest.raises(UserError, match=f"{option} must be .*, not {value:g}"):
        term(spec(4, distilled=True), spec(4), **options)
