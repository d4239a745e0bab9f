"""A cached teacher says what the live one says, whatever happened while the cache was written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import count
from pathlib import Path

import pytest
import torch
from heard import Heard
from safetensors.torch import load_file

from vitkd_cli import Recipe, UserError, distill
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images
from vitkd_cli.evaluation.cache import digest_in_order, digest_of_images
from vitkd_cli.progress import Reporter
from vitkd_cli.training import cache as caches
from vitkd_cli.training import run as run_of
from vitkd_cli.training.cached import CachedTeacher
from vitkd_cli.training.folder import sole_writer
from vitkd_cli.training.learner import Learner, Teacher


def test_the_views_of_the_cached_epochs_come_again(tiny, tmp_path, monkeypatch):
    seen, real = [], Learner.forward

    def forward(self, images, signals, batch):
        if len(images) == 20:  # rehearsals have fewer
            seen.append((images.clone(), batch.targets, batch.generator.initial_seed()))
        return real(self, images, signals, batch)

    monkeypatch.setattr(Learner, "forward", forward)
    values = {**tiny, "teacher": None, "loss": "labels", "steps": 12, "epochs": 3, "cached_epochs": 2}
    distill(Recipe(**values, output=str(tmp_path / "run")), reporter=Reporter(silent=True))
    assert len(seen) == 12  # five updates an epoch
    for update, (images, targets, masks) in enumerate(seen):
        for earlier in range(update):
            again = update - earlier == 10
            assert torch.equal(images, seen[earlier][0]) is again
            assert torch.equal(targets, seen[earlier][1]) is again
            assert masks != seen[earlier][2]


def test_views_cannot_come_again_in_another_mixing():
    with pytest.raises(UserError, match="mixed before epoch 5"):
        Recipe(epochs=10, cached_epochs=2, mixup_off_epoch=5)
    Recipe(epochs=10, cached_epochs=10, mixup_off_epoch=5)


POOLED = "img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3,global_pool=avg,fc_norm=False"

# A run of twelve updates, five an epoch, that reads features and logits.
SHORT = {"epochs": 3, "steps": 12, "recovery_interval": 4, "val_interval": 3}


@pytest.fixture(scope="module")
def train(tiny, tmp_path_factory):
    """Train, with or without a cache: the student's weights, and what was said."""

    def run(cache: Path | None = None, resume: bool = False, **changes):
        heard = Heard()
        place = {"teacher_cache": str(cache)} if cache else {}
        place["output"] = str(tmp_path_factory.mktemp("cached") / "run")
        values = {**tiny, **SHORT, **place, **changes}
        if resume:
            distill(resume=values["output"], reporter=heard)
        else:
            distill(Recipe(**values), reporter=heard)
        return load_file(Path(values["output"], "student", "model.safetensors")), "\n".join(heard.lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_of, "images_per_second", lambda *_: (1.0, 1))  # seconds
        yield run


@pytest.fixture(scope="module")
def live(train):
    """What a live teacher makes of the student."""
    return train()[0]


@pytest.fixture(scope="module")
def filled(train, live, tmp_path_factory) -> Path:
    """A cache that a run has filled."""
    place = tmp_path_factory.mktemp("filled") / "cache"
    weights, said = train(place)
    assert_same(weights, live)
    assert "of 0 updates were read, those of 12 computed" in said
    return place


@pytest.fixture
def copied(filled, tmp_path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "cache"))


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def shards_in(place: Path) -> list[str]:
    return sorted(str(file.relative_to(place)) for file in place.rglob("[!.]*.safetensors"))


def test_a_cached_teacher_trains_as_a_live_one(train, live, filled, monkeypatch):
    before = shards_in(filled)
    assert len(before) == 4 * 5  # of logits and three layers; an epoch ends a shard, and so does a checkpoint
    asked = []
    monkeypatch.setattr(Teacher, "__call__", watched(Teacher.__call__, asked))
    weights, said = train(filled)
    assert_same(weights, live)
    assert "of 12 updates were read, those of 0 computed" in said
    assert "3 updates of it are as the teacher says them" in said
    assert max(asked) <= 8 and shards_in(filled) == before


def watched(real, asked):
    def call(self, images):
        asked.append(len(images))
        return real(self, images)

    return call


@pytest.mark.slow
def test_steps_of_accumulation_share_a_cache(train, filled):
    _, said = train(filled, batch_size=10, grad_accum_steps=2)
    assert "of 12 updates were read, those of 0 computed" in said


