"""Is the first arm of a run better than the others? Seed by seed, with what its seeds and images can say."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vitkd_cli.evaluation.statistics import LEVEL, MIN_SEEDS, Array, Paired, holm, paired

BETTER, WORSE, NOT_SHOWN = "BETTER", "WORSE", "NO DIFFERENCE SHOWN"


@dataclass(frozen=True)
class Scores:
    """Top-1 of an arm's students by seed, in percent, and whether each named each image rightly, ``[N]``."""

    top1: Mapping[int, float]
    right: Mapping[int, Array]


@dataclass(frozen=True)
class Contrast:
    """The difference between two arms, first − second, in points of top-1.

    Attributes:
        found: over the seeds that both have, on these images.
        p: two-sided, of the paired t test, corrected for the run's contrasts (Holm 1979).
        images: that they were scored on; None where nobody noted it.
        wider: 95 % interval for other images like these; None without the answers.
    """

    first: str
    second: str
    found: Paired
    p: float
    images: int | None = None
    wider: tuple[float, float] | None = None

    @property
    def claims(self) -> bool:
        return self.found.claims

    @property
    def verdict(self) -> str:
        """``BETTER``, ``WORSE``, ``NO DIFFERENCE SHOWN``; empty where nothing can be said."""
        if not self.claims:
            return ""
        if self.p >= 1 - LEVEL:
            return NOT_SHOWN
        return BETTER if self.found.mean > 0 else WORSE

    @property
    def interval(self) -> str:
        """Over seeds, in text; ``–`` where nothing is claimed, as :attr:`significance` has it."""
        return _in_text(self.found.low, self.found.high) if self.claims else "–"

    @property
    def significance(self) -> str:
        """p in text."""
        return ("< 0.001" if self.p < 0.001 else f"{self.p:.3f}") if self.claims else "–"

    @property
    def on_others(self) -> str:
        """The interval for other images like these, in text; empty where nobody knows it."""
        if self.wider is None:
            return ""
        # The images may add nothing to what the seeds differ by.
        return "the same" if abs(self.wider[0] - self.found.low) < 0.005 else _in_text(*self.wider)

    @property
    def on_these(self) -> str:
        return f"these {self.images:,} images" if self.images else "these images"

    def sentence(self) -> str:
        """The difference and its interval, or why nothing is claimed; the verdict may follow."""
        n, said = self.found.n, f"{self.found.mean:+.2f} points of top-1 on {self.on_these}"
        if n < MIN_SEEDS:
            return f"{said}; {too_few(n)}"
        if not self.claims:
            return f"{said} in each of {n} seeds; without a spread there is no verdict"
        return f"{said}, 95 % interval {self.interval} over {n} seeds"

    def facts(self) -> dict[str, Any]:
        """Its figures, as JSON has them; None where there are none."""
        found, claims = self.found, self.claims
        return {
            "first": self.first,
            "second": self.second,
            "seeds": found.n,
            "images": self.images,
            "difference": found.mean,
            "low": found.low if claims else None,
            "high": found.high if claims else None,
            "low_other_images": self.wider[0] if self.wider else None,
            "high_other_images": self.wider[1] if self.wider else None,
            "p_holm": self.p if claims else None,
            "detectable": found.detectable if claims else None,
            "verdict": self.verdict,
        }


def too_few(seeds: int) -> str:
    shown = "one seed shows" if seeds == 1 else f"{seeds} seeds show"
    return f"{shown} too little to claim a difference"


def _in_text(low: float, high: float) -> str:
    return f"{low:+.2f} to {high:+.2f}"


def contrast(
    first: str, second: str, ours: Scores, theirs: Scores, images: int | None = None
) -> Contrast | None:
    """Two arms, p for them alone; None where no seed has both."""
    seeds = sorted(ours.top1.keys() & theirs.top1.keys())  # both share start, order and images
    if not seeds:
        return None
    found, wider = paired([ours.top1[s] for s in seeds], [theirs.top1[s] for s in seeds]), None
    if found.claims and all(s in one.right for s in seeds for one in (ours, theirs)):
        wider = crossed(*([one.right[s] for s in seeds] for one in (ours, theirs)))
    return Contrast(first, second, found, found.p, images, wider)


def corrected(found: Sequence[Contrast]) -> list[Contrast]:
    """With p corrected for their number; what claims nothing is no comparison."""
    values = iter(holm([one.p for one in found if one.claims]))
    return [replace(one, p=next(values)) if one.claims else one for one in found]


def contrasts(arms: Mapping[str, Scores], images: int | None = None) -> list[Contrast]:
    """The first arm beside each of the others; those that share no seed with it are left out."""
    (first, ours), *others = arms.items()
    made = (contrast(first, second, ours, theirs, images) for second, theirs in others)
    return corrected([one for one in made if one])


def crossed(first: Sequence[Array], second: Sequence[Array]) -> tuple[float, float] | None:
    """95 % interval of the difference in percent for other seeds *and* other images like these.

    The answers of S seeds on N images are a table of two random factors; its variance components (Cornfield
    and Tukey 1956) give the variance of the mean, Satterthwaite (1946) its degrees of freedom:

        var = (MS_seeds + MS_images − MS_rest) / (S N)

    A bootstrap over both (Owen 2007) counts the rest three times, so it is too wide where that is most, and
    it is too narrow where few seeds differ; ``benchmarks/verdict.py`` counts how often each is right.

    Args:
        first, second: ``[N]`` per seed, whether each image is named rightly.

    Returns:
        None where the answers do not fit each other, or never differ.
    """
    from scipy.stats import t

    if len({len(one) for one in (*first, *second)}) != 1:
        return None
    table = 100 * (np.asarray(first, dtype=float) - np.asarray(second, dtype=float))  # [S, N]
    seeds, images = table.shape
    if seeds < 2 or images < 2:
        return None
    mean, rows, columns = table.mean(), table.mean(1), table.mean(0)
    rest = table - rows[:, None] - columns + mean
    squares = np.array(
        [
            images * rows.var(ddof=1),
            seeds * columns.var(ddof=1),
            np.square(rest).sum() / ((seeds - 1) * (images - 1)),
        ]
    ) / table.size  # fmt: skip
    degrees = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    variance = max(squares[0] + squares[1] - squares[2], squares[0])
    if variance <= 0:
        return None
    # A component that is subtracted may leave no freedom at all; a sum has that of its poorest part.
    freedom = max(variance**2 / (squares**2 / degrees).sum(), seeds - 1)
    # Never narrower than over seeds alone, whose fewer degrees of freedom may outweigh what images add.
    parts = ((freedom, variance), (seeds - 1, squares[0]))
    reach = max(float(t.ppf((1 + LEVEL) / 2, df)) * math.sqrt(part) for df, part in parts)
    return float(mean) - reach, float(mean) + reach
