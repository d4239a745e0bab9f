"""How often a verdict is wrong: the tables of docs/evaluation.md, printed and written.

    python benchmarks/verdict.py

Simulated experiments of which the truth is known, through the functions that print the verdicts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from scipy.stats import nct, norm, t
from test_docs import with_table

from vitkd_cli.evaluation.contrasts import BETTER, WORSE, Scores, contrasts, crossed
from vitkd_cli.evaluation.statistics import calibration, paired, share_interval

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
EXPERIMENTS, DRAWS, IMAGES, SEEDS = 4000, 1000, 500, (3, 5, 10)
RANDOM = np.random.default_rng(0)


def claims(seeds: int, gain: float, others: int = 1) -> float:
    """Percent of experiments that claim any difference between a first arm and others.

    A seed's accuracy has a spread of 1 in each arm; the first arm is better by ``gain``.
    """
    claimed = 0
    for _ in range(EXPERIMENTS):
        drawn = RANDOM.standard_normal((1 + others, seeds))
        drawn[0] += gain
        arms = {str(arm): Scores(dict(enumerate(top1)), {}) for arm, top1 in enumerate(drawn)}
        claimed += any(found.verdict in (BETTER, WORSE) for found in contrasts(arms))
    return 100 * claimed / EXPERIMENTS


def power(seeds: int, gain: float) -> float:
    """Percent of experiments in which a paired t test finds a gain, by the noncentral t distribution."""
    shift, tail = gain * np.sqrt(seeds / 2), t.ppf(0.975, seeds - 1)  # a difference has a variance of 2
    return 100 * float(nct.sf(tail, seeds - 1, shift) + nct.cdf(-tail, seeds - 1, shift))


def answers(seeds: int, of_seed: float, of_image: float) -> tuple[list[np.ndarray], float, float]:
    """What two arms say of images, and their true difference: on these images, and on all like them.

    An arm is right with probability Φ(0.5 + difficulty of the image + this arm's own on it + the seed's),
    the last three normal with a spread of 1, ``of_image`` and ``of_seed``; the first arm has 0.3 more.
    """
    difficulty = RANDOM.standard_normal(IMAGES)
    right, here, everywhere = [], [], []
    for mean in (0.8, 0.5):
        image = mean + difficulty + of_image * RANDOM.standard_normal(IMAGES)
        right.append(
            RANDOM.random((seeds, IMAGES)) < norm.cdf(image + of_seed * RANDOM.standard_normal((seeds, 1)))
        )
        # A normal within Φ widens its slope: E Φ(x + s Z) = Φ(x / √(1 + s²)).
        here.append(norm.cdf(image / np.sqrt(1 + of_seed**2)).mean())
        everywhere.append(norm.cdf(mean / np.sqrt(2 + of_seed**2 + of_image**2)))
    return right, 100 * (here[0] - here[1]), 100 * (everywhere[0] - everywhere[1])


def intervals(seeds: int, of_seed: float, of_image: float) -> list[float]:
    """Percent of experiments whose interval holds the true difference.

    Student's t over seeds, on these images; the same on others like these; ``crossed`` on others; and the
    percentiles of a bootstrap over seeds and images (Owen 2007).
    """
    draws = [RANDOM.multinomial(n, np.ones(n) / n, DRAWS) / n for n in (seeds, IMAGES)]
    held = np.zeros(4)
    for _ in range(EXPERIMENTS):
        (first, second), here, everywhere = answers(seeds, of_seed, of_image)
        found = paired(100 * first.mean(1), 100 * second.mean(1))
        table = 100 * (first.astype(float) - second)
        drawn = ((draws[0] @ table) * draws[1]).sum(1)
        of_these = (found.low, found.high)
        both = crossed(first, second) if found.sd > 0 else (-np.inf, np.inf)  # as of_these is
        pairs = (of_these, of_these, both, np.percentile(drawn, (2.5, 97.5)))
        truths = (here, everywhere, everywhere, everywhere)
        held += [low <= truth <= high for (low, high), truth in zip(pairs, truths, strict=True)]
    return list(100 * held / EXPERIMENTS)


def spreads_apart(seeds: int) -> float:
    """The same, where a claim is a difference beyond both standard deviations together."""
    first, second = RANDOM.standard_normal((2, EXPERIMENTS, seeds))
    spread = first.std(1, ddof=1) + second.std(1, ddof=1)
    return 100 * np.mean(np.abs(first.mean(1) - second.mean(1)) > spread)


def coverage(share: float, images: int) -> float:
    """Percent of experiments whose interval of top-1 holds the true share."""
    known = {hits: share_interval(hits, images) for hits in range(images + 1)}
    drawn = RANDOM.binomial(images, share, EXPERIMENTS)
    return 100 * np.mean([known[hits][0] <= 100 * share <= known[hits][1] for hits in drawn])


def flagged(images: int, over: float = 0.0) -> float:
    """Percent of models whose ECE is above what they would show were they calibrated.

    Args:
        over: how much surer the model is than it is right.
    """
    found = []
    for _ in range(EXPERIMENTS // 4):
        sure = RANDOM.beta(4, 1, images)
        one = calibration(np.minimum(1, sure + over), RANDOM.random(images) < sure)
        found.append(one.ece > one.by_chance)
    return 100 * np.mean(found)


def tables() -> str:
    lines = [
        "| seeds | claims a difference where there is none: of 1 comparison | of 3 | of 8 | "
        "a rule of gain > sd + sd would, of 1 |",
        "|---|---|---|---|---|",
    ]

    def row(*cells: str | float) -> str:
        shown = (cell if isinstance(cell, str) else f"{cell:.1f} %" for cell in cells)
        return f"| {' | '.join(shown)} |"

    for seeds in (2, *SEEDS):
        wrong = [claims(seeds, 0, others) for others in (1, 3, 8)]
        lines.append(row(f"{seeds}", *wrong, spreads_apart(seeds)))
    lines += [
        "",
        "| seeds | finds a gain of one sd | a paired t test would | of two | a paired t test would |",
        "|---|---|---|---|---|",
    ]
    for seeds in SEEDS:
        lines.append(row(f"{seeds}", *(act(seeds, gain) for gain in (1, 2) for act in (claims, power))))
    lines += [
        "",
        "| what differs most | seeds | over seeds, on these images | over seeds, on others | "
        "over seeds and images, on others | bootstrap over both, on others |",
        "|---|---|---|---|---|---|",
    ]
    for words, spreads in (("seeds", (0.2, 0.3)), ("images", (0.02, 1.0)), ("neither", (0.02, 0.1))):
        lines += [row(words, f"{seeds}", *intervals(seeds, *spreads)) for seeds in SEEDS]
    lines += ["", "| images | interval of top-1 holds 95 % | holds 99 % |", "|---|---|---|"]
    for images in (20, 50, 200):
        figures = (coverage(share, images) for share in (0.95, 0.99))
        lines.append(f"| {images} | {' | '.join(f'{figure:.1f} %' for figure in figures)} |")
    lines += [
        "",
        "| images | calibrated models beyond chance | models too sure by 5 points |",
        "|---|---|---|",
    ]
    for images in (50, 200, 1000):
        lines.append(f"| {images:,} | {flagged(images):.1f} % | {flagged(images, 0.05):.1f} % |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(written := tables())
    PAGE.write_text(with_table(PAGE.read_text(), "verdicts", written))
