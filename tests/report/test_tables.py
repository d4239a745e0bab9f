"""What is said of two arms."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitkd_cli.recipe import Recipe
from vitkd_cli.report import closing, plan_tables, verdict
from vitkd_cli.training import Reporter, Result, Run, distill


def compared(gains, images=500):
    """The sentence about arms that differ by these gains, seed by seed; each seed has its own level."""
    results = [
        Result(arm, seed, "", "m", 1, top1=70 + 3 * seed + gain, images=images)
        for seed, gain in enumerate(gains)
        for arm, gain in (("distilled", gain), ("alone", 0.0))
    ]
    return verdict(Run(Path(), Recipe(), tuple(results), None))


@pytest.mark.parametrize(
    ("arms", "loss", "teacher", "said"),
    [
        ("distilled", "labels + kd", 80, "vitkd distill --resume 'a run' --baseline --seeds 5"),
        ("distilled", "labels + kd", 60, "note: the teacher (top-1 60.00) is no better than the student"),
        ("distilled", "kd", 80, None),  # nothing is left without a teacher
        ("distilled alone", "labels + kd", 80, "vitkd distill --resume 'a run' --seeds 5"),
        ("student", "labels", None, None),
    ],
)
def test_the_last_line_names_the_next_step(arms, loss, teacher, said):
    results = tuple(Result(arm, 0, "", "m", 1, top1=70.0) for arm in arms.split())
    taught = None if teacher is None else Result("teacher", 0, "", "t", 1, top1=float(teacher))
    words = "\n".join(map(str, closing(Run(Path("a run"), Recipe(loss=loss), results, taught))[1:]))
    assert (said in words) if said else ("vitkd distill" not in words and "note" not in words)


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([2.0], "one seed shows too little to claim a difference"),
        ([5.0, 5.1], "2 seeds show too little to claim a difference"),
        ([1.0, 1.0, 1.0], "+1.00 points of top-1 on these 500 images in each of 3 seeds; without a spread"),
        ([1.0, -1.0, 2.0], "over 3 seeds: NO DIFFERENCE SHOWN"),
        ([1.0, 1.2, 1.4, 1.1, 0.9], "over 5 seeds: BETTER"),
        ([-1.0, -1.2, -1.4, -1.1, -0.9], "over 5 seeds: WORSE"),
    ],
)
def test_a_verdict_pairs_the_arms_by_seed_and_names_the_images(gains, said):
    sentence = compared(gains)
    assert said in sentence and "on these 500 images" in sentence
    assert ("in four cases of five" in sentence) is ("95 % interval" in sentence)


def test_only_seeds_that_both_arms_have_are_compared():
    run = Run(
        Path(),
        Recipe(),
        tuple(
            Result(arm, seed, "", "m", 1, top1=50.0 + seed)
            for arm, seeds in (("distilled", (1, 2, 3)), ("alone", (3, 2)))
            for seed in seeds
        ),
        None,
    )
    assert "+0.00 points" in verdict(run)
    assert "2 seeds show too little" in verdict(run) and verdict(run).endswith("--resume . --seeds 5")


@pytest.mark.parametrize(
    ("scale", "peak", "rule"),
    [("linear", "0.000125", "(0.0005 × 128 / 512)"), ("sqrt", "0.00025", "(0.0005 × √(128 / 512))")],
)
def test_the_learning_rate_is_shown_with_the_rule_that_gave_it(tiny, scale, peak, rule):
    values = {**tiny, "shots": None, "batch_size": 128, "loss": "labels", "teacher": None}
    plans = []
    recipe = Recipe(**values, lr_base_scale=scale)
    distill(recipe, dry_run=True, reporter=Reporter(silent=True), show_plan=plans.append)
    line = next(line for line in plan_tables(plans[0])[-1].splitlines() if line.startswith("lr "))
    assert f"{peak} peak" in line and line.endswith(rule)
