"""Checkpoints: whole or not there."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from torch import nn

from vitkd_cli import UserError
from vitkd_cli.training import checkpoint
from vitkd_cli.training.checkpoint import Progress


def write(folder, update, value, keep=2):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    states = {"optimizer": {"step": torch.tensor(update), "groups": [{"lr": 0.1}]}}
    return checkpoint.save(folder, Progress(update=update), {"learner": model}, states, keep=keep)


def read(folder):
    model = nn.Linear(2, 2)
    found = checkpoint.load(folder, {"learner": model}, ("optimizer",))
    return model, found


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    for update in (3, 6, 9):
        write(tmp_path, update, update)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["update-00000006", "update-00000009"]
    model, (progress, states, skipped) = read(tmp_path)
    assert (model.weight == 9).all() and progress.update == 9 and not skipped
    assert states["optimizer"]["groups"] == [{"lr": 0.1}]


def test_nothing_there_is_nothing(tmp_path):
    assert read(tmp_path)[1] is None


@pytest.mark.parametrize("broken", ["learner.safetensors", "optimizer.pt", "progress.json"])
def test_a_truncated_one_is_passed_over_by_name(tmp_path, broken):
    write(tmp_path, 3, 3)
    newest = write(tmp_path, 6, 6)
    content = (newest / broken).read_bytes()
    (newest / broken).write_bytes(content[: len(content) // 2])
    model, (progress, _, skipped) = read(tmp_path)
    assert (model.weight == 3).all() and progress.update == 3
    assert "update-00000006 is incomplete" in skipped[0]


def test_a_kill_while_saving_leaves_the_one_before(tmp_path, monkeypatch):
    write(tmp_path, 3, 3)
    monkeypatch.setattr(checkpoint.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, 6, 6)
    monkeypatch.undo()
    assert read(tmp_path)[1][0].update == 3
    write(tmp_path, 9, 9)  # what the kill left behind is in nobody's way
    assert read(tmp_path)[1][0].update == 9


def test_all_unreadable_is_said(tmp_path):
    (write(tmp_path, 3, 3) / "learner.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        read(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = write(tmp_path, 3, 3) / "progress.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match="another checkpoint format"):
        read(tmp_path)


def test_no_pickle_is_executed(tmp_path):
    write(tmp_path, 2, 2)
    path = write(tmp_path, 3, 3)
    torch.save({"step": Exploit()}, path / "optimizer.pt")
    _, (progress, _, skipped) = read(tmp_path)
    assert progress.update == 2 and skipped
    assert not Exploit.ran


class Exploit:
    ran = False

    def __reduce__(self):
        return (setattr, (Exploit, "ran", True))


@pytest.mark.parametrize("writer", ["save_file", "torch.save"])
def test_a_full_disk_keeps_the_last_good_one_and_names_it(tmp_path, monkeypatch, writer):
    good = write(tmp_path, 3, 3)

    def full(*_args, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    if writer == "save_file":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError) as refused:
        write(tmp_path, 6, 6)
    assert "the disk is full" in refused.value.message and str(good) in refused.value.message
    assert refused.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == [good.name]  # no half checkpoint is left


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        write(tmp_path, 6, 6)


def test_saving_after_an_unreadable_one_was_passed_over_keeps_what_was_saved(tmp_path):
    write(tmp_path, 3, 3)
    (write(tmp_path, 9, 9) / "progress.json").write_text("{}")
    saved = write(tmp_path, 6, 6, keep=1)
    assert checkpoint.complete(tmp_path) == [saved]
