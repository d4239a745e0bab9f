"""The life of a run folder: one writer, more of a run, and what a crash or a flipped bit leaves of it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from heard import Heard
from safetensors.torch import load, load_file

import vitkd_cli as vitkd
from vitkd_cli import files
from vitkd_cli.files import write_text
from vitkd_cli.recipe import recipe_of
from vitkd_cli.training import checkpoint, start, trainer
from vitkd_cli.training.folder import check_folder, is_run, open_folder, sole_writer


@pytest.fixture(scope="module")
def short(tiny):
    """A run of two updates a pass, trained alone."""
    return {**tiny, "shots": 4, "epochs": 2, "loss": "labels", "sched": "constant", "warmup_epochs": 0.0}


@pytest.fixture(scope="module")
def original(short, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "run"
    vitkd.distill(vitkd.Recipe(**short, keep_checkpoints=True, output=str(folder)), reporter=Heard())
    return folder


@pytest.fixture
def finished(original, tmp_path):
    """A finished run that kept its checkpoints."""
    return shutil.copytree(original, tmp_path / "run")


def resume(folder, **changes):
    heard = Heard()
    return vitkd.distill(resume=folder, machine=changes, reporter=heard), "\n".join(heard.lines)


def same_weights(one, other):
    ours, theirs = (load_file(f / "student" / "model.safetensors") for f in (one, other))
    return all((ours[name] == theirs[name]).all() for name in ours)


# One writer ---------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_by_host_and_process(finished):
    (finished / "run.json").unlink()
    with sole_writer(finished, 0, print):
        before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
        with pytest.raises(vitkd.UserError, match=r"is in use by process \d+ on \S+") as refused:
            resume(finished)
        assert "--lock-timeout" in refused.value.hint
        assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert resume(finished)[0] is not None


def test_a_name_with_a_systems_word_is_no_refusal_of_the_system(tmp_path):
    folder = tmp_path / "quota"
    with sole_writer(folder, 0, print), pytest.raises(vitkd.UserError, match="is in use by process"):
        with sole_writer(folder, 0, print):
            pass


def test_a_dead_writers_lock_is_taken_over(tmp_path):
    if not (child := os.fork()):
        with sole_writer(tmp_path, 0, print):
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    assert (tmp_path / ".lock").read_text().startswith(f"process {child} on ")
    with sole_writer(tmp_path, 0, print):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_class_map_in_a_run_is_not_emptied_with_it(tmp_path):
    names = tmp_path / "student" / "classes.txt"
    names.parent.mkdir()
    names.touch()
    with pytest.raises(vitkd.UserError, match=r"holds what this run reads \(class_map\)"):
        check_folder(tmp_path, True, vitkd.Recipe(class_map=str(names)))


# More of a run ------------------------------------------------------------------------------------------


def test_more_epochs_are_those_of_a_longer_run(short, finished, tmp_path, read_log):
    """Where the schedule does not know the end, to the bit."""
    values = {**short, "epochs": 3}
    vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path / "long")), reporter=Heard())
    run, said = resume(finished, epochs=3)
    assert run.results[0].updates == 6
    assert same_weights(finished, tmp_path / "long")
    assert read_log(finished) == read_log(tmp_path / "long")
    assert "the learning rate goes" not in said
    again, said = resume(finished)
    assert "is finished; nothing to do" in said
    assert again.results == run.results


def test_a_schedule_that_knows_its_end_is_stretched_and_said(short, tmp_path):
    values = {**short, "sched": "cosine", "keep_checkpoints": True}
    vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path)), reporter=Heard())
    _, said = resume(tmp_path, epochs=4)
    assert re.search(r"cosine over 4 epochs from here on: the learning rate goes from \S+ to \S+", said)


def test_without_its_optimizer_a_run_takes_no_more_epochs(finished, cli):
    checkpoint.strip(finished / "checkpoints")
    before = (finished / "recipe.toml").read_text()
    with pytest.raises(vitkd.UserError, match="finished without --keep-checkpoints") as refused:
        resume(finished, epochs=3)
    assert (finished / "recipe.toml").read_text() == before
    assert "is finished; nothing to do" in resume(finished)[1]
    command = refused.value.hint.partition("vitkd ")[2]
    assert "--epochs 3" in command
    code, _, err = cli(*shlex.split(command), "--quiet")
    assert code == 0, err


def test_a_baseline_and_seeds_are_added(tiny, short, tmp_path):
    values = {**short, "loss": "labels + kd", "steps": 1}
    first = vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path)), reporter=Heard())
    weights = (first.student / "model.safetensors").stat().st_mtime_ns
    run, said = resume(tmp_path, baseline=True, seeds=2)
    assert [(r.arm, r.seed) for r in run.results] == [
        ("distilled", 42),
        ("alone", 42),
        ("distilled", 43),
        ("alone", 43),
    ]
    assert "distilled (seed 42) is finished already" in said
    assert (run.student / "model.safetensors").stat().st_mtime_ns == weights
    assert vitkd.Recipe.from_toml(tmp_path / "recipe.toml").seeds == 2
    assert "nothing to do" in resume(tmp_path)[1]
    with pytest.raises(vitkd.UserError, match="--seeds 1: the run has 2 already"):
        resume(tmp_path, seeds=1)


def test_what_cannot_change_is_answered_with_the_command_of_a_new_run(finished, cli):
    code, _, err = cli("distill", "--resume", str(finished), "--opt", "sgd")
    assert code == 2
    assert "--opt cannot change it" in err
    command = err.partition("a new run from here: vitkd ")[2]
    code, _, err = cli(*shlex.split(command), "--quiet")
    assert code == 0, err
    assert "sgd" in (finished.with_name("run-2") / "recipe.toml").read_text()
    assert cli("distill", "--resume", str(finished), "--opt", "adamw")[0] == 0  # as it is: no change


@pytest.mark.parametrize(
    "flags", [["--no-exif"], ["--scale", "0.5,1.0"], ["--loss", "labels + 0.5*kd"], ["--no-baseline"]]
)
def test_the_command_of_a_new_run_can_be_typed(finished, cli, flags):
    if flags == ["--no-baseline"]:  # more is an extension, less is not
        recipe = finished / "recipe.toml"
        recipe.write_text(recipe.read_text().replace("baseline = false", "baseline = true"))
    code, _, err = cli("distill", "--resume", str(finished), *flags)
    assert code == 2
    assert shlex.split(err.partition("a new run from here: ")[2])[6:-2] == flags


def test_auto_goes_on_if_there_is_something_to_go_on_with(short, flags, cli, tmp_path):
    script = ["distill", *flags(short), "--output", str(tmp_path / "run"), "--resume", "auto"]
    assert cli(*script)[0] == 0
    code, out, err = cli(*script)
    assert code == 0, err
    assert "is finished; nothing to do" in out
    code, _, err = cli("distill", *flags(short), "--resume", "auto")
    assert code == 2
    assert "--resume auto looks at --output" in err


def test_auto_keeps_what_a_run_was_given_since(short):
    """Extended, cut short in its steps, or shared among another number of processes."""
    asked = vitkd.Recipe(**{**short, "batch_size": 10})
    for changes in (
        {"epochs": 20, "warmup_epochs": 1.0},
        {"steps": 100},
        {"seeds": 5, "baseline": True, "against": ("2*labels",)},
        {"grad_accum_steps": 2},
        {"num_processes": 2, "batch_size": 5},
    ):
        stored = start.anchored(asked).but(**changes)
        assert start.otherwise(asked, stored, ()) == {}, changes
    stored = start.anchored(asked).but(batch_size=25, epochs=20)
    assert start.otherwise(asked, stored, ("epochs",)) == {"batch_size": 10, "epochs": asked.epochs}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 10}, "--batch-size cannot change it"),
        ({"loss": "2*labels"}, "--loss cannot change it"),
        ({"seed": 5, "workers": 1}, "--seed cannot change it"),
        ({"workers": 1}, ""),
        ({"batch_size": None}, ""),  # settled by the run
    ],
    ids=str,
)
def test_auto_goes_on_with_a_run_of_the_same_recipe_alone(finished, changes, told):
    recipe = recipe_of(finished).but(**changes)
    with pytest.raises(vitkd.UserError, match=told) if told else nullcontext():
        vitkd.distill(recipe, resume="auto")


# What a crash leaves ------------------------------------------------------------------------------------


def test_a_crash_while_a_run_is_replaced_leaves_what_resumes_or_starts(finished, tmp_path, crash_after):
    recipe = vitkd.Recipe.from_toml(finished / "recipe.toml")
    data = SimpleNamespace(split_files={"train": [], "validation": []}, record={})
    for operations in count():
        folder = shutil.copytree(finished, tmp_path / f"{operations}")
        again = recipe.but(output=str(folder), lr=0.5)
        lived = crash_after(operations, lambda: open_folder(folder, again, data, resume=False))  # noqa: B023
        check_folder(folder, True, again)  # --overwrite may start
        if is_run(folder) and (folder / "checkpoints").exists():
            assert vitkd.Recipe.from_toml(folder / "recipe.toml").lr == recipe.lr  # the old run
            if (folder / "run.json").exists():
                assert (folder / "student" / "model.safetensors").exists()
        else:
            assert not (folder / "run.json").exists()
        if lived:
            break
    assert operations > 20
    assert {path.name for path in folder.iterdir()} == {
        ".lock",
        "recipe.toml",
        "split.json",
        "data.json",
    }


@pytest.mark.parametrize("step", [13, pytest.param(7, marks=pytest.mark.slow)])
def test_a_crash_at_the_end_of_a_run_is_made_up_for(
    original, finished, tmp_path, crash_after, read_log, step
):
    """From the last update on: validation, student, figures."""
    for name in ("run.json", "result.json"):
        (finished / name).unlink()
    shutil.rmtree(finished / "student")
    wanted = read_log(finished)
    for operations in count(0, step):
        folder = shutil.copytree(finished, tmp_path / f"{operations}")
        lived = crash_after(operations, lambda: resume(folder, keep_checkpoints=False))  # noqa: B023
        _, said = resume(folder)
        assert "damaged" not in said
        assert same_weights(folder, original)
        assert read_log(folder) == wanted
        assert not [p for p in folder.rglob(".*") if p.name != ".lock"]
        if lived:
            break
    assert operations > 20


# What damage does ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["", "null", "[1", '{"results": null}', '{"results": [{}]}', "\xff"])
@pytest.mark.parametrize("name", ["run.json", "result.json"])
def test_damaged_figures_are_named_and_written_anew(finished, name, content):
    wanted = json.loads((finished / name).read_text())
    (finished / "run.json").unlink()
    (finished / name).write_text(content, encoding="latin-1")
    _, said = resume(finished)
    assert f"{name} is damaged" in said
    again = json.loads((finished / name).read_text())
    for figures in (wanted, again):
        for result in figures.get("results", [figures]):
            del result["images_per_second"], result["speed_batch"], result["data_wait"]
        del figures["sha256"]
    assert again == wanted


def test_a_changed_figure_is_seen(finished):
    path = finished / "run.json"
    path.write_text(re.sub(r'"top1": \d', '"top1": 9', path.read_text()))
    assert "run.json is damaged (does not have the content that was written)" in resume(finished)[1]


def test_a_deleted_student_is_written_anew(finished):
    shutil.rmtree(finished / "student")
    run, said = resume(finished)
    assert "student is gone" in said
    assert (run.student / "model.safetensors").is_file()


def test_a_damaged_student_is_written_anew(finished):
    weights = finished / "student" / "model.safetensors"
    whole = weights.read_bytes()
    before = load(whole)
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _, said = resume(finished)
    assert "student is damaged" in said
    # Tensors, not bytes: safetensors writes its metadata in an order that changes from save to save.
    after = load_file(weights)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("damage", [b"\xff\xfe{", b'{"update": null}\n[]\n7\n', b"", None])
def test_no_log_keeps_a_run_from_going_on(finished, damage):
    path = finished / "log.jsonl"
    whole = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage + whole)
    _, said = resume(finished, epochs=3)
    assert [json.loads(line) for line in path.read_text().splitlines()]
    assert ("log.jsonl is damaged" in said) == bool(damage)


def test_without_its_log_a_runs_own_student_stays(finished):
    before = (finished / "student" / "model.safetensors").read_bytes()
    (finished / "log.jsonl").unlink()
    run, said = resume(finished, seeds=2)
    assert "is finished already" in said
    assert run.results[0].folder == str(finished)
    assert before == (finished / "student" / "model.safetensors").read_bytes()


def test_processes_that_read_different_checkpoints_do_not_go_on(finished, monkeypatch):
    monkeypatch.setattr(trainer, "gather_object", lambda own: [*own, 1])
    with pytest.raises(vitkd.UserError, match="checkpoints of different updates: 1, "):
        resume(finished, epochs=3)


def test_damaged_best_weights_are_named_and_chosen_anew(short, tmp_path):
    values = {**short, "select": "best", "keep_checkpoints": True}
    vitkd.distill(vitkd.Recipe(**values, output=str(tmp_path)), reporter=Heard())
    (tmp_path / "checkpoints" / "best.safetensors").write_bytes(b"")
    (tmp_path / "run.json").unlink()
    (tmp_path / "result.json").unlink()
    _, said = resume(tmp_path)
    assert "best.safetensors is not the one of update" in said
    newest = checkpoint.complete(tmp_path / "checkpoints")[-1] / "learner.safetensors"
    student = load_file(tmp_path / "student" / "model.safetensors")
    assert all((load_file(newest)[f"student.model.{k}"] == v).all() for k, v in student.items())


# A disk that refuses ------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [13, pytest.param(7, marks=pytest.mark.slow)])
def test_every_write_of_a_run_that_is_refused_is_a_line(short, tmp_path, monkeypatch, step):
    """A disk that is full from the k-th file on: our message, exit 3, and a folder that goes on."""
    real = files.flush
    for k in count(1, step):
        left = k

        def full(path):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            real(path)

        folder = tmp_path / f"{k}"
        monkeypatch.setattr(files, "flush", full)
        try:
            vitkd.distill(vitkd.Recipe(**short, output=str(folder)), reporter=Heard())
            break
        except vitkd.UserError as refused:
            assert "the disk is full" in refused.message
            assert refused.exit_code == 3
            if is_run(folder):
                assert f"--resume {folder}" in refused.hint
        finally:
            monkeypatch.undo()
        if is_run(folder):
            assert resume(folder)[0].student.exists()
    assert k > 12


def test_a_finished_run_on_a_disk_that_is_read_only_has_nothing_to_do(finished, cli, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    for name in ("replace", "mkdir", "unlink", "chmod"):
        monkeypatch.setattr(files.os, name, refuse)
    code, out, err = cli("distill", "--resume", str(finished))
    assert code == 0, err
    assert "nothing to do" in out
    assert "curves.png: the disk is read-only" in " ".join(out.split())


def test_a_run_that_diverges_at_its_last_update_says_so(short, tmp_path, monkeypatch, cli):
    """Its weights are not numbers: no student is written, and the hint's command trains on from good ones."""
    real = trainer.Trainer.agreed

    def poison(self, *rest):
        found = real(self, *rest)
        if self.progress.update == 4:
            next(self.student.parameters()).data.fill_(float("nan"))
        return found

    monkeypatch.setattr(trainer.Trainer, "agreed", poison)
    with pytest.raises(vitkd.UserError, match="is not finite: the training diverged") as stopped:
        vitkd.distill(vitkd.Recipe(**short, output=str(tmp_path / "run")), reporter=Heard())
    monkeypatch.undo()
    assert stopped.value.exit_code == 3
    assert not (tmp_path / "run" / "student").exists()
    for file in (tmp_path / "run").rglob("*.json*"):
        assert "NaN" not in file.read_text()
    assert "update-00000002" in stopped.value.message  # that of update 4 has the weights that went wrong
    command = stopped.value.hint.partition("vitkd ")[2]
    code, _, err = cli(*shlex.split(command), "--quiet")
    assert code == 0, err


def test_text_of_another_encoding_is_no_run_of_ours(tmp_path):
    write_text(tmp_path / "recipe.toml", "schema = 1")
    assert is_run(tmp_path)
    (tmp_path / "recipe.toml").write_bytes(b"\xff\xfe")
    assert not is_run(tmp_path)