def test_what_is_damaged_or_gone_is_named_and_made_anew(train, live, filled, copied):
    before = shards_in(copied)
    damaged, gone, foreign = (copied / before[index] for index in (0, 7, 12))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    gone.unlink()
    shutil.copy(copied / before[13], foreign)
    weights, said = train(copied)
    assert_same(weights, live)
    assert f"{damaged} does not have the content that was written" in said
    assert f"{foreign} is of another cache" in said
    assert shards_in(copied) == before
    assert all((copied / name).read_bytes() == (filled / name).read_bytes() for name in before)


def test_a_kill_loses_the_shard_that_was_written(train, live, tmp_path, at_step, monkeypatch):
    place, output = tmp_path / "cache", str(tmp_path / "run")

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    at_step(8, kill)
    with monkeypatch.context() as patch:
        # Nothing is tidied up.
        patch.setattr(CachedTeacher, "__exit__", lambda self, *exc: self._lock.close())
        with pytest.raises(Killed):
            train(place, output=output)
    left = list(place.rglob(".part-*"))
    assert len(left) == 4 and len(shards_in(place)) == 2 * 4
    weights, said = train(resume=True, output=output)
    assert_same(weights, live)
    assert "going on after update 4" in said and not list(place.rglob(".part-*"))
    assert len(shards_in(place)) == 4 * 5


def test_a_run_goes_on_without_the_disk_of_its_cache(train, live, filled, copied, at_step, monkeypatch):
    for name in shards_in(copied)[-8:]:
        (copied / name).unlink()
    output = str(copied.parent / "run")

    def stop():
        raise UserError("stopped", "go on")

    at_step(8, stop)
    with pytest.raises(UserError, match="stopped"):
        train(copied, output=output)
    plans = []
    for machine in ({}, {"teacher_cache": "off"}):
        silent = Reporter(silent=True)
        distill(resume=output, dry_run=True, machine=machine, show_plan=plans.append, reporter=silent)
    [left], none = plans[0].caches, plans[1].caches
    assert (left.done, left.needed) == (4, 8 * left.bytes) and not none
    before = shards_in(copied)
    monkeypatch.setattr(caches, "free_bytes", lambda place: 0)
    weights, said = train(resume=True, output=output)
    assert_same(weights, live)
    assert "0 B are free: the run reads what is there, and runs the teacher for the rest" in said
    assert shards_in(copied) == before


@pytest.mark.slow
def test_a_second_run_on_a_cache_computes_what_is_not_there(train, live, copied):
    for name in shards_in(copied)[2:]:
        (copied / name).unlink()
    [folder] = copied.iterdir()
    with sole_writer(folder, 0, print):
        weights, said = train(copied)
    assert_same(weights, live)
    assert f"{folder} is in use by process" in said
    assert "this run reads what is there, and runs the teacher for the rest" in said
    assert len(shards_in(copied)) == 2


@pytest.mark.parametrize(
    ("act", "left", "number", "told"),
    [
        ("posix_fallocate", 6, errno.ENOSPC, "the disk is full"),
        ("pwrite", 22, errno.EIO, ": input/output error;"),
    ],
)
def test_a_disk_that_fails_ends_the_cache_and_not_the_training(
    train, live, tmp_path, monkeypatch, act, left, number, told
):
    real, calls = getattr(os, act), count()

    def failing(*asked):
        if next(calls) >= left:  # in the middle of the second shard
            raise OSError(number, os.strerror(number))
        return real(*asked)

    monkeypatch.setattr(os, act, failing)
    place = tmp_path / "cache"
    weights, said = train(place)
    assert_same(weights, live)
    assert told in said and "keeps no more of what the teacher says" in said
    assert len(shards_in(place)) == 4 and not list(place.rglob(".part-*"))


