"""How often a verdict is wrong: the tables of docs/evaluation.md, printed and written.

    python benchmarks/verdict.py

Simulated experiments of which the truth is known, through the functions that print the verdicts.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from test_docs import with_table

from vitkd_cli.evaluation.statistics import calibration, paired, share_interval

PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
EXPERIMENTS = 2000
RANDOM = np.random.default_rng(0)


def claims(seeds: int, gain: float) -> float:
    """Percent of experiments that claim a difference; a seed's accuracy has a spread of 1 in each arm."""
    first, second = RANDOM.standard_normal((2, EXPERIMENTS, seeds))
    return 100 * np.mean([bool(paired(*both).verdict) for both in zip(first + gain, second, strict=True)])


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
    for _ in range(EXPERIMENTS // 2):
        sure = RANDOM.beta(4, 1, images)
        one = calibration(np.minimum(1, sure + over), RANDOM.random(images) < sure)
        found.append(one.ece > one.by_chance)
    return 100 * np.mean(found)


def tables() -> str:
    lines = [
        "| seeds | claims a difference where there is none | a rule of gain > sd + sd would | "
        "finds a gain of one sd | of two |",
        "|---|---|---|---|---|",
    ]
    for seeds in (2, 3, 5, 10):
        figures = (claims(seeds, 0), spreads_apart(seeds), claims(seeds, 1), claims(seeds, 2))
        lines.append(f"| {seeds} | {' | '.join(f'{figure:.1f} %' for figure in figures)} |")
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
