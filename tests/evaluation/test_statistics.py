"""Intervals, calibration and tests: what they promise, and textbook computations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, t, ttest_rel

from vitkd_cli.evaluation import statistics
from vitkd_cli.evaluation.statistics import (
    BINS,
    by_class,
    calibration,
    compare,
    confusions,
    holm,
    mcnemar,
    paired,
    share_interval,
)


def draw(count, seed=0):
    """Answers of a model that is right as often as it is sure."""
    generator = np.random.default_rng(seed)
    sure = generator.uniform(0.2, 1, count)
    return sure, generator.uniform(size=count) < sure


@pytest.mark.parametrize(("few", "many"), [(0, 5), (3, 10), (5, 5), (40, 61), (430, 500)])
def test_mcnemar_is_the_two_sided_binomial_test(few, many):
    flips = few + many
    tail = sum(math.comb(flips, heads) for heads in range(few + 1)) / 2**flips
    assert mcnemar(few, many) == mcnemar(many, few) == pytest.approx(min(1, 2 * tail), rel=1e-12)


def test_no_p_is_zero():
    assert 0 < mcnemar(10_000, 14_000) < 1e-100
    assert mcnemar(100, 20_000) > 0
    assert mcnemar(0, 0) == 1
    [pair] = compare([("a", np.ones(20_000, bool)), ("b", np.zeros(20_000, bool))])
    assert "p < 1e-100" in pair.sentence(20_000)


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])
    assert holm([0.9, 0.8]) == [1, 1]


def test_pairs_are_compared_on_the_same_images():
    first, second = np.array([1, 1, 1, 1, 0, 1, 1], bool), np.array([0, 0, 0, 0, 1, 0, 1], bool)
    [pair] = compare([("a", first), ("b", second)])
    assert (pair.only_first, pair.only_second) == (5, 1)
    assert pair.p == pair.p_holm == pytest.approx(2 * 7 / 64)
    assert "cannot be told apart" in pair.sentence(7)
    [pair] = compare([("a", np.ones(20, bool)), ("b", np.arange(20) < 8)])
    assert pair.sentence(20).startswith("a is better than b on these images beyond chance: 60.00 points")
    assert len(compare([(name, first) for name in "abc"])) == 3


def test_calibration_is_the_mean_gap_of_equal_bins():
    sure, right = draw(300)
    order = np.argsort(sure)
    gaps = [abs(sure[part].mean() - right[part].mean()) for part in np.split(order, BINS)]
    found = calibration(sure, right)
    assert found.ece == pytest.approx(100 * np.mean(gaps))
    assert found.counts.tolist() == [20] * BINS
    assert found.accuracy[3] == pytest.approx(right[np.split(order, BINS)[3]].mean())


def test_calibration_tells_an_overconfident_model():
    sure, right = draw(2000)
    good, bad = calibration(sure, right), calibration(np.minimum(1, sure + 0.2), right)
    assert good.ece < good.by_chance < 4 < bad.ece
    assert bad.ece == pytest.approx(16, abs=3)  # 20 points, less where it is cut off at 1


@pytest.mark.parametrize("images", [50, 300])
def test_one_calibrated_model_in_twenty_is_above_chance(images, monkeypatch):
    monkeypatch.setattr(statistics, "DRAWS", 200)
    found = [calibration(*draw(images, seed)) for seed in range(400)]
    assert 0.02 < np.mean([one.ece > one.by_chance for one in found]) < 0.09


@pytest.mark.parametrize("order", ["by class", "shuffled"])
def test_images_of_equal_confidence_share_a_bin(order):
    """A model that always says the first of ten classes, with 10 %, is calibrated."""
    right = np.arange(500) < 50
    if order == "shuffled":
        right = np.random.default_rng(0).permutation(right)
    noise = 1e-9 * np.arange(500)  # what another batch size would do
    assert calibration(np.full(500, 0.1) + noise, right).ece < 1e-4
    halves = calibration(np.repeat([0.3, 0.9], 250), np.concatenate([np.arange(250) < 75, right[:250]]))
    assert halves.counts.tolist() == [250, 250]
    assert halves.confidence == pytest.approx([0.3, 0.9])


@pytest.mark.parametrize(("sure", "right"), [([0.5], [True]), ([1.0] * 40, [True] * 40)])
def test_calibration_of_few_or_equal_answers(sure, right):
    found = calibration(np.array(sure), np.array(right))
    assert found.ece == pytest.approx(100 * abs(np.mean(sure) - np.mean(right)))
    assert found.counts.sum() == len(sure)


@pytest.mark.parametrize("count", [20, 50, 200])
@pytest.mark.parametrize("share", [0.5, 0.95, 0.99])
def test_the_interval_of_a_share_holds_the_truth(share, count):
    hits = np.arange(count + 1)
    held = [low <= 100 * share <= high for low, high in (share_interval(int(n), count) for n in hits)]
    assert binom.pmf(hits, count, share)[held].sum() > 0.9


def test_all_right_is_not_certainty():
    assert share_interval(500, 500) == pytest.approx((99.2376, 100), abs=1e-4)
    assert share_interval(0, 500)[0] == 0


# --- two arms, seed by seed -------------------------------------------------------------------------------


def arms(seeds, gain=0.0, experiments=1000):
    """Accuracies ``[experiments, seeds]`` of two arms; a seed's spread is 1, and each has its own level."""
    first, second = np.random.default_rng(0).standard_normal((2, experiments, seeds))
    level = 70 + 5 * np.random.default_rng(1).standard_normal((experiments, 1))
    return first + gain + level, second + level


def claimed(first, second):
    """Of each experiment: 1 where the interval is above 0, -1 where it is below, else 0."""
    found = [paired(*both) for both in zip(first, second, strict=True)]
    return np.array([(one.low > 0) - (one.high < 0) for one in found])


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
def test_a_difference_is_claimed_by_chance_in_five_experiments_of_a_hundred(seeds):
    wrong = np.mean(claimed(*arms(seeds)) != 0)
    assert wrong == 0 if seeds == 2 else 0.035 < wrong < 0.065


def test_a_gain_is_found_as_often_as_by_a_paired_t_test():
    """And more seeds find more: of one spread 23 % at 5 seeds, 50 % at 10."""
    found = []
    for seeds in (3, 5, 10):
        both = arms(seeds, gain=1)
        better = claimed(*both) != 0
        assert (better == (ttest_rel(*both, axis=1).pvalue < 0.05)).all()
        found.append(better.mean())
    assert found[0] < 0.2 < found[1] < 0.4 < found[2]


@pytest.mark.parametrize("seeds", [5, 10])
def test_the_detectable_gain_is_found_in_four_cases_of_five(seeds):
    spread = math.sqrt(2)  # of a difference
    gain = sum(t.ppf(share, seeds - 1) for share in (0.975, 0.8)) * spread / math.sqrt(seeds)
    assert np.mean(claimed(*arms(seeds, gain)) == 1) == pytest.approx(0.8, abs=0.05)
    one = paired(*(arm[0] for arm in arms(seeds)))
    assert one.detectable == pytest.approx(gain * one.sd / spread)


def test_equal_differences_claim_nothing():
    found = paired([70.1, 80.3, 90.2], [69.1, 79.3, 89.2])
    assert found.mean == pytest.approx(1) and not found.claims
    assert found.low == -math.inf and found.high == math.inf and math.isinf(found.detectable)


def test_classes_and_confusions():
    labels, answers = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 2, 2])
    assert by_class(labels, answers) == [(0, 3, 1), (1, 2, 1), (2, 1, 1)]
    assert confusions(labels, answers) == [(0, 1, 2), (1, 2, 1)]