@pytest.mark.slow
def test_a_formula_that_reads_more_adds_it(train, tmp_path):
    """In two bytes, too, a run that fills a cache trains as one that reads it; so with a second view."""
    more = "labels + kd + features + relations(blocks=-1)"
    short = {"epochs": 1, "steps": 5, "cache_dtype": "fp16"}
    train(tmp_path, loss="labels + kd", **short)
    added, said = train(tmp_path, loss=more, **short)
    assert "qkv(2) in fp16: off by" in said and "logits in" not in said
    read, said = train(tmp_path, loss=more, **short)
    assert "of 5 updates were read, those of 0 computed" in said
    assert_same(read, added)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"mixup": 0.3}, "mixup 0.8 there, 0.3 here"),
        ({"batch_size": 10}, "images an update 20 there, 10 here"),
        ({"view_seed": 1}, "view seed 42 there, 1 here"),
        ({"cache_dtype": "bf16"}, "cache_dtype exact there, bf16 here"),
        ({"teacher_kwargs": f"{POOLED},num_classes=10"}, "other layers of the teacher"),
        ({"shots": 9}, "other images .files, sizes or times."),
    ],
)
def test_a_cache_of_something_else_is_refused(tiny, filled, tmp_path, changes, told):
    recipe = Recipe(**{**tiny, **SHORT, **changes}, teacher_cache=str(filled), output=str(tmp_path / "run"))
    with pytest.raises(UserError, match=told):
        distill(recipe, dry_run=True, reporter=Reporter(silent=True))


@pytest.mark.slow
def test_arms_with_teachers_that_the_run_fine_tunes_go_on(train, tmp_path):
    tuned = {"finetune_teacher": 1, "against": ("finetune-teacher=2; name=longer",), "loss": "labels + kd"}
    own = {"output": str(tmp_path / "run"), "steps": 3}
    before, _ = train(tmp_path / "cache", **tuned, **own)
    for name in ("run.json", "arms/longer-42/result.json"):
        (tmp_path / "run" / name).unlink()
    train(resume=True, **own)
    after, said = train(tmp_path / "cache", **{**tuned, **own, "output": str(tmp_path / "again")})
    assert said.count("of 3 updates were read, those of 0 computed") == 2
    assert_same(before, after)


def test_what_is_read_all_the_same_is_no_fact(tiny, filled, tmp_path):
    changes = {"skip_corrupt": True, "max_pixels": 10**6}
    recipe = Recipe(**{**tiny, **SHORT, **changes}, teacher_cache=str(filled), output=str(tmp_path / "run"))
    distill(recipe, dry_run=True, reporter=Reporter(silent=True))
    [facts] = filled.glob("*/cache.json")
    assert json.loads(facts.read_bytes())["facts"]["data"] == "digits"  # whose images are numbers


def test_the_order_of_files_is_a_fact():
    names, labels = [f"{number}.png" for number in range(3000)], [0] * 3000
    before = Images(names, labels)
    names[1], names[2] = names[2], names[1]
    after = Images(names, labels)
    assert digest_of_images(before, Decoding()) == digest_of_images(after, Decoding())
    assert digest_in_order(before) != digest_in_order(after)
    assert digest_in_order(before) == digest_in_order(before.subset(range(3000)))


def test_what_a_cache_cannot_hold_is_refused():
    with pytest.raises(UserError, match="each of the 2 seeds has views of its own"):
        Recipe(teacher_cache="cache", seeds=2)
    Recipe(teacher_cache="cache", seeds=2, view_seed=1)


def test_a_dry_run_says_what_a_cache_takes(tiny, flags, cli, tmp_path):
    values = {**tiny, **SHORT, "teacher_cache": tmp_path / "cache", "against": "labels + kd"}
    code, out, err = cli("distill", *flags(values), "--output", str(tmp_path / "run"), "--dry-run")
    assert code == 0, err
    assert "9.04 KiB an image (features(0) 3 KiB, features(1) 3 KiB, final 3 KiB, logits 40 B)" in out
    assert "2.12 MiB for 2.4 epochs" in out and not (tmp_path / "cache").exists()
    values["teacher_cache"] = tmp_path / "run" / "cache"
    code, _, err = cli("distill", *flags(values), "--output", str(tmp_path / "run"), "--dry-run")
    assert code == 2 and "is in the run's own folder" in err
    values["teacher_cache"] = tmp_path / "a file"
    values["teacher_cache"].touch()
    code, _, err = cli("distill", *flags(values), "--output", str(tmp_path / "run"), "--dry-run")
    assert code == 2 and "a file is no folder" in err


@pytest.mark.slow
def test_processes_share_a_cache(train, flags, tiny, tmp_path):
    """Two processes with a live and with a cached teacher; what they wrote, one can read."""
    two = {"num_processes": 2, "batch_size": 10}
    alone, _ = train(**two)
    wrote, _ = train(tmp_path / "cache", **two)
    read, _ = train(tmp_path / "cache", **two)
    assert_same(alone, wrote)
    assert_same(alone, read)
    _, said = train(tmp_path / "cache")
    assert "of 12 updates were read, those of 0 computed" in said
