"""The arms of a run: how they are written, trained, resumed, and told of."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from heard import Heard
from safetensors.torch import load_file

from vitkd_cli import distill
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.cache import read_rows
from vitkd_cli.recipe import Recipe, compose, layers_of
from vitkd_cli.report.tables import plan_tables
from vitkd_cli.training import Reporter
from vitkd_cli.training.arms import written_arms
from vitkd_cli.training.folder import check_folder
from vitkd_cli.training.learner import Learner
from vitkd_cli.training.start import anchored


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "student" / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


# How they are written -----------------------------------------------------------------------------------


def arms(*against: str, **values):
    return written_arms(Recipe(teacher="deit3_small", student="deit_tiny", against=against, **values))


def test_an_arm_is_a_formula_and_settings_in_any_order():
    own, kd, fast, big = arms(
        "labels + kd", "--lr=1e-3; epochs = 30", "scale=0.3,1; teacher=deit3_base; labels + dist; name=big"
    )
    assert (own.name, own.place) == ("distilled", "distilled")
    assert (kd.name, kd.place, str(kd.formula)) == ("labels + kd", "arms/labels+kd", "labels + kd")
    assert fast.changes == {"lr": 1e-3, "epochs": 30} and fast.formula == own.formula
    assert big.name == "big" and big.changes["scale"] == (0.3, 1.0) and big.changes["teacher"] == "deit3_base"
    assert str(big.formula) == "labels + dist"


def test_a_formula_that_reads_no_teacher_may_be_the_run_s_own():
    own, kd = arms("labels + kd", loss="labels")
    assert own.name == "student" and kd.formula.uses_teacher


def test_smoothing_reaches_the_terms_of_an_arm():
    _, arm = arms("labels + kd; smoothing=0.3")
    assert str(arm.formula) == "labels(smoothing=0.3) + kd"


def test_weights_of_one_teacher_do_not_follow_to_another(tmp_path):
    _, other, same_one = arms("teacher=deit3_base", "teacher=deit3_small; lr=1", teacher_checkpoint="a.pth")
    assert other.changes == {"teacher": "deit3_base", "teacher_checkpoint": None}
    assert same_one.changes == {"lr": 1.0}


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (["labels + kdd"], "the arm 'labels \\+ kdd': no term is called 'kdd'"),
        (["labels + kd("], r"the arm 'labels \+ kd\(': .* cannot be read"),
        (["labels + kd; lrr=1"], "it cannot have 'lrr'.*did you mean lr"),
        (["labels; ümlaut=1"], "it cannot have 'ümlaut'"),
        (["lr=fast"], "the arm 'lr=fast': lr must be a number, not 'fast'"),
        (["lr=-1"], "lr must be above 0"),
        (["student=deit_small"], "it cannot have 'student'.*give it to the run"),
        (["shots=3"], "it cannot have 'shots'.*give it to the run"),
        (["seed=3"], "it cannot have 'seed'.*give it to the run"),
        (["labels + kd, lr=1e-3"], 'follow a semicolon.*"labels [+] kd; lr=1e-3"'),
        (["grad_accum_steps=2"], "it cannot have 'grad_accum_steps'.*give it to the run"),
        (["output=x"], "it cannot have 'output'.*give it to the run"),
        (["lr=1; lr=2"], "it has lr twice"),
        (["labels; labels + kd"], "it has loss twice"),
        (["labels; name=a; name=b"], "it has name twice"),
        (["labels; name=alone"], "cannot go by the name 'alone'"),
        (["labels; name=../.."], "cannot go by the name '../..'"),
        (["labels; name="], "cannot go by the name ''"),
        (["labels; name=_"], "cannot go by the name '_'"),
        ([""], "it is empty"),
        ([" ; "], "it is empty"),
        (["labels + vitkd + nkd"], "is the arm 'distilled' once more"),
        (["epochs=300"], "is the arm 'distilled' once more"),
        (["labels + kd", "labels+kd"], "is the arm 'labels \\+ kd' once more"),
        (["labels; name=a", "labels + kd; name=A"], "two arms go by the name 'A'"),
        (["scale=0.9,0.1"], "the arm 'scale=0.9,0.1': scale must be LOW,HIGH"),
        (["warmup_epochs=20; epochs=5"], "warmup_epochs = 20 is beyond the 5 epochs"),
    ],
)
def test_what_no_arm_can_be_is_named(against, said):
    with pytest.raises(UserError) as refused:
        arms(*against)
    text = f"{refused.value.message} / {refused.value.hint}"
    assert re.search(said, text), text
    assert refused.value.hint


def test_the_baseline_once_more_is_named():
    with pytest.raises(UserError, match="is the arm of --baseline once more"):
        arms("labels", baseline=True, loss="labels + kd")


def test_a_place_is_a_name_and_every_other_too():
    """Long ones, other scripts, other systems' separators."""
    long = "labels + 3e-5*mimic(blocks=(0, 1)) + 3e-6*generate(block=-1, mask=0.5) + 0.5*kd(temperature=3)"
    _, one, two, three = arms(long, "labels; name=a/b\\c", "labels + kd; name=größer: 三")
    assert len(one.place) == len("arms/") + 60 and "/" not in one.place.removeprefix("arms/")
    assert re.fullmatch("arms/a_b_c-[0-9a-f]{8}", two.place)
    assert three.place.startswith("arms/größer_三-")
    assert arms(long)[1].place == one.place


