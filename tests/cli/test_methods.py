"""``vitkd methods``: every word of a formula, with what it needs and costs.

``python tests/cli/test_methods.py --write`` writes the shipped table.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from dataclasses import replace
from typing import Any

import pytest
import timm

from vitkd_cli.inspection import counted
from vitkd_cli.inspection.methods import blank, needs, rows, schedules
from vitkd_cli.objective import MACROS, SCHEDULES, words
from vitkd_cli.options import declared
from vitkd_cli.terms import Term, registered_terms, term
from vitkd_cli.vit.taps import DISTILL_LOGITS, LOGITS, Tap

DEIT3_TO_DEIT = 2 * (192 * 384 + 384), 2 * 2 * 196 * 192 * 384  # mimic: two linear layers on 196 tokens


def walked() -> dict[str, Any]:
    """The table, counted now."""
    found = rows(words(), counted.TEACHER, counted.STUDENT)
    table = {"timm": timm.__version__, "rows": found, "schedules": schedules()}
    return dict(json.loads(json.dumps(table)))


@pytest.mark.skipif(
    counted.shipped_methods()["timm"] != timm.__version__, reason="the table was counted with another timm"
)
def test_the_shipped_table_is_what_is_counted():
    assert counted.shipped_methods() == walked(), "python tests/cli/test_methods.py --write"


def test_the_table_needs_no_torch_and_another_timm_is_told_of(cli, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli("methods", "kd")[0] == 0
    monkeypatch.undo()
    monkeypatch.setattr("vitkd_cli.vit.zoo.installed_timm", lambda: "0.9.0")
    code, out, err = cli("methods", "mimic", "--json")
    assert code == 0 and f"timm 0.9.0 is installed, and the table was counted with {timm.__version__}" in err
    assert json.loads(out) == counted.shipped_methods()["rows"]["mimic"]
    assert "models that came since are not listed" in cli("models", "deit3_small")[2]


def test_words_of_installed_packages_are_in_no_table(monkeypatch):
    point = importlib.metadata.EntryPoint("other", "other.terms", "vitkd.terms")
    monkeypatch.setattr(counted, "entry_points", lambda group: [point])
    assert counted.shipped_methods() is None


def test_the_table_has_every_word_and_schedule(cli):
    code, out, err = cli("methods")
    assert code == 0, err
    rows = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert set(words()) <= set(rows)
    assert "teacher's logits" in rows["kd"] and "labels, teacher's logits" in rows["nkd"]
    assert "3e-5" in rows["mimic"] and "0.15 M parameters, 57.8 MFLOPs" in rows["mimic"]
    assert all(f"{name}(" in out for name in SCHEDULES)


def test_every_word_fits_the_usual_pair(cli):
    _, out, _ = cli("methods", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) == set(words())
    assert [row for row in rows.values() if "problem" in row] == []
    assert (rows["mimic"]["parameters"], rows["mimic"]["flops"]) == DEIT3_TO_DEIT
    parts = [rows["mimic"], rows["generate"]]
    for key in ("parameters", "flops"):
        assert rows["vitkd"][key] == sum(row[key] for row in parts)
    assert {name for name, row in rows.items() if row["formula"]} == set(MACROS)


def test_one_word_shows_equation_options_and_cost(cli):
    code, out, err = cli("methods", "kd")
    assert code == 0, err
    for part in ("L = T² KL( softmax(t / T) ‖ softmax(s / T) )", "arXiv:1503.02531", "kd.py"):
        assert part in out
    for option in declared(registered_terms()["kd"]).values():
        assert option.name in out and option.option.help in out
    assert "both sets of logits are divided by it. Above 0." in out
    _, out, _ = cli("methods", "vitkd")
    assert "3e-5*mimic + 3e-6*generate" in out and "alpha" in out
    for name in ("vitkd", "mimic"):  # an option of the formula, not of the term
        assert re.search(r"^ *balance +none +Share of the student's gradient", cli("methods", name)[1], re.M)


def test_the_cost_is_that_of_the_pair(cli):
    _, out, _ = cli("methods", "mimic", "--json", "--student", "vit_small_patch16_224")
    row = json.loads(out)
    assert (row["parameters"], row["flops"]) == (0, 0)  # equal widths need no layer
    assert row["student"].startswith("vit_small") and row["teacher"].startswith("deit3_small")
    pair = "--teacher", "vit_small_patch16_224.augreg_in21k", "--student", "deit_tiny"
    _, out, _ = cli("methods", "kd", *pair)
    assert "does not fit: kd compares logits" in out and "21843" in out


def test_mistakes_are_named(cli):
    code, _, err = cli("methods", "kdd")
    assert code == 2 and "no term is called 'kdd'" in err and "did you mean kd?" in err
    code, _, err = cli("methods", "--student", "deit_tinyy")
    assert code == 2 and "deit_tiny" in err
    code, _, err = cli("methods", "--plugin", "none.py")
    assert code == 2 and "there is no plugin" in err


@pytest.mark.parametrize(
    ("ours", "theirs", "needed"),
    [
        (replace(LOGITS, view=1), None, ("second view of the images",)),
        (DISTILL_LOGITS, LOGITS, ("teacher's logits", "distilled student")),
        (Tap("attention", 0), Tap("attention", 0), ("attention maps",)),
        (Tap("qkv", 0), Tap("qkv", 0), ("queries, keys and values",)),
        (Tap("prefix", 0), Tap("prefix", 0), ("teacher's features",)),
    ],
)
def test_needs_are_read_off_the_taps(ours, theirs, needed, registry):
    @term("asking")
    class Asking(Term):
        asks_second_view = bool(ours.view)

        def __init__(self, student, teacher):
            super().__init__()
            self.compares = [(ours, theirs)]

    vit = blank("deit_tiny_distilled", "model").spec
    assert needs("asking", vit, vit) == needed


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    counted.ship_methods(walked())
