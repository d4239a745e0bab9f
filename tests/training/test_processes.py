"""The number of processes and of accumulation steps changes nothing but the time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from vitkd_cli import UserError
from vitkd_cli.recipe import Recipe
from vitkd_cli.training.session import Session

# Mixup, cutmix, erasing and random masks are all on by default; the global batch is 20 in each.
SPLITS = {
    "two processes": {"num_processes": 2, "batch_size": 10},
    "two steps": {"grad_accum_steps": 2, "batch_size": 10},
}


@pytest.fixture(scope="module")
def curve(tiny, flags, vitkd, read_log, tmp_path_factory):
    def run(dtype: str, **changes):
        folder = tmp_path_factory.mktemp("processes") / "run"
        values = {**tiny, "model_dtype": dtype, "epochs": 3, "steps": 12, **changes}
        finished = vitkd("distill", *flags(values), "--output", str(folder))
        assert finished.returncode == 0, finished.stderr
        return read_log(folder)

    return run


@pytest.fixture(scope="module")
def alone(curve):
    return {dtype: curve(dtype) for dtype in ("float64", "float32")}


def assert_same(ours, theirs, rel):
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        numbers = [{k: v for k, v in line.items() if k != "event"} for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=rel, abs=1e-9)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("split", SPLITS)
def test_the_loss_curve_is_that_of_one_process(alone, curve, split, dtype):
    assert len(alone[dtype]) > 12  # updates and validations
    assert_same(alone[dtype], curve(dtype, **SPLITS[split]), rel=1e-9 if dtype == "float64" else 2e-3)


def test_terms_that_compare_images_see_those_of_all_processes(curve):
    few = {"loss": "labels + dist", "epochs": 1}
    ours, theirs = curve("float64", **few), curve("float64", **few, **SPLITS["two processes"])
    assert len(ours) > 5
    assert_same(ours, theirs, rel=1e-9)


def test_what_one_of_several_processes_says_reaches_the_user_once(tiny, flags, vitkd, tmp_path):
    values = {**tiny, "num_processes": 2, "loss": "labels + nkdd"}
    refused = vitkd("distill", *flags(values), "--output", str(tmp_path / "run"))
    assert refused.returncode == 2
    assert refused.stderr.count("error:") == 1
    assert "no term is called 'nkdd'" in refused.stderr


def test_two_processes_stop_together_and_can_go_on(tiny, flags, vitkd, tmp_path):
    run = tmp_path / "run"
    values = {**tiny, "num_processes": 2, "batch_size": 10, "epochs": 200}
    process = subprocess.Popen(
        [sys.executable, "-m", "vitkd_cli", "distill", *flags(values), "--output", str(run)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    while not (run / "log.jsonl").exists() or len((run / "log.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 143, err
    assert "stopped by SIGTERM after update" in err and f"--resume {run}" in err
    assert list((run / "checkpoints").glob("update-*"))


def test_another_world_than_was_asked_for_is_refused(tiny):
    with pytest.raises(UserError, match="--num-processes 3 was asked for, and 1 started"):
        Session(Recipe(**{**tiny, "num_processes": 3}), None)
