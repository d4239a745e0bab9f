"""What is said of two arms."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from vitkd_cli.evaluation.cache import write_rows
from vitkd_cli.evaluation.metrics import Metrics
from vitkd_cli.recipe import Recipe
from vitkd_cli.report.curves import curves
from vitkd_cli.report.tables import closing, plan_tables, verdict
from vitkd_cli.terminal import Terminal
from vitkd_cli.training import Reporter, Result, Run, distill


def compared(gains, images=500):
    """The sentence about arms that differ by these gains, seed by seed; each seed has its own level."""
    results = [
        Result(arm, seed, "", "m", 1, top1=70 + 3 * seed + gain, images=images)
        for seed, gain in enumerate(gains)
        for arm, gain in (("distilled", gain), ("alone", 0.0))
    ]
    return verdict(Run(Path(), Recipe(), tuple(results), None))


def test_waiting_for_images_is_told_with_its_cure(tmp_path):
    def told(share, **settings):
        results = (Result("student", 0, "", "m", 1, top1=70.0, data_wait=share),)
        return "\n".join(
            map(str, closing(Run(Path("a run"), Recipe(loss="labels", **settings), results, None)))
        )

    slow = {"input_backend": "pillow", "data": str(tmp_path)}
    cured = "waited for images 42% of the time: --input-backend torchvision, or --cache-images ram"
    assert cured in told(0.42, **slow)
    for changes in ({"input_backend": "torchvision", "cache_images": "ram"}, {"data": "hfids/x"}):
        assert told(0.42, **{**slow, **changes}).endswith("waited for images 42% of the time")
    assert told(0.42, **{**slow, "data": "hfds/x"}).endswith(": --input-backend torchvision")
    assert "more --workers" in told(0.42, workers=2) and "waited" not in told(0.05) + told(None)


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
    assert verdict(run).endswith("2 seeds show too little to claim a difference")
    assert closing(run)[-1] == "with more seeds: vitkd distill --resume . --seeds 5"


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


# Several arms -------------------------------------------------------------------------------------------

LONG = "labels + 3e-5*mimic(blocks=(0, 1)) + 3e-6*generate(block=-1); lr=1e-3; epochs=30"


def of_arms(folder, gains, seeds=5, images=200):
    """A run whose arms are that many images better than the first, give or take one, with their answers."""
    results = []
    for seed in range(seeds):
        for number, (arm, gain) in enumerate(gains.items()):
            hits = 100 + 5 * seed + gain + (seed * (number + 1) + number) % 5
            place = folder / f"{number}-{seed}"
            right = torch.arange(images) < hits
            rows = Metrics(torch.zeros(images).long(), (~right).long()[:, None]).rows
            write_rows(place / "answers.safetensors", rows)
            history = tuple({"epoch": e, "top1": 100 * hits / images - 10 + 5 * e} for e in (1, 2))
            figures = {
                "top1": 100 * hits / images,
                "top5": 99.0,
                "loss": 1.0,
                "images": images,
                "history": history,
            }
            results.append(Result(arm, seed, str(place), "m", 1000, **figures))
    teacher = Result("teacher", 0, "", "t", 1, top1=90.0, top5=100.0, images=images)
    return Run(folder, Recipe(seeds=seeds), tuple(results), teacher)


def printed(run, width):
    terminal = Terminal(width=width, force_terminal=True, file=io.StringIO(), color_system=None)
    for renderable in closing(run):
        terminal.say(renderable) if isinstance(renderable, str) else terminal.print(renderable)
    return terminal.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_comparisons_can_be_read(tmp_path, width):
    run = of_arms(tmp_path, {"distilled": 20, "alone": 0, "labels + kd": 20, LONG: 30})
    said = printed(run, width)
    assert max(map(len, said.splitlines())) <= width
    for one, word in zip(run.contrasts, ("BETTER", "NO DIFFERENCE SHOWN", "WORSE"), strict=True):
        assert one.verdict == word
        p = "< 0.001" if one.p < 0.001 else f"{one.p:.3f}"
        cells = [f"{one.found.mean:+.2f}", f"{one.found.low:+.2f} to {one.found.high:+.2f}", p, word]
        line = next(line for line in said.splitlines() if cells[1] in line)
        assert line.index(cells[0]) < line.index(cells[1]) < line.index(p) < line.index(word)
        following = said[said.index(line) :]
        assert "on other images" in following
        assert f"{one.wider[0]:+.2f} to {one.wider[1]:+.2f}" in following
    assert "differences seed by seed on these 200 images" in said
    assert "± 95 % over 5 seeds" in said
    words = verdict(run)
    assert words.startswith(
        f"distilled: BETTER than alone; WORSE than {LONG}; NO DIFFERENCE SHOWN from labels"
    )
    assert "over 5 seeds, p corrected for 3 comparisons" in words and "in four cases of five" in words


def test_two_seeds_of_many_arms_claim_nothing(tmp_path):
    run = of_arms(tmp_path, {"distilled": 20, "alone": 0, "labels + kd": 40}, seeds=2)
    said = printed(run, 80)
    assert "2 seeds show too little to claim a difference" in " ".join(said.split())
    assert "BETTER" not in said and "WORSE" not in said and "SHOWN" not in said and "±" not in said
    assert "means of 2 seeds" in said


def test_an_arm_of_which_nothing_can_be_said_is_named_and_not_counted():
    gains = {"distilled": [1.0, 1.2, 1.4], "alone": [0, 0, 0], "same": [1.0, 1.2, 1.4], "short": [0, 0]}
    results = [
        Result(arm, seed, "", "m", 1, top1=70 + 3 * seed + gain, images=500)
        for arm, all_ in gains.items()
        for seed, gain in enumerate(all_)
    ]
    words = verdict(Run(Path(), Recipe(), tuple(results), None))
    assert words.startswith(
        "distilled: BETTER than alone; nothing can be said of same (no spread), short (2 seeds)"
    )
    assert "over 3 seeds, p corrected for 1 comparison;" in words
    silent = tuple(result for result in results if result.arm != "alone")
    assert verdict(Run(Path(), Recipe(), silent, None)) == (
        "distilled: nothing can be said of same (no spread), short (2 seeds)"
    )


def test_a_single_model_has_the_interval_of_its_images(tmp_path):
    said = printed(of_arms(tmp_path, {"student": 0}, seeds=1), 120)
    assert "50.00 (43.1–56.9)" in said and "90.00 (85.1–93.4)" in said  # Wilson 1927
    assert "on the validation split: (95 %) over images" in said


def test_the_curves_have_a_line_and_an_interval_for_every_arm(tmp_path, monkeypatch):
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *at, **how: (figures.append(self), save(self, *at, **how))
    )
    for seeds in (5, 2):
        curves(of_arms(tmp_path, {"distilled": 20, "a $x_ b": 0, "_hidden": 40}, seeds=seeds))
    for figure, interval in zip(figures, (", 95 % interval", ""), strict=True):
        [axes] = figure.axes
        count = 5 if interval else 2
        assert [text.get_text() for text in axes.get_legend().get_texts()] == [
            f"distilled (mean of {count} seeds{interval})",
            f"a $x_ b (mean of {count} seeds{interval})",
            f" _hidden (mean of {count} seeds{interval})",
            "teacher",
        ]
        heights = [band.get_paths()[0].get_extents().height for band in axes.collections]
        rises = [line.get_ydata()[1] - line.get_ydata()[0] for line in axes.lines[:3]]
        assert rises == pytest.approx([5, 5, 5])
        assert all((height > 5.01) == bool(interval) for height in heights)
    assert (tmp_path / "curves.png").stat().st_size > 10_000
