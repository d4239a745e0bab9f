"""A sweep, from what is varied to its table: whole, killed, stopped, halved, printed, with a failure."""

from __future__ import annotations

import csv
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

import vitkd_cli
from vitkd_cli.files import read_sealed
from vitkd_cli.recipe import Recipe, recipe_of
from vitkd_cli.report.found import found_runs
from vitkd_cli.requests import SweepRequest
from vitkd_cli.sweeps import run as sweeps

LOSS = "labels + {w}*kd"
TEACHER = "img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3"


@pytest.fixture(scope="module")
def asked(tiny, flags):
    """Three points and the default, which is one of them, of two epochs with two seeds."""
    values = {**tiny, "teacher_kwargs": TEACHER, "finetune_teacher": 1, "seeds": 2, "loss": LOSS}
    return ["sweep", *flags(values), "--vary", "w=0.2,1,5"]


def table(folder: Path) -> list[dict[str, str]]:
    with open(folder / "sweep.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(tiny, here, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "whole"
    recipe = Recipe(**{**tiny, "teacher_kwargs": TEACHER, "finetune_teacher": 1, "seeds": 2, "loss": LOSS})
    with here():
        found = vitkd_cli.sweep(recipe, vary=["w=0.2,1,5"], output=str(folder))
    return folder, found


def test_a_sweep_leaves_runs_a_table_and_a_picture(whole):
    folder, found = whole
    rows = table(folder)
    assert {row["w"] for row in rows} == {"0.2", "1", "5"}
    assert [row["w"] for row in rows if row["default"] == "True"] == ["1"]
    means = [float(row["top1"]) for row in rows]
    assert means == sorted(means, reverse=True)
    for row in rows:
        place = folder / row["folder"]
        run = vitkd_cli.Run.read(place, recipe_of(place), print)
        assert run and len(run.results) == 2
        assert float(row["top1"]) == pytest.approx(sum(r.top1 for r in run.results) / 2)
        assert row["status"] == "finished" and row["seeds"] == "2"
        assert row["top1_half_interval"] == ""  # two seeds have no interval
        assert not any("second" in key for key in row)  # a speed is never the same again
    taught = Recipe.from_toml(folder / "points/w=5/recipe.toml")
    assert taught.teacher == f"{folder}/points/w=1/teacher/student" and not taught.finetune_teacher
    assert not (folder / "points/w=5/teacher/student").exists()
    assert "2 seeds show too little" in found.sentence() or "no point has a higher" in found.sentence()
    assert found == vitkd_cli.read_sweep(folder)
    assert not list(folder.rglob("report.html"))
    assert len(found_runs([folder.parent])) == 3  # vitkd report sweeps
    assert [one.point.name for one in found.outcomes] == [row["point"] for row in rows]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_to_the_same_table(whole, asked, cli, here, tmp_path):
    folder = tmp_path / "killed"
    command = [sys.executable, "-m", "vitkd_cli", *asked, "--output", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    log = folder / "points/w=0.2/distilled-42/log.jsonl"  # of the second point
    deadline = time.monotonic() + 240
    while not (log.exists() and log.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # its child ends by itself
    process.communicate()
    assert not (folder / "sweep.csv").exists() and not (folder / "points/w=0.2/run.json").exists()
    with here():
        code, out, err = cli("sweep", "--resume", str(folder))
    assert code == 0, out + err
    assert "w=1: top-1" not in out  # it was finished
    assert (folder / "sweep.csv").read_bytes() == (whole[0] / "sweep.csv").read_bytes()


@pytest.mark.slow
def test_printed_commands_make_the_points(whole, asked, cli, here, tmp_path):
    folder = tmp_path / "a sweep"
    code, out, err = cli(*asked, "--output", str(folder), "--print-commands")
    assert code == 0, err
    lines = out.splitlines()
    assert len(lines) == 3 and "the first command comes first" in err
    for line in lines[:2]:
        assert shlex.split(line)[0] == "vitkd"
        code, _, err = cli(*shlex.split(line)[1:])
        assert code == 0, err
    _, out, _ = cli("sweep", "--resume", str(folder), "--print-commands")
    assert out.splitlines() == lines[2:]
    with here():
        code, _, err = cli("sweep", "--resume", str(folder))
    assert code == 0, err
    assert (folder / "sweep.png").stat().st_size > 10_000 and "<svg" in (folder / "sweep.svg").read_text()
    assert (folder / "sweep.csv").read_bytes() == (whole[0] / "sweep.csv").read_bytes()


@pytest.mark.slow
def test_halving_stops_the_worse_half_and_changes_no_other(whole, asked, cli, here, tmp_path):
    folder = tmp_path / "halved"
    with here(stop_after=2):
        code, *_ = cli(*asked, "--output", str(folder), "--halving", "1")
    assert code == 143
    (folder / "points/w=5").write_text("in the way")
    with here():
        code, out, err = cli("sweep", "--resume", str(folder))
    assert code == 3 and "1 of 3 points failed" in err and "w=5: --output" in err
    assert read_sealed(folder / "halving.json")["stages"] == []  # it is ranked once it has run
    assert {row["point"]: row["status"] for row in table(folder)}["w=1"] == "not finished"
    (folder / "points/w=5").unlink()
    with here():
        code, out, err = cli("sweep", "--resume", str(folder))
    assert code == 0, out + err
    status = {row["point"]: row["status"] for row in table(folder)}
    assert status["w=1"] == "finished"  # the default always goes on
    assert sorted(status.values()) == ["finished", "finished", "stopped at epoch 1, rank 2 of 2"]
    assert "stopped at epoch 1" in out
    for point in (name for name, said in status.items() if said == "finished"):
        for seed in (42, 43):
            student = f"points/{point}/distilled-{seed}/student/model.safetensors"
            ours, theirs = load_file(folder / student), load_file(whole[0] / student)
            assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_stopped_sweep_goes_on_and_a_failure_ends_no_other(asked, cli, here, tmp_path):
    folder = tmp_path / "x"
    asked = [*asked]
    asked[asked.index("--seeds") + 1] = "1"
    with here(stop_after=1):
        code, _, err = cli(*asked, "--output", str(folder))
    assert code == 143
    assert "stopped by SIGTERM with 1 of 3 points finished" in err
    assert f"vitkd sweep --resume {folder}" in err
    code, _, err = cli(*asked, "--output", str(folder))
    assert code == 2 and "is not empty" in err and "--resume" in err
    (folder / "points/w=0.2").write_text("in the way")
    with here():
        code, out, err = cli("sweep", "--resume", str(folder))
    assert code == 3
    assert "1 of 3 points failed" in err and "w=0.2: --output" in err and "is a file" in err
    assert [row["status"][:8] for row in table(folder)] == ["finished", "finished", "failed: "]
    assert "w=5: top-1" in out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--vary", "blocks=(0,1),(0,9)", "--loss", "labels + mimic(blocks={blocks})"], "(0,9)"),
        (["--vary", "opt=adamw,adamw9"], "adamw9"),
        (["--vary", "lr=1e-3,1e-2", "--halving", "2"], "no epoch before the last of 2"),
        (["--vary", "lr=1e-3,1e-2", "--halving", "1", "--print-commands"], "exclude each other"),
        (["--vary", "lr=1e-3,1e-2", "--val-fraction", "0", "--data", "DATA"], "no validation split"),
    ],
)
def test_nothing_begins_where_a_point_cannot(more, said, tiny, flags, cli, photos, tmp_path):
    more = [str(photos) if word == "DATA" else word for word in more]
    values = {key: value for key, value in {"loss": "labels", **tiny}.items() if f"--{key}" not in more}
    code, out, err = cli("sweep", *flags(values), *more, "--output", str(tmp_path / "x"))
    assert code == 2 and said in err, out + err
    assert not (tmp_path / "x").exists()


def test_resume_takes_a_sweep_as_it_is(cli, tmp_path):
    code, _, err = cli("sweep", "--resume", str(tmp_path), "--lr", "1")
    assert code == 2 and "--resume takes everything from the sweep" in err
    code, _, err = cli("sweep", "--resume", str(tmp_path))
    assert code == 2 and "is no sweep" in err
    with pytest.raises(vitkd_cli.UserError, match="--resume takes everything from the sweep"):
        vitkd_cli.sweep(SweepRequest(resume=str(tmp_path), vary=("lr=1,2",)))


def test_a_sweep_is_resumed_from_a_place_beside_it(whole, cli, monkeypatch):
    """The commands that it prints hold wherever they are run."""
    folder, _ = whole
    before = (folder / "points/w=5.toml").read_bytes()
    (folder / "points/w=5/run.json").rename(folder / "run.json")
    monkeypatch.chdir(folder.parent)
    try:
        code, out, err = cli("sweep", "--resume", folder.name, "--print-commands")
    finally:
        (folder / "run.json").rename(folder / "points/w=5/run.json")
    assert code == 0, err
    assert shlex.split(out)[3] == str(folder / "points/w=5.toml") and "--no-report" in out
    assert (folder / "points/w=5.toml").read_bytes() == before


def test_a_folder_is_looked_at_again_under_its_lock(tiny, tmp_path, monkeypatch):
    """Leftovers and a lock are no content; a sweep that began meanwhile is."""
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".part-sweep.toml").touch()

    def rehearsed(points, reporter):
        (folder / "sweep.toml").write_text("of another")
        return {}

    monkeypatch.setattr(sweeps, "rehearse_all", rehearsed)
    with pytest.raises(vitkd_cli.UserError, match="is not empty"):
        vitkd_cli.sweep(Recipe(**tiny), vary=["lr=1e-3,2e-3"], output=str(folder))
    assert (folder / "sweep.toml").read_text() == "of another"


def test_what_is_typed_goes_before_the_file(tmp_path, cli, monkeypatch):
    file = tmp_path / "s.toml"
    file.write_text("[vary]\nlr = [1e-3, 2e-3]\n[sweep]\njobs = 2\ndraw_seed = 3\n")
    seen = []
    monkeypatch.setattr("vitkd_cli.sweeps.sweep", lambda asked, **_: seen.append(asked))
    code, _, err = cli("sweep", "--recipe", str(file), "--jobs", "1")
    assert code == 0, err
    assert (seen[0].jobs, seen[0].draw_seed) == (1, 3)
