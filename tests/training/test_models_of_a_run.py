"""Which weights a run's teacher and student have, and where they are found again."""

from __future__ import annotations

import json

import pytest

from vitkd_cli import Recipe, UserError, distill
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import compose
from vitkd_cli.vit.names import resolve


def run(recipe, **options):
    return distill(recipe, reporter=Reporter(silent=True), **options)


@pytest.fixture(scope="module")
def tuned(tiny, tmp_path_factory):
    """A finished run whose random teacher was fine-tuned first."""
    folder = tmp_path_factory.mktemp("tuned") / "run"
    run(Recipe(**{**tiny, "loss": "labels + kd", "steps": 1, "finetune_teacher": 1}, output=str(folder)))
    return folder


def test_a_folder_of_weights_is_never_emptied(tuned, tmp_path, cli):
    code, out, err = cli(
        *("distill", "--recipe", str(tuned), "--teacher", str(tuned / "teacher"), "--finetune-teacher", "0"),
        *("--output", str(tmp_path / "again")),
    )
    assert code == 0 and "random" not in out + err, err
    first, again = (
        json.loads((folder / "run.json").read_text())["teacher"] for folder in (tuned, tmp_path / "again")
    )
    assert (first["top1"], first["loss"]) == (again["top1"], again["loss"])


@pytest.mark.parametrize(
    ("flags", "kept"),
    [({"teacher": "deit3_small"}, None), ({"teacher": "vit_tiny"}, "a.pth"), ({"epochs": 3}, "a.pth")],
)
def test_weights_named_for_one_model_do_not_follow_to_another(flags, kept):
    file = {
        "teacher": "vit_tiny",
        "teacher_checkpoint": "a.pth",
        "student": "s",
        "initial_checkpoint": "b.pth",
    }
    recipe, origins = compose(("recipe", file), ("", flags))
    assert (recipe.teacher_checkpoint, recipe.initial_checkpoint) == (kept, "b.pth")
    assert origins["teacher_checkpoint"] == ("recipe" if kept else "default")


def test_a_run_that_was_moved_with_its_teacher_finds_it(tuned, tiny, tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "runs").mkdir(parents=True)
    (tuned / "teacher" / "student").rename(project / "guide")
    monkeypatch.chdir(project)
    try:
        recipe = Recipe(**{**tiny, "loss": "labels + kd", "steps": 1, "teacher": "local-dir:guide"})
        recipe = recipe.but(teacher_kwargs=None, output="runs/x")
        run(recipe)
        stored = Recipe.from_toml(project / "runs" / "x" / "recipe.toml")
        assert stored.teacher == f"local-dir:{project / 'guide'}"
        monkeypatch.chdir(tmp_path)
        project.rename(tmp_path / "moved")
        for name in ("run.json", "result.json"):
            (tmp_path / "moved" / "runs" / "x" / name).unlink()
        seen = []
        run(None, resume="moved/runs/x", dry_run=True, show_plan=seen.append)
        assert seen[0].teacher.spec.name == str(tmp_path / "moved" / "guide")
    finally:
        (next(tmp_path.glob("*/guide"))).rename(tuned / "teacher" / "student")
    assert resolve(str(tuned / "teacher")).why == "run folder"


def test_a_weighted_sum_beyond_float32_is_refused_at_the_rehearsal(tiny, tmp_path):
    with pytest.raises(UserError, match=r"the weighted sum of labels \d.* is not finite") as refused:
        run(Recipe(**{**tiny, "loss": "1e308*labels"}, output=str(tmp_path / "run")))
    assert refused.value.exit_code == 2 and not (tmp_path / "run").exists()


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text("epochs = 7\n", encoding="utf-8-sig")
    assert Recipe.from_toml(tmp_path / "recipe.toml").epochs == 7
