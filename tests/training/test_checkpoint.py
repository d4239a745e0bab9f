"""Checkpoints: whole or not there, and what is damaged is passed over by name."""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from vitkd_cli import UserError
from vitkd_cli.files import is_leftover, repair, write_manifest
from vitkd_cli.training import checkpoint
from vitkd_cli.training.checkpoint import Progress


def write(folder, update, value, keep=2, best=None):
    model = nn.Linear(2, 2)
    nn.init.constant_(model.weight, value)
    states = {"optimizer": {"step": torch.tensor(update), "groups": [{"lr": 0.1}]}}
    folder.mkdir(exist_ok=True)
    return checkpoint.save(
        folder, Progress(update=update, best=best), {"learner": model.state_dict()}, states, keep=keep
    )


def read(folder):
    model = nn.Linear(2, 2)
    found = checkpoint.load(folder, {"learner": model}, ("optimizer",))
    return model, found


def test_the_newest_is_read_and_old_ones_go(tmp_path):
    for update in (3, 6, 9):
        write(tmp_path, update, update)
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["update-00000006", "update-00000009"]
    model, found = read(tmp_path)
    assert (model.weight == 9).all()
    assert found.progress.update == 9
    assert not found.notes
    assert found.states["optimizer"]["groups"] == [{"lr": 0.1}]


def test_nothing_there_is_nothing(tmp_path):
    assert read(tmp_path)[1] is None


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def delete(path):
    path.unlink()


def exchange(path):
    shutil.copy(path.parent.with_name("update-00000003") / path.name, path)


FILES = ("learner.safetensors", "optimizer.pt", "progress.json", "manifest.json")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, delete, exchange])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over_by_name(tmp_path, name, damage):
    write(tmp_path, 3, 3)
    damage(write(tmp_path, 6, 6) / name)
    model, found = read(tmp_path)
    assert (model.weight == 3).all()
    assert found.progress.update == 3
    assert "update-00000006 is damaged" in found.notes[0]
    if name != "manifest.json":
        assert name in found.notes[0]
    again = write(tmp_path, 6, 7)  # the run comes by once more
    assert (read(tmp_path)[0].weight == 7).all()
    assert checkpoint.complete(tmp_path)[-1] == again


def test_a_whole_checkpoint_under_another_number_is_damage(tmp_path):
    write(tmp_path, 3, 3)
    write(tmp_path, 6, 6).rename(tmp_path / "update-00000009")
    model, found = read(tmp_path)
    assert (model.weight == 3).all()
    assert "is of update 6" in found.notes[0]


def test_the_best_weights_are_those_that_the_progress_names(tmp_path):
    model = nn.Linear(2, 2)
    digest = checkpoint.save_best(tmp_path, model.state_dict())
    progress = Progress(best={"update": 3, "sha256": digest})
    assert checkpoint.best_fits(tmp_path, progress)
    flip_a_bit(tmp_path / "best.safetensors")
    assert not checkpoint.best_fits(tmp_path, progress)
    with pytest.raises(UserError, match=r"best\.safetensors is damaged"):
        checkpoint.load_best(tmp_path, progress, model)


def test_progress_at_the_same_update_is_noted_without_writing_tensors_again(tmp_path):
    path = write(tmp_path, 3, 3)
    before = (path / "learner.safetensors").stat().st_ino
    for history in ([{"update": 3, "top1": 1.0}], [{"update": 3, "top1": 2.0}]):
        checkpoint.note(path, Progress(update=3, history=history))
        assert read(tmp_path)[1].progress.history == history
    assert (path / "learner.safetensors").stat().st_ino == before


def test_a_crash_after_any_operation_leaves_a_checkpoint_that_is_whole(tmp_path, crash_after):
    """Saving, noting a validation, finishing: never a damaged checkpoint, never an older one than before."""
    for operations in count():
        folder = tmp_path / f"{operations}"
        for update in (3, 6):
            write(folder, update, update)

        def act(folder=folder):
            path = write(folder, 9, 9)
            checkpoint.note(path, Progress(update=9, history=[{"update": 9}]))
            checkpoint.strip(folder)

        lived = crash_after(operations, act)
        repair(folder)
        model, found = read(folder)
        assert not found.notes, (operations, found.notes)
        assert found.progress.update in (6, 9)
        assert (model.weight == found.progress.update).all()
        act()
        assert [path.name for path in folder.iterdir()] == ["update-00000009"]
        assert not any(is_leftover(path.name) for path in folder.rglob("*"))
        if lived:
            break
    assert operations > 20


