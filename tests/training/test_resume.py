"""A run that was stopped, however it was stopped, ends as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from vitkd_cli import Recipe

LONG = {"epochs": 6, "recovery_interval": 3, "model_ema": True, "drop_path": 0.2}


def wait_for_update(process: subprocess.Popen[str], folder: Path, update: int) -> None:
    log = folder / "log.jsonl"
    while process.poll() is None:
        lines = log.read_text().splitlines() if log.exists() else []
        if any(json.loads(line)["update"] >= update for line in lines if line.endswith("}")):
            return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def whole(tiny, flags, vitkd, tmp_path_factory) -> Path:
    """A run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("resume") / "whole"
    finished = vitkd("distill", *flags({**tiny, **LONG}), "--output", str(folder))
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_resumes_to_the_bit(whole, tiny, flags, vitkd, read_log, tmp_path, number, code):
    stopped = tmp_path / "stopped"
    # Schedulers tell the whole process group, loader workers included.
    values = {**tiny, **LONG, "workers": 0 if number == signal.SIGKILL else 2}
    process = subprocess.Popen(
        [sys.executable, "-m", "vitkd_cli", "distill", *flags(values), "--output", str(stopped)],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    wait_for_update(process, stopped, 7)  # in the middle of an epoch of five updates
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert not (stopped / "run.json").exists()
    if number != signal.SIGKILL:
        assert f"stopped by {number.name} after update" in err
        assert f"vitkd distill --resume {stopped}" in err

    moved = stopped.rename(tmp_path / "moved")
    resumed = vitkd("distill", "--resume", str(moved), "--workers", "1")
    stopped = moved
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after update" in resumed.stdout
    assert read_log(stopped) == read_log(whole)
    ours = load_file(stopped / "student" / "model.safetensors")
    theirs = load_file(whole / "student" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_resume_of_a_finished_run_does_nothing(whole, vitkd):
    before = (whole / "student" / "model.safetensors").stat().st_mtime_ns
    again = vitkd("distill", "--resume", str(whole))
    assert again.returncode == 0
    assert "is finished; nothing to do" in again.stdout
    assert (whole / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_before_the_first_checkpoint_starts_over(tiny, vitkd, tmp_path):
    (tmp_path / "recipe.toml").write_text(Recipe(**tiny, output=str(tmp_path)).to_toml())
    resumed = vitkd("distill", "--resume", str(tmp_path))
    assert resumed.returncode == 0, resumed.stderr
    assert "there is no checkpoint yet; starting over" in resumed.stdout


def test_resume_keeps_the_recipe(whole, vitkd, tmp_path):
    changed = vitkd("distill", "--resume", str(whole), "--lr", "1")
    assert changed.returncode == 2
    assert "--lr cannot change it" in changed.stderr
    nothing = vitkd("distill", "--resume", str(tmp_path))
    assert nothing.returncode == 2
    assert "is no run folder" in nothing.stderr
