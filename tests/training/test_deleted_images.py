"""What happens to the images of a run, and to a run that waits for one, between its start and its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

import vitkd_cli as vitkd
from vitkd_cli.errors import UserError
from vitkd_cli.terminal import Terminal
from vitkd_cli.training import Reporter, signals
from vitkd_cli.training.trainer import Trainer

STUDENT = {
    "student": "vit_tiny",
    "model_kwargs": "img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3",
    "loss": "labels",
    "epochs": 2,
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
}


def test_a_run_goes_on_after_an_image_was_deleted(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    shutil.copytree(photos, tmp_path / "photos")
    recipe = vitkd.Recipe(**STUDENT, data=str(tmp_path / "photos"), output=str(tmp_path / "run"))
    real = Trainer.agreed

    def stopped(trainer: Any, *rest: Any) -> Any:
        found = real(trainer, *rest)
        trainer.stop = signal.SIGTERM
        return found

    with monkeypatch.context() as patch, pytest.raises(signals.Stopped):
        patch.setattr(Trainer, "agreed", stopped)
        vitkd.distill(recipe, reporter=Reporter(silent=True))
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    for part in ("train", "validation"):
        (tmp_path / "photos" / split[part][0]).unlink()
    run = vitkd.distill(resume=tmp_path / "run", reporter=Reporter(Terminal()))
    assert run is not None and run.results[0].history[-1]["epoch"] == 2
    said = capsys.readouterr().out
    assert f"others of their class stand in (1): {split['train'][0]}" in said
    assert f"validation images that are gone are left out (1): {split['validation'][0]}" in said
    assert json.loads((tmp_path / "run" / "split.json").read_text()) == split


def test_a_second_sigint_ends_a_run_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "AGAIN", 0.05)
    hang, answer = os.pipe()  # a read that never ends
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match="second SIGINT") as caught, signals.Signals(tmp_path) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same, passed on by who started us
        assert stop.received == signal.SIGINT
        time.sleep(0.1)
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGINT))
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        os.read(hang, 1)
    signal.signal(signal.SIGCHLD, before)
    os.close(hang)
    os.close(answer)
    assert caught.value.exit_code == 130 and str(tmp_path) in caught.value.hint


def test_data_without_a_training_split_is_refused_before_anything_else(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos, tmp_path / "data" / "test")
    shutil.copytree(photos / "cat", tmp_path / "data" / "cat")
    with pytest.raises(UserError, match="data has no training images; it has 72 validation images") as caught:
        vitkd.distill(vitkd.Recipe(**STUDENT, data=str(tmp_path / "data")), reporter=Reporter(silent=True))
    assert "FOLDER/train" in caught.value.hint
