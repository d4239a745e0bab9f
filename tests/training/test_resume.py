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

LONG = {"epochs": 6, "recovery_interval": 3, "model_ema": True, "drop_path": 0.2}


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "vitkd_cli", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )


def wait_for_update(folder: Path, update: int) -> None:
    log = folder / "log.jsonl"
    for _ in range(1200):
        if log.exists() and any(
            json.loads(line)["update"] >= update
            for line in log.read_text().splitlines()
            if line.endswith("}")
        ):
            return
        time.sleep(0.05)
    raise AssertionError(f"{log} never reached update {update}")


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)]
)
def test_a_stopped_run_resumes_to_the_bit(tiny, flags, vitkd, read_log, tmp_path, number, code):
    # Slow enough to be stopped midway, in the middle of an epoch of five updates.
    values = {**tiny, **LONG}
    whole = vitkd("distill", *flags(values), "--output", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr

    process = start(["distill", *flags(values), "--output", str(tmp_path / "stopped")])
    wait_for_update(tmp_path / "stopped", 7)
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    assert not (tmp_path / "stopped" / "run.json").exists()
    if number != signal.SIGKILL:
        assert f"stopped by {number.name} after update" in err
        assert f"vitkd distill --resume {tmp_path / 'stopped'}" in err

    resumed = vitkd("distill", "--resume", str(tmp_path / "stopped"), "--workers", "2")
    assert resumed.returncode == 0, resumed.stderr
    assert "going on after update" in resumed.stdout
    assert read_log(tmp_path / "stopped") == read_log(tmp_path / "whole")
    ours = load_file(tmp_path / "stopped" / "student" / "model.safetensors")
    theirs = load_file(tmp_path / "whole" / "student" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_resume_of_a_finished_run_does_nothing(tiny, flags, vitkd, tmp_path):
    run = tmp_path / "run"
    assert vitkd("distill", *flags(tiny), "--output", str(run)).returncode == 0
    before = (run / "student" / "model.safetensors").stat().st_mtime_ns
    again = vitkd("distill", "--resume", str(run))
    assert again.returncode == 0
    assert "is finished; nothing to do" in again.stdout
    assert (run / "student" / "model.safetensors").stat().st_mtime_ns == before


def test_resume_before_the_first_checkpoint_starts_over(tiny, vitkd, tmp_path):
    from vitkd_cli import Recipe

    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(Recipe(**tiny, output=str(run)).to_toml())
    resumed = vitkd("distill", "--resume", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert "there is no checkpoint yet; starting over" in resumed.stdout


def test_resume_keeps_the_recipe(tiny, vitkd, tmp_path):
    changed = vitkd("distill", "--resume", str(tmp_path), "--lr", "1")
    assert changed.returncode == 2
    assert "--lr cannot change it" in changed.stderr
    nothing = vitkd("distill", "--resume", str(tmp_path))
    assert nothing.returncode == 2
    assert "is no run folder" in nothing.stderr