def toml(tmp_path, text):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    return compose(*layers_of(path))[0]


def test_a_table_is_an_arm(tmp_path):
    recipe = toml(
        tmp_path,
        'teacher = "t"\nstudent = "s"\nagainst = ["labels"]\n'
        '[[arm]]\nloss = "labels + kd"\nlr = 1e-3\nscale = [0.3, 1.0]\n'
        'teacher-pretrained = false\nname = "a"\n'
        "[[arm]]\nepochs = 5\n",
    )
    assert recipe.against == (
        "labels",
        "labels + kd; lr=0.001; scale=0.3,1.0; teacher-pretrained=false; name=a",
        "epochs=5",
    )
    _, _, table, _ = written_arms(recipe)
    assert table.changes == {"lr": 0.001, "scale": (0.3, 1.0), "teacher_pretrained": False}
    again = tmp_path / "again.toml"
    again.write_text(recipe.to_toml())
    assert Recipe.from_toml(again) == recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[arm]\nloss = "labels"', "arm must be tables"),
        ('arm = "labels"', "arm must be tables"),
        ('arm = ["labels"]', "arm must be tables"),
        ("[[arm]]\nloss = [1, 'a']", "an arm's loss cannot be"),
        ("[[arm]]\nloss = {a = 1}", "an arm's loss cannot be"),
        ("[[arm]]\nname = 'a;b'", "an arm's name cannot be 'a;b'"),
        ("[[arm]]\nlr = 2026-01-01", "an arm's lr cannot be"),
        ("[[arm]]\nlearning = 1", "it cannot have 'learning'"),
        ("[[arm]]\nlr = 'fast'", "lr must be a number, not 'fast'"),
        ("[[arm]]\nloss = 3", "the arm '3': "),
        ("[[arm]]\n", "it is empty"),
        ("against = 'labels + kdd'\n[[arm]]\nlr=1", "no term is called 'kdd'"),
    ],
)
def test_what_no_table_can_be_is_named(tmp_path, text, said):
    with pytest.raises(UserError) as refused:
        written_arms(toml(tmp_path, f"{text}\n"))
    assert said in refused.value.message


# Places -------------------------------------------------------------------------------------------------


def test_a_place_in_an_arm_is_treated_as_any_other(tmp_path, monkeypatch):
    folder = tmp_path / "guide"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    recipe = anchored(Recipe(student="s", teacher="t", against=("labels + kd; teacher=guide; lr=1",)))
    assert recipe.against == (f"labels + kd; teacher={folder}; lr=1",)
    assert anchored(recipe) == recipe
    assert written_arms(recipe)[1].name == "labels + kd; teacher=guide; lr=1"
    public = recipe.public()
    assert public.against == ("labels + kd; teacher=guide; lr=1",)
    assert str(tmp_path) not in public.to_toml()
    with pytest.raises(UserError, match=r"holds what this run reads \(teacher\)"):
        check_folder(tmp_path, True, recipe)
    odd = tmp_path / "a;b"
    odd.mkdir()
    (odd / "guide").mkdir()
    (odd / "guide" / "config.json").write_text("{}")
    monkeypatch.chdir(odd)
    with pytest.raises(UserError, match="holds a semicolon"):
        anchored(Recipe(student="s", teacher="t", against=("teacher=guide",)))


