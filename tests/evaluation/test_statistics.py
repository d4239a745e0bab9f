"""Intervals, calibration and McNemar's test, against textbook computations."""

from __future__ import annotations

import math

import numpy as np
import pytest

from vitkd_cli.evaluation.statistics import (
    BINS,
    by_class,
    calibration,
    compare,
    confusions,
    holm,
    mcnemar,
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


def test_mcnemar_of_many_images_does_not_underflow():
    assert 0 < mcnemar(10_000, 14_000) < 1e-100
    assert mcnemar(0, 0) == 1


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
    assert 0 <= found.low < found.high


def test_calibration_tells_an_overconfident_model():
    sure, right = draw(2000)
    good, bad = calibration(sure, right), calibration(np.minimum(1, sure + 0.2), right)
    assert good.low < 1 and good.high < bad.low
    assert bad.ece == pytest.approx(16, abs=3)  # 20 points, less where it is cut off at 1


@pytest.mark.parametrize(("sure", "right"), [([0.5], [True]), ([1.0] * 40, [True] * 40)])
def test_calibration_of_few_or_equal_answers(sure, right):
    found = calibration(np.array(sure), np.array(right))
    assert found.ece == pytest.approx(100 * abs(np.mean(sure) - np.mean(right)))
    assert found.counts.sum() == len(sure)


def test_an_interval_of_a_share():
    low, high = share_interval(430, 500)
    spread = 196 * math.sqrt(0.86 * 0.14 / 500)
    assert (low, high) == pytest.approx((86 - spread, 86 + spread), abs=0.3)
    assert share_interval(430, 500) == (low, high)
    assert share_interval(5, 5) == (100, 100)


def test_classes_and_confusions():
    labels, answers = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 2, 2])
    assert by_class(labels, answers) == [(0, 3, 1), (1, 2, 1), (2, 1, 1)]
    assert confusions(labels, answers) == [(0, 1, 2), (1, 2, 1)]
