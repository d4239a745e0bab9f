"""What is told and drawn of a sweep, from figures made by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from vitkd_cli.evaluation.contrasts import Scores, contrast, corrected
from vitkd_cli.recipe import Recipe
from vitkd_cli.report.page import write_report
from vitkd_cli.report.sweeps import sweep_pictures, sweep_table
from vitkd_cli.sweeps import Outcome, Sweep
from vitkd_cli.sweeps.outcome import FINISHED
from vitkd_cli.sweeps.points import axes_of, points_of
from vitkd_cli.training import Result, Run


def swept(folder, *vary, gains=lambda point: 0.0, seeds=3, **values):
    """A sweep whose points are better than the default by so much; each seed has its own level and noise."""
    recipe = Recipe(seeds=seeds, **values)
    axes = axes_of(vary, recipe, False)
    points = points_of(recipe, axes, None, 0)

    def outcome(number, point):
        gain = 0 if point.default else gains(point)
        tops = [70 + 3 * s + gain + 0.2 * ((number * 7 + s * 5) % 3) for s in range(seeds)]
        own = tuple(Result("distilled", s, "", "m", 1, top1=top, images=500) for s, top in enumerate(tops))
        alone = tuple(replace(one, arm="alone", top1=(one.top1 or 0) - 9) for one in own)
        return Outcome(point, own, FINISHED, Run(folder, recipe, (*own, *alone), None))

    found = {point.name: outcome(*numbered) for numbered in enumerate(points) for point in [numbered[1]]}
    scores = {name: Scores(one.top1, {}) for name, one in found.items()}
    default = points[0].name
    made = (
        contrast(name, default, own, scores[default], 500) for name, own in scores.items() if name != default
    )
    for one in corrected([one for one in made if one]):
        found[one.first] = replace(found[one.first], against=one)
    order = sorted(found.values(), key=lambda one: -(one.mean or 0))
    return Sweep(folder, axes, tuple(order))


@pytest.mark.parametrize(
    ("gain", "seeds", "said"),
    [
        (5.0, 5, "95 % interval"),
        (5.0, 5, ": BETTER (p = "),
        (5.0, 5, "corrected for 2 points). It was selected on the images that it is scored on"),
        (0.1, 5, ": NO DIFFERENCE SHOWN (p = "),
        (-5.0, 5, "no point has a higher mean than the default"),
        (5.0, 2, "2 seeds show too little to claim a difference: --seeds 5"),
        (5.0, 1, "one seed shows too little"),
    ],
)
def test_the_sentence_says_what_is_beyond_chance(gain, seeds, said, tmp_path):
    found = swept(tmp_path, "lr=1e-3,2e-3", gains=lambda point: gain, seeds=seeds)
    assert said in found.sentence()


def test_the_table_has_a_row_for_each_point_best_first(tmp_path):
    found = swept(tmp_path, "lr=1e-3,2e-3", gains=lambda point: 1e3 * point.values["lr"], seeds=5)
    rows = sweep_table(found).rows
    assert [row[0] for row in rows] == ["0.002", "0.001", "unset"]
    assert [row[3] for row in rows][2] == "default" and rows[0][6] == "BETTER"
    assert re.fullmatch(r"7\d\.\d\d ± \d\.\d\d", rows[0][1])
    lost = replace(found.outcomes[0], results=(), status="failed: the disk is full", against=None)
    table = sweep_table(replace(found, outcomes=(*found.outcomes[1:], lost)))
    assert table.titles[-1] == "status" and table.rows[-1][-1] == "failed: the disk is full"
    assert replace(found, outcomes=(*found.outcomes[1:], lost)).failed == {"lr=0.002": "the disk is full"}


def words(found):
    png, svg = sweep_pictures(found)
    assert png.stat().st_size > 10_000
    first = svg.read_text()
    sweep_pictures(found)
    assert svg.read_text() == first  # no date, no chance
    return re.findall(r">([^<>]+)</text>", first)


def test_one_field_is_a_curve_with_the_baseline(tmp_path):
    found = swept(tmp_path, "w=0.01,0.1,1,10", gains=lambda p: float(p.values["w"]), loss="labels + {w}*kd")
    said = words(found)
    assert {"w", "top-1 on the validation split (%)", "without a teacher"} <= set(said)
    assert "a point (mean of 3 seeds, 95 % interval)" in said and any("default" in word for word in said)
    svg = (tmp_path / "sweep.svg").read_text()
    assert (
        "matplotlib.axis_1" in svg and "10" in svg and "0.1" not in said
    )  # powers of ten: it is logarithmic


def test_two_fields_are_a_heat_map_with_its_numbers(tmp_path):
    vary = ("a=1e-5,3e-5", "b=1e-6,3e-6")
    found = swept(tmp_path, *vary, gains=lambda p: 2.0, loss="labels + vitkd(alpha={a}, beta={b})")
    said = words(found)
    assert {"a", "b", "1e-5", "3e-5", "1e-6", "3e-6", "framed: the default"} <= set(said)
    assert {f"{one.mean:.2f}" for one in found.outcomes} <= set(said)


def test_more_fields_have_a_panel_each(tmp_path):
    found = swept(tmp_path, "lr=1e-3,2e-3", "weight_decay=0,0.1", "sched=cosine,step", gains=lambda p: 1.0)
    assert {"lr", "weight_decay", "sched", "cosine", "step", "the default"} <= set(words(found))


@pytest.mark.parametrize("markdown", [False, True])
def test_a_page_begins_with_the_sweep_and_names_no_folder_above_it(tmp_path, monkeypatch, markdown):
    folder = tmp_path / "customer" / "swept"
    found = swept(folder, "lr=" + ",".join(f"{n}e-4" for n in range(1, 40)), gains=lambda p: 2.0, seeds=5)
    for name in ("a", "b"):
        place = folder / "points" / name
        place.mkdir(parents=True)
        (place / "recipe.toml").write_text(Recipe(loss="labels", teacher=None).to_toml())
    (folder / "sweep.toml").touch()
    asked = []
    monkeypatch.setattr("vitkd_cli.report.swept.read_sweep", lambda folder: asked.append(folder) or found)
    monkeypatch.chdir(tmp_path)
    text = write_report("customer/swept", output=None if markdown else "page.html", markdown=markdown).text
    assert asked == [folder] and "customer" not in text and "swept/points/" in text
    assert text.index("best: lr=") < text.index("0.0039") < text.index("No student is trained yet")
    if not markdown:
        rows = re.search(r'<table class="sweep">.*?</table>', text, re.S)[0].count("<tr>")
        assert rows == 1 + len(found.outcomes)  # a page has room for all
        assert "top-1 on the validation split (%)</text>" in text and not list(folder.glob("sweep.svg"))