# How they are trained -----------------------------------------------------------------------------------

AGAINST = ("labels", "labels + 3e-5*mimic; lr=1e-3; epochs=2; batch_size=10")
NAMES = ("distilled", *AGAINST)
FOLDER = "labels+3e-5_mimic_lr=1e-3_epochs=2_batch_size=10-d30a19f8"


@pytest.fixture(scope="module")
def recipe(tiny):
    return Recipe(
        **{**tiny, "shots": 4, "epochs": 1, "loss": "labels + kd"},
        recovery_interval=1,
        against=AGAINST,
        seeds=3,
    )


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """A run of three arms and three seeds that nothing interrupted."""
    folder = tmp_path_factory.mktemp("arms") / "run"
    return distill(recipe.but(output=str(folder)), reporter=Heard())


def run(recipe, folder=None, **options):
    heard = Heard()
    asked = recipe.but(output=str(folder)) if recipe else None
    return distill(asked, reporter=heard, **options), "\n".join(heard.lines)


def test_every_arm_is_trained_with_every_seed_in_a_folder_of_its_own(whole):
    assert [(r.seed, r.arm) for r in whole.results] == [(s, name) for s in (42, 43, 44) for name in NAMES]
    assert [str(Path(r.folder).relative_to(whole.folder)) for r in whole.results[:3]] == [
        "distilled-42",
        "arms/labels-42",
        f"arms/{FOLDER}-42",
    ]
    assert [r.updates for r in whole.results[:3]] == [2, 2, 8]
    for result in whole.results:
        assert read_rows(result.answers).shape == (500, 10)
    for seed in range(3):  # one start and one order for all
        first, labels, _ = (
            json.loads((Path(r.folder) / "log.jsonl").read_text().splitlines()[0])
            for r in whole.results[3 * seed : 3 * seed + 3]
        )
        assert first["labels"] == pytest.approx(labels["labels"], rel=1e-6)


def test_run_json_has_intervals_and_comparisons(whole):
    told = json.loads((whole.folder / "run.json").read_text())
    assert [arm["arm"] for arm in told["arms"]] == list(NAMES)
    for arm in told["arms"]:
        scores = [r.top1 for r in whole.arms[arm["arm"]]]
        assert arm["seeds"] == 3 and arm["top1"] == pytest.approx(sum(scores) / 3)
        assert arm["low"] <= arm["top1"] <= arm["high"]
    assert [(c["first"], c["second"], c["seeds"], c["images"]) for c in told["comparisons"]] == [
        ("distilled", name, 3, 500) for name in NAMES[1:]
    ]
    first = json.loads((whole.folder / "distilled-42" / "result.json").read_text())
    assert first["top1_low"] < first["top1"] < first["top1_high"]
    again, said = run(None, resume=whole.folder)
    assert "nothing to do" in said
    assert again.results == whole.results
    assert [found.facts() for found in again.contrasts] == told["comparisons"]


def test_a_student_tells_how_it_was_made_and_no_more(whole):
    config = json.loads((whole.folder / "arms" / f"{FOLDER}-43" / "student" / "config.json").read_text())
    told = config["vitkd"]
    assert told["objective"] == "labels + 3e-5*mimic"
    assert 'loss = "labels + 3e-5*mimic"' in told["recipe"] and "against = []" in told["recipe"]
    assert "seed = 43" in told["recipe"]


class Killed(BaseException):
    """The process is gone."""


def kill() -> None:
    raise Killed


@pytest.mark.slow
def test_a_run_killed_in_an_arm_ends_as_one_that_was_not(recipe, whole, tmp_path, at_step):
    folder = tmp_path / "run"
    at_step(2 + 2 + 3, kill)  # in the third student, after some checkpoints
    with pytest.raises(Killed):
        run(recipe, folder)
    for later in whole.results[4:]:  # the student that was killed and the next are trained; that will do
        shutil.copytree(later.folder, folder / Path(later.folder).relative_to(whole.folder))
    again, said = run(None, resume=folder)
    assert "labels (seed 42) is finished already" in said and "going on after update 2 of 8" in said
    assert all(
        same(Path(o.folder), Path(t.folder)) for o, t in zip(again.results, whole.results, strict=True)
    )
    assert [found.facts() for found in again.contrasts] == [found.facts() for found in whole.contrasts]


