"""Shards of a cache: written by several, cut short, and never used unless they are what was written."""

from __future__ import annotations

import dataclasses
import errno
import re

import pytest
import torch

from vitkd_cli import UserError
from vitkd_cli.files import part_of
from vitkd_cli.text import in_bytes
from vitkd_cli.training import cache as caches
from vitkd_cli.training import shards
from vitkd_cli.training.cache import WEIGHTS, Cache, check_disk, together, what_differs
from vitkd_cli.training.shards import Shard, Signal, Span
from vitkd_cli.vit.taps import LOGITS, features

SIGNAL = Signal((6, 2, 3), torch.bfloat16)
ABOUT = {"cache": "one"}


@pytest.fixture
def shard(tmp_path):
    """Two of three updates of six rows, which two processes wrote in mirrored halves."""
    values = torch.randn(2, 6, 2, 3).bfloat16()
    span = Span(4, 10, 12)
    part, path = part_of(tmp_path / "whatever"), tmp_path / span.file
    shards.reserve(part, 3 * SIGNAL.bytes)
    writers = [Shard(part, SIGNAL, 10) for _ in range(2)]
    for update in (10, 11):
        for writer, rows in zip(writers, ([0, 5, 1], [2, 3, 4]), strict=True):
            writer.write(update, torch.tensor(rows), values[update - 10, rows])
    writers[0].seal(path, 2, ABOUT)
    for writer in writers:
        writer.close()
    return path, span, values


def test_every_row_comes_back(shard, tmp_path):
    path, span, values = shard
    assert torch.equal(shards.mapped(path), values)
    assert not shards.wrong_with(path, span, SIGNAL, ABOUT)
    assert shards.spans(tmp_path) == [span] and [file.name for file in tmp_path.iterdir()] == [span.file]
    assert shards.spans(tmp_path, 4) == [span] and shards.spans(tmp_path, 40) == []
    assert span.holds(4, 11) and not span.holds(4, 12) and not span.holds(3, 11)
    assert path.stat().st_size == 4096 + 2 * SIGNAL.bytes


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (lambda content: content[:-1], "is no shard"),
        (lambda content: content[:4100] + b"!" + content[4101:], "does not have the content"),
        (lambda content: content.replace(b'"one"', b'"two"'), "of another cache"),
        (lambda content: b"", "is no shard"),
    ],
)
def test_a_damaged_shard_is_told(shard, harm, told):
    path, span, _ = shard
    path.write_bytes(harm(path.read_bytes()))
    assert told in shards.wrong_with(path, span, SIGNAL, ABOUT)


def test_a_shard_of_other_updates_or_another_type_is_told(shard):
    path, span, _ = shard
    assert "shape" in shards.wrong_with(path, Span(4, 10, 13), SIGNAL, ABOUT)
    other = dataclasses.replace(SIGNAL, dtype=torch.float16)
    assert "type" in shards.wrong_with(path, span, other, ABOUT)
    path.unlink()
    assert shards.wrong_with(path, span, SIGNAL, ABOUT) == "cannot be read"


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shards.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        shards.reserve(tmp_path / "part", 10)


@pytest.fixture
def cache(tmp_path) -> Cache:
    facts = {"mixup": 0.8, "weights of the teacher": "a" * 64, "scale": [0.08, 1.0], "cache_dtype": "exact"}
    kept = {LOGITS: Signal((10, 1000), torch.float32), features(0): Signal((10, 196, 384), torch.float32)}
    return Cache(tmp_path, "big-224x224", facts, kept, per_epoch=50, updates=120)


def test_what_a_cache_takes_is_told_and_refused(cache, monkeypatch):
    assert cache.needed == 120 * 10 * 4 * (1000 + 196 * 384)
    monkeypatch.setattr(caches, "free_bytes", lambda path: 2**28)
    assert str(cache).startswith("298 KiB an image (logits 3.91 KiB, features(0) 294 KiB), 349 MiB for 2.4")
    with pytest.raises(UserError, match="takes 349 MiB more, and 256 MiB are free") as refused:
        check_disk([cache])
    assert "--cached-epochs 1 fits" in refused.value.hint and "fp16" in refused.value.hint
    for tap, signal in cache.signals.items():  # what is there is not needed again
        folder = shards.folder_of(cache.folder, tap)
        shards.reserve(folder / Span(1, 0, 50).file, signal.bytes)
    assert cache.stored == cache.needed * 50 // 120
    check_disk([cache])


def test_a_cache_that_a_gpu_would_overtake_is_told(cache):
    assert "logits alone" in cache.odd("cuda")[0] and cache.odd("cpu") == []
    assert dataclasses.replace(cache, signals={LOGITS: SIGNAL}).odd("cuda") == []


def test_a_cache_is_not_that_of_other_views(cache):
    other = dataclasses.replace(cache, facts={**cache.facts, "mixup": 0.3})
    assert other.folder != cache.folder
    cache.begin()
    other.check_others()  # nothing is in it yet
    shards.reserve(shards.folder_of(cache.folder, LOGITS) / Span(0, 0, 5).file, 10)
    with pytest.raises(UserError, match=re.escape("mixup 0.8 there, 0.3 here")):
        other.check_others()
    cache.check_others()
    dataclasses.replace(other, teacher="small-224x224").check_others()
    with pytest.raises(UserError, match="in the arm two is no use to one: mixup"):
        together({"one": cache, "two": other})


def test_weights_tell_teachers_of_one_name_apart(cache):
    shards.reserve(shards.folder_of(cache.folder, LOGITS) / Span(0, 0, 5).file, 10)
    cache.begin()
    retrained = dataclasses.replace(cache, facts={**cache.facts, "mixup": 0.3, WEIGHTS: "b" * 64})
    retrained.check_others()
    assert "KiB of big-224x224 with other weights" in retrained.odd("cpu")[0]
    assert len(together({"one": cache, "two": retrained})) == 2
    pending = [dataclasses.replace(cache, tuned_in=folder) for folder in ("teacher", "arms/two-teacher")]
    assert len(together(dict(zip("ab", pending, strict=True)))) == 2  # each will have weights of its own
    other = dataclasses.replace(pending[0], facts={**cache.facts, "mixup": 0.3})
    other.check_others()
    assert not other.odd("cpu")


def test_arms_share_a_cache(cache):
    more = dataclasses.replace(cache, signals={features(3): SIGNAL}, updates=10)
    [both] = together({"one": cache, "two": more})
    assert both.signals.keys() == {LOGITS, features(0), features(3)} and both.updates == 120


def test_sizes_and_differences_read_well():
    assert [in_bytes(count) for count in (4, 4000, 2**20, 579e9)] == ["4 B", "3.91 KiB", "1 MiB", "539.2 GiB"]
    assert what_differs({"a": [1, 2]}, {"a": [1, 3], "b": 1}) == "a 1,2 there, 1,3 here, b None there, 1 here"
