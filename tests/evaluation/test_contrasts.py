"""Arms beside each other: what is claimed, how often by chance, and for which images."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm, t, ttest_rel

from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.cache import read_rows, write_rows
from vitkd_cli.evaluation.contrasts import BETTER, NOT_SHOWN, WORSE, Scores, contrasts, crossed
from vitkd_cli.evaluation.metrics import per_image
from vitkd_cli.evaluation.statistics import holm, spread


def scored(*top1, right=()):
    return Scores(dict(enumerate(top1)), dict(enumerate(right)))


def test_each_arm_is_paired_with_the_first_and_the_run_pays_for_all():
    top1 = np.random.default_rng(1).normal(70, 1, (4, 5)) + np.array([[3.0], [0], [2.5], [8]])
    found = contrasts({name: scored(*arm) for name, arm in zip("abcd", top1, strict=True)}, images=500)
    assert [(one.first, one.second, one.found.n, one.images) for one in found] == [
        ("a", other, 5, 500) for other in "bcd"
    ]
    p = [ttest_rel(top1[0], other).pvalue for other in top1[1:]]
    assert [one.p for one in found] == pytest.approx(holm(p))
    assert [one.verdict for one in found] == [BETTER, NOT_SHOWN, WORSE]
    assert [one.found.mean for one in found] == pytest.approx(list((top1[0] - top1[1:]).mean(1)))


def test_a_difference_that_alone_would_be_shown_may_not_be_among_others():
    first, close = np.array([2.0, 3.2, 4.1, 2.4, 5.0]), np.zeros(5)
    close = first - np.array([0.3, 1.5, 0.6, 1.9, 0.9])  # p = 0.026
    alone = contrasts({"a": scored(*first), "b": scored(*close)})
    noise = {f"n{i}": scored(*(first + shift)) for i, shift in enumerate(np.eye(5)[:2] - 0.2)}
    among = contrasts({"a": scored(*first), "b": scored(*close), **noise})
    assert (alone[0].verdict, among[0].verdict) == (BETTER, NOT_SHOWN)
    assert among[0].p == pytest.approx(3 * alone[0].p)


@pytest.mark.parametrize("gains", [[5.0], [5.0, 5.1], [1.0, 1.0, 1.0], [2.0] * 10])
def test_few_seeds_and_equal_differences_claim_nothing(gains):
    theirs = np.arange(len(gains)) * 3.0
    right = [np.arange(20) < 10 + seed for seed in range(len(gains))]
    found = contrasts(
        {"a": scored(*(theirs + gains), right=right), "b": scored(*theirs, right=right[::-1]), "c": scored()}
    )
    [one] = found
    assert not one.claims and one.verdict == "" and one.wider is None
    facts = one.facts()
    assert facts["verdict"] == "" and facts["difference"] == pytest.approx(np.mean(gains))
    assert {facts[key] for key in ("low", "high", "low_other_images", "p_holm", "detectable")} == {None}


def test_what_claims_nothing_costs_the_others_nothing():
    ours, theirs = [1.0, 2.0, 2.9, 4.2], [0.0, 0.8, 2.1, 3.0]
    arms = {"a": scored(*ours), "b": scored(*theirs)}
    [alone] = contrasts(arms)
    beside = contrasts({**arms, "c": scored(*np.subtract(ours, 1)), "d": scored(1.0, 3.0)})
    assert [one.claims for one in beside] == [True, False, False]
    assert beside[0].p == alone.p == ttest_rel(ours, theirs).pvalue


def test_the_interval_for_other_images_wants_the_answers_of_every_student():
    top1 = [60.0, 62.0, 65.0]
    right = list(np.random.default_rng(0).random((3, 50)) < 0.6)
    ours, theirs = scored(*top1, right=right), scored(55.0, 56.0, 61.0, right=right[::-1])
    assert contrasts({"a": ours, "b": theirs})[0].wider is not None
    for lacking in (
        scored(*top1),
        scored(*top1, right=right[:2]),
        scored(*top1, right=[right[0][:40], *right[1:]]),
    ):
        assert contrasts({"a": lacking, "b": theirs})[0].wider is None


def test_false_alarms_of_a_run_are_five_of_a_hundred_whatever_the_number_of_arms():
    generator = np.random.default_rng(0)
    for others, experiments in ((1, 1000), (8, 250)):  # without Holm's correction the second would be 0.25
        drawn = generator.standard_normal((experiments, 1 + others, 5))
        wrong = [
            any(
                one.verdict in (BETTER, WORSE)
                for one in contrasts({str(arm): scored(*top1) for arm, top1 in enumerate(run)})
            )
            for run in drawn
        ]
        assert 0.01 < np.mean(wrong) < 0.08


# Other images ---------------------------------------------------------------------------------------------


def test_crossed_is_the_analysis_of_variance_by_hand():
    """Three seeds, four images: sums of squares as Cornfield and Tukey have them."""
    first = np.array([[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 0, 1]], bool)
    second = np.array([[0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]], bool)
    # Differences: 1 0 0 1 | 0 0 1 1 | 0 0 0 1. Mean 5/12; of seeds 1/2 1/2 1/4; of images 1/3 0 1/3 1.
    mean, of_seeds, of_images = 5 / 12, [1 / 2, 1 / 2, 1 / 4], [1 / 3, 0, 1 / 3, 1]
    ss_seeds = 4 * sum((x - mean) ** 2 for x in of_seeds)
    ss_images = 3 * sum((x - mean) ** 2 for x in of_images)
    ss_rest = sum((x - mean) ** 2 for x in (1, 0, 0, 1, 0, 0, 1, 1, 0, 0, 0, 1)) - ss_seeds - ss_images
    ms = ss_seeds / 2, ss_images / 3, ss_rest / 6
    variance = (ms[0] + ms[1] - ms[2]) / 12
    freedom = variance**2 / ((ms[0] / 12) ** 2 / 2 + (ms[1] / 12) ** 2 / 3 + (ms[2] / 12) ** 2 / 6)
    freedom = max(freedom, 2)
    reach = t.ppf(0.975, freedom) * math.sqrt(variance)
    over_seeds = t.ppf(0.975, 2) * math.sqrt(ms[0] / 12)
    reach = max(reach, over_seeds)
    assert crossed(first, second) == pytest.approx((100 * (mean - reach), 100 * (mean + reach)))


def test_a_component_that_cancels_leaves_an_interval_that_means_something():
    """Where seeds hardly differ and images as the rest does, Satterthwaite's rule alone has no freedom."""
    generator = np.random.default_rng(3)
    for _ in range(200):
        first, second = generator.random((2, 3, 100)) < 0.5
        low, high = crossed(first, second) or (0, 0)
        assert high - low <= 200


