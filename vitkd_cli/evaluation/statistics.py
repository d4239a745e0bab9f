"""What a finite set of images or seeds can say: intervals, calibration, and whether two models differ.

Everything is computed from what :class:`vitkd_cli.evaluation.Metrics` keeps of each image; draws are seeded,
so the same answers give the same figures.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LEVEL = 0.95
MIN_SEEDS = 3  # two differences estimate their spread too poorly to claim anything
BINS, IMAGES_PER_BIN, DRAWS = 15, 20, 1000
_TIE = 6  # decimals: confidences that differ by less differ by rounding
_SMALLEST_P = 1e-100


def share_interval(hits: int, count: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # scipy.stats would take a second to import
    middle = hits + z**2 / 2
    half = z * math.sqrt(hits * (count - hits) / count + z**2 / 4)
    low, high = ((middle + side * half) / (count + z**2) for side in (-1, 1))
    return 100 * max(low, 0.0), 100 * min(high, 1.0)


@dataclass(frozen=True)
class Paired:
    """Differences between two arms, paired by seed, with Student's t.

    Attributes:
        n: pairs.
        mean, sd: of the differences.
        low, high: 95 % interval of the true mean difference; the whole line where nothing can be claimed.
        detectable: the true difference that as many seeds with this spread find in four cases of five.
        p: two-sided; 1 where nothing can be claimed.
    """

    n: int
    mean: float
    sd: float
    low: float = -math.inf
    high: float = math.inf
    detectable: float = math.inf
    p: float = 1.0

    @property
    def claims(self) -> bool:
        """Are there seeds enough, and do they differ, to say anything?"""
        return math.isfinite(self.detectable)


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
    """The difference first - second of two arms, ``[N]`` each, in the order of the seeds.

    Nothing is claimed from fewer than three pairs, or where all differences are equal: so few values of
    accuracy are possible then that their spread is not seen.
    """
    from scipy.stats import t

    differences = np.subtract(first, second, dtype=float)
    n, mean = len(differences), float(differences.mean())
    sd = float(differences.std(ddof=1)) if n > 1 else 0.0
    if n < MIN_SEEDS or sd < 1e-9:  # percent; equal differences differ by rounding
        return Paired(n, mean, sd)
    error = sd / math.sqrt(n)
    tail, power = (float(t.ppf(share, n - 1)) for share in ((1 + LEVEL) / 2, 0.8))
    p = 2 * float(t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, sd, mean - tail * error, mean + tail * error, (tail + power) * error, p)


def spread(groups: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    """The mean of each group, and half its 95 % interval by Student's t; 0 for a group of one or two."""
    from scipy.stats import t

    means = [float(np.mean(group)) for group in groups]
    reach = [
        float(t.ppf((1 + LEVEL) / 2, len(group) - 1) * np.std(group, ddof=1) / math.sqrt(len(group)))
        if len(group) >= MIN_SEEDS
        else 0.0
        for group in groups
    ]
    return means, reach


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy of the class named first, in bins of equal mass, least confident first.

    Attributes:
        ece: expected calibration error, percent: the mean over images of |accuracy - confidence| of their
            bin (Naeini et al. 2015; of equal mass, Nguyen and O'Connor 2015). Images of equal confidence
            share a bin.
        by_chance: the error that 95 % of calibrated models with these confidences stay below: the 95th
            percentile over labels drawn from the confidences (Bröcker and Smith 2007).
        confidence, accuracy: ``[bins]`` mean confidence and share of right answers, in [0, 1].
        counts: ``[bins]`` images.
    """

    ece: float
    by_chance: float
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
    bins = min(BINS, max(1, count // IMAGES_PER_BIN))
    rounded = confidence.round(_TIE)
    last = rounded[count * np.arange(1, bins) // bins - 1]
    # Where a tie would be cut, the order of the images would decide: a bin ends where the tie ends.
    starts = np.unique([0, *np.searchsorted(rounded, last, side="right")])
    starts = starts[starts < count]
    counts = np.diff([*starts, count])
    sure, hit = (np.add.reduceat(values, starts) for values in (confidence, right))

    def error(hit: Array) -> float:
        return 100 * float(np.abs(sure - hit).sum()) / count

    generator = np.random.default_rng(0)
    drawn = (generator.random(count) < confidence for _ in range(DRAWS))
    by_chance = np.percentile([error(np.add.reduceat(labels.astype(float), starts)) for labels in drawn], 95)
    return Calibration(error(hit), float(by_chance), sure / counts, hit / counts, counts)


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
        p = f"p = {self.p_holm:.2g}" if self.p_holm > _SMALLEST_P else f"p < {_SMALLEST_P:g}"
        facts = f"{abs(gap):.2f} points of top-1, {p}"
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
    """Two-sided exact p of the images that one model alone names rightly; never below 2e-308."""
    from scipy.stats import binomtest

    flips = only_first + only_second
    # What a float cannot hold is not 0.
    return max(sys.float_info.min, float(binomtest(only_first, flips).pvalue)) if flips else 1.0


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