def test_a_run_takes_one_more_arm_and_keeps_the_others(whole, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("result.json")}
    more, said = run(None, resume=folder, machine={"against": ("labels", "labels + dist")})
    assert said.count("is finished already") == 9
    assert list(more.arms) == [*NAMES, "labels + dist"]
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert [found.second for found in more.contrasts] == [*NAMES[1:], "labels + dist"]
    assert Recipe.from_toml(folder / "recipe.toml").against == (*AGAINST, "labels + dist")
    assert "nothing to do" in run(None, resume=folder)[1]
    assert "nothing to do" in run(None, resume=folder, machine={"against": ("labels + dist",)})[1]


def test_what_the_data_fits_may_not_be_an_arm_of_its_own(tiny, tmp_path):
    """Else the run could be begun, and not resumed."""
    recipe = Recipe(**{**tiny, "loss": "labels", "batch_size": None, "against": ("batch_size=4",)})
    with pytest.raises(UserError, match="is the arm 'student' once more"):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("loss", "against"), [("labels", "vitkd; name=headless"), ("vitkd; name=x", "labels + kd")]
)
def test_a_head_that_nothing_trains_is_compared_with_none(tiny, tmp_path, loss, against):
    recipe = Recipe(**{**tiny, "loss": loss.partition(";")[0], "against": (against,)}, output=str(tmp_path))
    with pytest.raises(UserError, match=r"trains the student's head.*arms are compared") as refused:
        distill(recipe, dry_run=True, reporter=Reporter(silent=True))
    assert "--num-classes 0" in refused.value.hint


def test_arms_may_have_other_teachers(tiny, tmp_path):
    bigger = tiny["teacher_kwargs"].replace("embed_dim=48", "embed_dim=72")
    recipe = Recipe(
        **{**tiny, "loss": "labels + kd", "steps": 1},
        against=(f"teacher_kwargs={bigger}; name=big", "labels", "finetune_teacher=1; name=tuned"),
    )
    made, said = run(recipe, tmp_path / "run")
    assert [(made.teacher.arm, made.teacher.folder)] == [("teacher", str(made.folder / "teacher"))]
    assert [one.arm for one in made.more_teachers] == ["teacher of big", "teacher of tuned"]
    assert made.more_teachers[0].parameters > made.teacher.parameters
    assert (made.folder / "arms" / "tuned-teacher" / "student" / "model.safetensors").is_file()
    assert "(teacher of big)" in said and "fine-tuning the teacher of tuned" in said
    # Each agrees with its own: the same answers, counted again.
    taught = dict(zip(("distilled", "big", "tuned"), (made.teacher, *made.more_teachers), strict=True))
    for result in made.results:
        if result.arm in taught:
            ours, theirs = (read_rows(one.answers)[:, 1] for one in (result, taught[result.arm]))
            assert result.agreement == pytest.approx(100 * float((ours == theirs).double().mean()))
    again = run(None, resume=made.folder)[0]
    assert again.more_teachers == made.more_teachers


@pytest.mark.slow
def test_an_arm_s_teacher_does_not_depend_on_the_other_arms(tiny, tmp_path):
    """With features alone read it sees the student's grid, whoever else reads its logits."""
    values = {**tiny, "loss": "labels + 3e-5*mimic", "steps": 1}
    values["teacher_kwargs"] = "embed_dim=48,depth=3,num_heads=3,patch_size=32,num_classes=10"  # 224 px
    alone, _ = run(Recipe(**values), tmp_path / "alone")
    plans = []
    both, _ = run(Recipe(**values, against=("labels + kd",)), tmp_path / "both", show_plan=plans.append)
    assert plans[0].teacher.spec.input_size == (128, 128)
    assert same(alone.folder, both.folder / "distilled-42")
    assert both.results[1].agreement is not None