def test_a_crash_while_the_only_checkpoint_is_replaced_leaves_it_or_the_new_one(tmp_path, crash_after):
    for operations in count():
        folder = tmp_path / f"{operations}"
        write(folder, 9, 1, keep=1)
        lived = crash_after(operations, lambda folder=folder: write(folder, 9, 2, keep=1))
        repair(folder)
        model, found = read(folder)
        assert found and not found.notes, operations
        assert (model.weight == (2 if lived else model.weight[0, 0])).all()
        assert [path.name for path in folder.iterdir()] == ["update-00000009"]
        if lived:
            break
    assert operations > 10


def test_a_finished_run_keeps_the_newest_weights_and_no_optimizer(tmp_path):
    for update in (3, 6):
        write(tmp_path, update, update)
    checkpoint.strip(tmp_path)
    assert not list(tmp_path.rglob("*.pt"))
    assert not checkpoint.can_go_on(tmp_path)
    model, found = read(tmp_path)
    assert (model.weight == 6).all()
    assert found.states == {}
    assert not found.notes


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_a_damaged_manifest_does_not_stop_the_end_of_a_run(tmp_path, content):
    (write(tmp_path, 3, 3) / "manifest.json").write_text(content)
    checkpoint.strip(tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_all_unreadable_is_said(tmp_path):
    (write(tmp_path, 3, 3) / "learner.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read: .*learner.safetensors"):
        read(tmp_path)


def test_another_format_is_refused(tmp_path):
    path = write(tmp_path, 3, 3)
    content = json.loads((path / "progress.json").read_text())
    (path / "progress.json").write_text(json.dumps({**content, "format": 99}))
    write_manifest(path, FILES[:3])
    with pytest.raises(UserError, match="another checkpoint format"):
        read(tmp_path)


def test_weights_of_another_model_are_no_traceback(tmp_path):
    path = write(tmp_path, 3, 3)
    state = load_file(path / "learner.safetensors")
    save_file({"weight": state["weight"][:1]}, path / "learner.safetensors")
    write_manifest(path, FILES[:3])
    with pytest.raises(UserError, match="is of another model"):
        read(tmp_path)


def test_no_pickle_is_executed(tmp_path):
    write(tmp_path, 2, 2)
    path = write(tmp_path, 3, 3)
    torch.save({"step": Exploit()}, path / "optimizer.pt")
    write_manifest(path, FILES[:3])
    found = read(tmp_path)[1]
    assert found.progress.update == 2
    assert found.notes
    assert not Exploit.ran


class Exploit:
    ran = False

    def __reduce__(self):
        return (setattr, (Exploit, "ran", True))


@pytest.mark.parametrize("writer", ["save_file", "torch.save", "write_json", "write_manifest"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_refuses_keeps_the_last_good_one_and_names_it(tmp_path, monkeypatch, writer, number):
    good = write(tmp_path, 3, 3)

    def full(*_args, **_options):
        raise OSError(number, "refused")

    monkeypatch.setattr(*((torch, "save") if writer == "torch.save" else (checkpoint, writer)), full)
    with pytest.raises(UserError) as refused:
        write(tmp_path, 6, 6)
    assert "cannot write" in refused.value.message
    assert str(good) in refused.value.message
    assert refused.value.exit_code == 3
    assert [path.name for path in tmp_path.iterdir()] == [good.name]  # no half checkpoint is left


def test_room_for_a_checkpoint_is_looked_for_before_it_is_written(tmp_path, monkeypatch):
    good = write(tmp_path, 3, 3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    monkeypatch.setattr(checkpoint, "save_file", None)
    with pytest.raises(UserError, match=r"takes 0 MiB, and 0 MiB are free.*update-00000003") as refused:
        write(tmp_path, 6, 6)
    assert refused.value.exit_code == 3
    assert checkpoint.complete(tmp_path) == [good]


def test_a_deleted_folder_is_not_made_anew(tmp_path):
    write(tmp_path / "checkpoints", 3, 3)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="its folder is gone"):
        checkpoint.save(tmp_path / "checkpoints", Progress(update=6), {}, {}, keep=1)
    assert not list(tmp_path.iterdir())


def test_other_errors_keep_their_traceback(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "I/O error")))
    with pytest.raises(OSError, match="I/O error"):
        write(tmp_path, 6, 6)


def test_saving_after_an_unreadable_one_was_passed_over_keeps_what_was_saved(tmp_path):
    write(tmp_path, 3, 3)
    (write(tmp_path, 9, 9) / "progress.json").write_text("{}")
    saved = write(tmp_path, 6, 6, keep=1)
    assert checkpoint.complete(tmp_path) == [saved]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_others_may_read_what_the_umask_lets_them(tmp_path):
    before = os.umask(0o027)
    try:
        write(tmp_path, 1, value=1)
        checkpoint.save_best(tmp_path, nn.Linear(2, 2).state_dict())
    finally:
        os.umask(before)
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        assert file.stat().st_mode & 0o777 == 0o640, file
