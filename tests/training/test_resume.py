"""A run that was stopped, however it was stopped, ends as if it had not been."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vitkd_cli import Recipe, distill
from vitkd_cli.progress import Reporter

# Weights of balanced terms are estimated at updates 1 and 21.
LOSS = "labels + vitkd(balance=0.2) + nkd"
LONG = {"epochs": 6, "recovery_interval": 3, "model_ema": True, "drop_path": 0.2, "loss": LOSS}


def wait_for_update(process: subprocess.Popen[str], folder: Path, update: int) -> None:
    log = folder / "log.jsonl"
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(json.loads(line)["update"] >= update for line in lines if line.endswith("}")):
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    distill(Recipe(**{**tiny, **LONG}, output=str(folder)), reporter=Reporter(silent=True))
    return folder


def goes_on(cli, read_log, stopped: Path, whole: Path) -> None:
    """It ends as the one that nothing interrupted did, wherever it lies now."""
    assert not (stopped / "run.json").exists()
    moved = stopped.rename(stopped.with_name("moved"))
    code, out, err = cli("distill", "--resume", str(moved), "--workers", "1")
    assert code == 0, err
    assert "going on after update" in out
    assert read_log(moved) == read_log(whole)
    ours = load_file(moved / "student" / "model.safetensors")
    theirs = load_file(whole / "student" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_stopped_run_resumes_to_the_bit(whole, tiny, flags, cli, read_log, tmp_path, at_step, number, code):
    def tell() -> None:
        """As schedulers do: the whole process group, loader workers included."""
        workers = multiprocessing.active_children()
        assert len(workers) >= 2
        for process in (*(worker.pid for worker in workers), os.getpid()):
            os.kill(process, number)

    at_step(7, tell)  # in the middle of an epoch of five updates
    stopped = tmp_path / "stopped"
    values = {**tiny, **LONG, "workers": 2}
    left, out, err = cli("distill", *flags(values), "--output", str(stopped))
    assert left == code, out + err
    assert f"stopped by {number.name} after update 7" in err
    assert f"vitkd distill --resume {stopped}" in err
    goes_on(cli, read_log, stopped, whole)


def test_a_killed_run_resumes_to_the_bit(whole, tiny, flags, cli, read_log, tmp_path):
    stopped = tmp_path / "stopped"
    values = flags({**tiny, **LONG})
    process = subprocess.Popen(
        [sys.executable, "-m", "vitkd_cli", "distill", *values, "--output", str(stopped)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    wait_for_update(process, stopped, 7)
    os.killpg(process.pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == -9, out + err
    goes_on(cli, read_log, stopped, whole)


def test_resume_of_a_finished_run_does_nothing(whole, cli):
    before = (whole / "student" / "model.safetensors").stat().st_mtime_ns
    code, out, _ = cli("distill", "--resume", str(whole))
    assert code == 0
    assert "is finished; nothing to do" in out
    assert (whole / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_before_the_first_checkpoint_starts_over(tiny, cli, tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe(**tiny, output=str(tmp_path)).to_toml())
    code, out, err = cli("distill", "--resume", str(tmp_path))
    assert code == 0, err
    assert "there is no checkpoint yet; starting over" in out


def test_resume_keeps_the_recipe(whole, cli, tmp_path):
    code, _, err = cli("distill", "--resume", str(whole), "--lr", "1")
    assert code == 2
    assert "--lr cannot change it" in err
    code, _, err = cli("distill", "--resume", str(tmp_path))
    assert code == 2
    assert "is no run folder" in err