def test_overwrite_replaces_a_run_with_arms(recipe, whole, tmp_path):
    folder = shutil.copytree(whole.folder, tmp_path / "run")
    short = recipe.but(against=("labels",), seeds=1)
    with pytest.raises(UserError, match="is not empty"):
        run(short, folder)
    run(short, folder, overwrite=True)
    assert sorted(path.name for path in folder.glob("arms/*")) == ["labels-42"]


def test_an_arm_s_student_is_scored_on_what_its_run_held_out(tiny, photos, tmp_path, cli):
    values = {**tiny, "data": str(photos), "shots": None, "steps": 1, "seeds": 2, "loss": "labels"}
    made, _ = run(Recipe(**values, against=("lr=1e-2",)), tmp_path / "run")
    last = made.results[-1]
    assert (last.arm, last.seed, last.images) == ("lr=1e-2", 43, 6)
    for place in (last.folder, str(last.student)):
        code, out, err = cli("eval", place, "--workers", "0", "--device", "cpu", "--json")
        assert code == 0, err
        scores = json.loads(out)
        assert (scores["count"], scores["top1"]) == (6, pytest.approx(last.top1))


def test_a_dry_run_shows_every_arm_with_its_settings_and_cost(recipe, tmp_path, cli, flags):
    plans = []
    assert run(recipe, tmp_path / "run", dry_run=True, show_plan=plans.append)[0] is None
    _, _, table, lines = plan_tables(plans[0])
    cells = [list(column.cells) for column in table.columns]
    assert cells[0] == list(NAMES[1:])
    assert cells[1] == ["labels", "labels + 3e-5*mimic"]
    assert cells[2] == ["–", "lr=0.001, epochs=2, batch_size=10"]
    assert cells[3] == ["2", "8"]
    assert all(re.fullmatch(r"[\d.]+ \w+", cell) for cell in cells[4])
    assert "9 students" in lines


def test_print_recipe_has_the_arms(cli):
    code, out, _ = cli("distill", "--against", "labels + kd", "--against", "lr=1e-3", "--print-recipe")
    assert code == 0
    line = next(line for line in out.splitlines() if line.strip().startswith("against"))
    assert "labels + kd" in line and "lr=1e-3" in line and "--against" in line


@pytest.mark.slow
def test_two_processes_train_the_arms(tiny, flags, launcher, tmp_path):
    values = {
        **tiny,
        "loss": "labels + kd",
        "steps": 1,
        "against": "labels",
        "num_processes": 2,
        "batch_size": 10,
    }
    code, _, err = launcher("distill", *flags(values), "--output", str(tmp_path / "run"))
    assert code == 0, err
    told = json.loads((tmp_path / "run" / "run.json").read_text())
    assert [result["arm"] for result in told["results"]] == ["distilled", "labels"]
    assert read_rows(tmp_path / "run" / "arms" / "labels-42" / "answers.safetensors").shape == (500, 10)


@pytest.mark.parametrize("view_seed", [None, 7])
def test_a_view_seed_holds_what_is_seen_and_nothing_else(tiny, tmp_path, monkeypatch, view_seed):
    seen, real = [], Learner.forward

    def forward(self, images, signals, batch, *rest):
        if torch.is_grad_enabled():
            start = next(p.detach().clone() for p in self.parameters() if p.dim() > 1)
            masks, drops = batch.generator.initial_seed(), torch.initial_seed()
            seen.append((images.clone(), batch.targets, start, masks, drops))
        return real(self, images, signals, batch, *rest)

    values = {**tiny, "loss": "labels", "teacher": None, "steps": 3, "seeds": 2, "drop_path": 0.2}
    monkeypatch.setattr(Learner, "forward", forward)
    run(Recipe(**values, view_seed=view_seed), tmp_path / "run")
    updates = [one for one in seen if len(one[0]) == 20]  # rehearsals have fewer images
    assert len(updates) == 6
    for one, other in zip(updates[:3], updates[3:], strict=True):
        held = view_seed is not None
        assert torch.equal(one[0], other[0]) is held  # order, crops and mixing
        assert torch.equal(one[1], other[1]) is held
        assert not torch.equal(one[2], other[2])
        assert one[3] != other[3] and one[4] != other[4]
    assert not torch.equal(updates[0][0], updates[1][0])
