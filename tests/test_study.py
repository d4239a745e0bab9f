"""The study's plan and page; its students are trained by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

from study_parts import page, results
from study_parts.glyphs import CLASSES, TRAIN, VALIDATION, drawn
from study_parts.plan import ARMS, DATA, TASKS, TEACHERS, student_recipe
from study_parts.tables import GUIDELINES, TABLES

from vitkd_cli.training.arms import written_arms


def test_every_arm_can_be_read_and_every_line_of_a_table_is_an_arm():
    recipe = student_recipe(DATA["digits-10"], "digits", 1, 1600).but(teacher="t", loss="labels")
    against = tuple(f"{arm.loss}; name={name}" for name, arm in ARMS.items() if arm.teacher == "wide")
    names = {arm.name for arm in written_arms(recipe.but(against=against[1:]))}
    assert names == {"student", *(n for n, arm in ARMS.items() if arm.teacher == "wide")} - {"alone"}
    needed = {data.teacher_of(arm) for data in DATA.values() for arm in data.arms}
    assert needed == TEACHERS.keys()
    rows = {row.arm for rows in TABLES.values() for row in rows}
    rows |= {arm for _, pairs in GUIDELINES.values() for pair in pairs for arm in pair}
    assert rows <= {*ARMS, *TASKS}
    assert {*ARMS, *TASKS} - {"alone"} <= rows


@pytest.mark.parametrize(("data", "batches"), [("digits-10", 4), ("glyphs-10", 5), ("digits-all", 51)])
def test_every_student_has_the_updates_that_are_told(data, batches):
    recipe = student_recipe(DATA[data], "x", 1, DATA[data].updates)
    assert recipe.epochs * batches == pytest.approx(DATA[data].updates, rel=0.02)


def test_fonts_of_training_and_validation_are_of_different_families():
    families = [{name.partition("-")[0].rstrip("BolIta") for name in names} for names in (TRAIN, VALIDATION)]
    assert not families[0] & families[1] and len(set(CLASSES)) == 47


def test_a_letter_is_drawn_the_same_each_time():
    import random

    import matplotlib

    file = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    font = ImageFont.truetype(str(file), 62)
    one, same, other = (np.asarray(drawn("a", font, random.Random(seed))) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any() and one.shape == (32, 32) and one.std() > 10


def test_the_page_says_what_the_cells_hold(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    chance = np.random.default_rng(0)

    def cell(arm, seed, top1, updates=1600):
        right = chance.random(500) < top1 / 100
        bits = np.packbits(right).tobytes().hex()
        return results.Cell("digits-10", updates, arm, seed, top1, 1.0, None, bits, 500, {"labels": 0.75})

    gains = {"alone": 0, "generate last": 5, "mimic last": 1, "mimic 0 1": 0, "mimic 0 1 mha": 3, "kd": 4}
    cells = [
        cell(arm, seed, 80 + gain + chance.normal(0, 0.2))
        for arm, gain in gains.items()
        for seed in (1, 2, 3, 4, 5)
    ]
    cells += [cell("alone", seed, 83 + chance.normal(0, 0.2), 3200) for seed in (1, 2, 3, 4, 5)]
    store = tmp_path / "cells.jsonl"
    results.add(cells, store)
    results.add(cells, store)  # once is enough
    assert len(store.read_text().splitlines()) == len(cells)
    assert results.known(store) == {one.key: one for one in cells}
    monkeypatch.setattr(page, "known", lambda: results.known(store))
    monkeypatch.setattr(page, "DOCS", tmp_path)
    page.write()
    text = (tmp_path / "study.md").read_text()
    assert "**G1 (the deep layer: generation rather than mimicking): HOLDS HERE.**" in text
    assert "rather than MHA-out): DOES NOT HOLD HERE.**" in text and "25 %" in text
    assert "and more than generation): NOT SHOWN.**" in text  # of its two pairs, one is not trained
    equal_time = text[text.index("### At equal time") :]
    assert "An update of these arms costs" in equal_time and "− alone for 3,200 updates" in equal_time
    lines = {line.split("|")[1].strip(): line for line in equal_time.splitlines() if line.startswith("| ")}
    assert "WORSE" in lines["mimic last"] and "BETTER" in lines["kd"]
    assert (tmp_path / "images" / "study-forest-digits-10.png").stat().st_size > 1000