def test_crossed_wants_answers_that_fit_each_other():
    right = np.ones((3, 10), bool)
    assert crossed(right, right) is None  # never differ
    assert crossed(right[:1], ~right[:1]) is None
    assert crossed([right[0], right[1][:9]], right[:2]) is None


@pytest.mark.parametrize(("of_seed", "of_image"), [(0.3, 0.3), (0.02, 1.0)])
def test_crossed_holds_the_difference_for_new_seeds_and_images(of_seed, of_image):
    """95 % of the time, where the interval over seeds alone forgets that the images are a sample."""
    generator = np.random.default_rng(0)
    seeds, images, held, narrow = 5, 200, [], []
    true = 100 * np.subtract(*(norm.cdf(m / np.sqrt(2 + of_seed**2 + of_image**2)) for m in (0.8, 0.5)))
    for _ in range(600):
        difficulty, arms = generator.standard_normal(images), []
        for mean in (0.8, 0.5):
            image = mean + difficulty + of_image * generator.standard_normal(images)
            seed = of_seed * generator.standard_normal((seeds, 1))
            arms.append(generator.random((seeds, images)) < norm.cdf(image + seed))
        low, high = crossed(*arms)
        held.append(low <= true <= high)
        [one] = contrasts({n: scored(*(100 * a.mean(1))) for n, a in zip("ab", arms, strict=True)})
        narrow.append(one.found.low <= true <= one.found.high)
    assert 0.93 < np.mean(held) < 0.99
    if of_image == 1:
        assert np.mean(narrow) < 0.9


# What is kept ---------------------------------------------------------------------------------------------


def test_a_spread_is_students_interval_and_none_of_two():
    groups = [[70.0], [70.0, 71.0], [70.0, 71.5, 69.0, 70.5]]
    means, reach = spread(groups)
    assert means == pytest.approx([np.mean(group) for group in groups])
    assert reach[:2] == [0, 0]
    low, high = t.interval(0.95, 3, np.mean(groups[2]), np.std(groups[2], ddof=1) / 2)
    assert reach[2] == pytest.approx((high - low) / 2) and means[2] == pytest.approx((high + low) / 2)


@pytest.mark.parametrize("classes", [3, 12])
@pytest.mark.parametrize("with_teacher", [False, True])
def test_rows_are_what_the_metrics_were_made_of(tmp_path, classes, with_teacher):
    generator = torch.Generator().manual_seed(0)
    scores, teacher = torch.randn(2, 40, classes, generator=generator)
    labels = torch.randint(classes, (40,), generator=generator)
    rows = per_image(scores, labels, teacher if with_teacher else None)
    metrics = Metrics.from_rows(rows, with_teacher=with_teacher)
    assert torch.equal(metrics.rows, rows)
    write_rows(tmp_path / "answers.safetensors", metrics.rows)
    again = Metrics.from_rows(read_rows(tmp_path / "answers.safetensors"), with_teacher=with_teacher)
    assert (again.top1, again.top5, again.loss) == (metrics.top1, metrics.top5, metrics.loss)
    assert torch.equal(again.right, scores.argmax(1) == labels)


def test_answers_of_nearest_neighbours_have_no_probabilities():
    metrics = Metrics(torch.tensor([1, 0, 2]), torch.tensor([[1, 0], [2, 0], [2, 1]]))
    again = Metrics.from_rows(metrics.rows)
    assert again.confidence is None and again.loss is None
    assert again.right.tolist() == [True, False, True]


def test_damaged_answers_are_none(tmp_path):
    file = tmp_path / "answers.safetensors"
    write_rows(file, torch.arange(20.0).view(2, 10))
    assert read_rows(file) is not None
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert read_rows(file) is None and read_rows(tmp_path / "gone") is None
