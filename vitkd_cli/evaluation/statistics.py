"""What a finite set of images can say: intervals, calibration, and whether two models differ.

Everything is computed from what :class:`vitkd_cli.evaluation.Metrics` keeps of each image; draws are seeded,
so the same answers give the same intervals.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
BINS, RESAMPLES, LEVEL = 15, 1000, 0.95
_TAILS = (100 * (1 - LEVEL) / 2, 100 * (1 + LEVEL) / 2)


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of a share, in percent (Efron 1979).

    Of ``count`` images drawn with replacement a binomial number is right, so no image need be drawn.
    """
    draws = np.random.default_rng(0).binomial(count, hits / count, 100 * RESAMPLES) / count
    low, high = np.percentile(draws, _TAILS)
    return 100 * float(low), 100 * float(high)


@dataclass(frozen=True)
class Calibration:
    """Does a model know how often it is right? By bins of equal mass, least sure first.

    Attributes:
        ece: expected calibration error, percent: the mean over images of |accuracy - confidence| of their
            bin (Naeini et al. 2015; of equal mass, Nguyen and O'Connor 2015).
        low, high: its 95 % basic-bootstrap interval. Binning makes the error of few images too large; the
            interval is freed of that, so it may lie below ``ece``.
        confidence, accuracy: ``[bins]`` mean confidence and share of right answers, in [0, 1].
        counts: ``[bins]`` images.
    """

    ece: float
    low: float
    high: float
    confidence: Array
    accuracy: Array
    counts: Array


def calibration(confidence: Array, right: Array) -> Calibration:
    """Calibration of the top answers.

    Args:
        confidence: ``[N]`` probability given to the class named first.
        right: ``[N]`` whether it is the image's.
    """
    order = np.argsort(confidence, kind="stable")
    confidence, right = confidence[order], right[order].astype(float)
    count = len(order)
    bins = min(BINS, count)

    def binned(weights: Array) -> tuple[Array, Array, Array]:
        """Weight, weighted confidence and weighted accuracy of each bin."""
        edges = np.searchsorted(np.cumsum(weights), count * np.arange(bins) / bins, side="right")
        edges = np.minimum(edges, count - 1)
        sums = [np.add.reduceat(weights * values, edges) for values in (1.0, confidence, right)]
        empty = np.append(edges[:-1] == edges[1:], False)  # reduceat gives an empty bin its first element
        return tuple(np.where(empty, 0, total) for total in sums)  # type: ignore[return-value]

    def error(weights: Array) -> float:
        _, sure, hit = binned(weights)
        return 100 * float(np.abs(sure - hit).sum()) / count

    plain = np.ones(count)
    ece = error(plain)
    generator = np.random.default_rng(0)
    drawn = (generator.integers(count, size=count) for _ in range(RESAMPLES))
    draws = [error(np.bincount(images, minlength=count).astype(float)) for images in drawn]
    low, high = (max(0.0, 2 * ece - float(edge)) for edge in np.percentile(draws, _TAILS[::-1]))
    mass, sure, hit = binned(plain)
    known = np.maximum(mass, 1)
    return Calibration(ece, low, high, sure / known, hit / known, mass.astype(int))


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images, by McNemar's exact test (McNemar 1947).

    Attributes:
        first, second: the models.
        only_first, only_second: images that one alone names rightly.
        p: two-sided, of a difference as large by chance; ``p_holm`` corrected for all pairs (Holm 1979).
    """

    first: str
    second: str
    only_first: int
    only_second: int
    p: float
    p_holm: float

    def sentence(self, count: int) -> str:
        """In words, and only about these two checkpoints."""
        gap = 100 * (self.only_first - self.only_second) / count
        better, worse = (self.first, self.second) if gap >= 0 else (self.second, self.first)
        facts = f"{abs(gap):.2f} points of top-1, p = {self.p_holm:.2g}"
        right = max(self.only_first, self.only_second), min(self.only_first, self.only_second)
        seen = f"right alone on {right[0]:,} images against {right[1]:,}"
        if self.p_holm < 1 - LEVEL:
            return f"{better} is better than {worse} on these images beyond chance: {facts}, {seen}"
        return f"{better} and {worse} cannot be told apart on these images: {facts}, {seen}"


def compare(models: Sequence[tuple[str, Array]]) -> list[Comparison]:
    """Every pair of models: ``(name, [N] right or wrong)``, on the same images."""
    pairs = []
    for index, (first, ours) in enumerate(models):
        for second, theirs in models[index + 1 :]:
            only = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
            pairs.append((first, second, *only, mcnemar(*only)))
    corrected = holm([pair[-1] for pair in pairs])
    return [Comparison(*pair, p) for pair, p in zip(pairs, corrected, strict=True)]


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p: of n coins, as few as the smaller count on one side, or fewer, on either side."""
    flips, fewest = only_first + only_second, min(only_first, only_second)
    ways = below = 1
    for heads in range(fewest):  # whole numbers, so that no p underflows on the way
        ways = ways * (flips - heads) // (heads + 1)
        below += ways
    return min(1.0, 2 * below / 2**flips)


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for their number, in the order given."""
    corrected = [1.0] * len(values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def by_class(labels: Array, predictions: Array) -> list[tuple[int, int, int]]:
    """``(class, images, right)`` of every class that there is an image of, worst first."""
    images, right = Counter(labels.tolist()), Counter(labels[labels == predictions].tolist())
    return sorted(((c, n, right[c]) for c, n in images.items()), key=lambda row: (row[2] / row[1], -row[1]))


def confusions(labels: Array, predictions: Array) -> list[tuple[int, int, int]]:
    """``(class, taken for, images)``, most frequent first."""
    wrong = labels != predictions
    pairs = Counter(zip(labels[wrong].tolist(), predictions[wrong].tolist(), strict=True))
    return [(c, taken, n) for (c, taken), n in sorted(pairs.items(), key=lambda item: (-item[1], item[0]))]
