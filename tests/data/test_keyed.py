"""Keyed randomness: the same pixels for any workers, processes and resumption; errors keep their hint."""

import pickle
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.images import ImageData, Images, Stream
from vitkd_cli.data.keyed import (
    BatchSampler,
    Keyed,
    TrainBatch,
    keyed_generators,
    stream_loader,
    train_loader,
    updates_per_epoch,
    val_loader,
)
from vitkd_cli.data.transforms import train_view, view_of
from vitkd_cli.errors import UserError


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return open_data(data="digits", shots=6)  # 60 training images


def keyed(digits: ImageData, **options: bool) -> Keyed:
    assert digits.train is not None
    return Keyed(digits.train, train_view((16, 16)), seed=42, **options)


def epoch(data: Keyed, workers: int = 0, start_update: int = 0, **options: int) -> list[TrainBatch]:
    sampler = BatchSampler(len(data), **{"batch_size": 8, "seed": 42, **options})  # type: ignore[arg-type]
    return list(train_loader(data, sampler.epoch(1, start_update), workers))


def by_position(batches: Iterable[TrainBatch]) -> dict[int, tuple[bytes, int]]:
    return {
        int(position): (image.numpy().tobytes(), int(label))
        for batch in batches
        for image, label, position in zip(batch.images, batch.labels, batch.positions, strict=True)
    }


# generators -----------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_generators_are_keyed_and_put_back() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = draws()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with keyed_generators(42, 0, 7):
        inside = draws()
    with pytest.raises(ZeroDivisionError), keyed_generators(1):
        draws()
        raise ZeroDivisionError
    assert draws() == expected
    keys = [(42, 0, 7), (42, 7, 0), (42, 0), (42, 0, 0), (42,), (-1,)]
    seen = []
    for key in keys:
        with keyed_generators(*key):
            seen.append(draws())
    assert seen[0] == inside and len(set(seen)) == len(keys)


def test_reading_an_image_leaves_the_generators_alone(digits: ImageData) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    batches = epoch(keyed(digits))
    assert batches[0].images.dtype == torch.uint8 and batches[0].images.shape == (8, 3, 16, 16)
    assert batches[0].labels.dtype == batches[0].positions.dtype == torch.int64
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_is_what_its_keys_give_one_by_one(digits: ImageData) -> None:
    data, keys = keyed(digits), [(0, 3, 5), (0, 4, 5), (1, 3, 5)]
    for together, alone in zip(data.__getitems__(keys), map(data.__getitem__, keys), strict=True):
        assert not isinstance(together, UserError) and not isinstance(alone, UserError)
        assert torch.equal(together[0], alone[0]) and together[1:] == alone[1:]


# one set of pixels ----------------------------------------------------------------------------------------


def test_workers_change_no_pixel(digits: ImageData) -> None:
    data = keyed(digits)
    none, one, two = (epoch(data, workers) for workers in (0, 1, 2))
    assert len(none) == 60 // 8
    for batch, *others in zip(none, one, two, strict=True):
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3], strict=True))


def test_processes_and_accumulation_change_no_pixel(digits: ImageData) -> None:
    data = keyed(digits)
    whole = by_position(epoch(data, batch_size=16))
    assert len(whole) == 48
    ranks = [epoch(data, batch_size=4, world=2, accum=2, rank=rank) for rank in (0, 1)]
    assert by_position([*ranks[0], *ranks[1]]) == whole
    assert [len(batches) for batches in ranks] == [6, 6]


def test_resuming_gives_the_same_tail(digits: ImageData) -> None:
    data = keyed(digits)
    whole = epoch(data, batch_size=4, accum=2)
    tail = epoch(data, batch_size=4, accum=2, start_update=5)
    assert len(whole) == 14 and len(tail) == 4
    for batch, other in zip(whole[10:], tail, strict=True):
        assert torch.equal(batch.images, other.images) and torch.equal(batch.positions, other.positions)
    assert epoch(data, batch_size=4, start_update=99) == []


def test_epochs_and_seeds_differ(digits: ImageData) -> None:
    data = keyed(digits)
    orders = [BatchSampler(60, 8, seed=seed).order(number) for seed, number in ((42, 0), (42, 1), (43, 0))]
    assert len(set(map(tuple, orders))) == 3
    assert orders[0] == BatchSampler(60, 8, seed=42).order(0)
    first, again = data[(0, 3, 5)], data[(0, 3, 5)]
    moved = data[(0, 4, 5)]
    assert (
        not isinstance(first, UserError)
        and not isinstance(again, UserError)
        and not isinstance(moved, UserError)
    )
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], moved[0])


# the sampler ----------------------------------------------------------------------------------------------


def test_an_epoch_shows_each_image_once_and_drops_the_rest() -> None:
    keys = [key for batch in BatchSampler(21, 4, seed=0).epoch(2) for key in batch]
    assert len(keys) == 20 and len({index for _, _, index in keys}) == 20
    assert {number for number, _, _ in keys} == {2}
    assert [position for _, position, _ in keys] == list(range(20))
    assert updates_per_epoch(21, 4) == 5


@pytest.mark.parametrize(("batch_size", "accum", "world"), [(2, 3, 2), (4, 1, 3), (6, 2, 1)])
def test_pairs_are_mirrored(batch_size: int, accum: int, world: int) -> None:
    size = batch_size * accum * world
    seen = []
    for rank in range(world):
        sampler = BatchSampler(3 * size, batch_size, accum=accum, world=world, rank=rank, seed=0)
        batches = list(sampler.epoch(0))
        assert len(batches) == sampler.updates * accum == 3 * accum
        for step, batch in enumerate(batches):
            rows = [position % size for _, position, _ in batch]
            assert {position // size for _, position, _ in batch} == {step // accum}
            assert [size - 1 - row for row in rows] == rows[::-1]
            seen += [position for _, position, _ in batch]
    assert sorted(seen) == list(range(3 * size))


def test_plain_order_is_contiguous() -> None:
    sampler = BatchSampler(12, 3, world=2, rank=1, seed=0, mirrored=False)
    assert [[position for _, position, _ in batch] for batch in sampler.epoch(0)] == [[3, 4, 5], [9, 10, 11]]


def test_repeated_augmentation(digits: ImageData) -> None:
    keys = [key for batch in BatchSampler(60, 10, seed=0, aug_repeats=3).epoch(0) for key in batch]
    assert len(keys) == 60  # an epoch is no longer
    assert set(Counter(index for _, _, index in keys).values()) == {3}
    data = keyed(digits)
    views = [data[key] for key in keys[:3]]
    assert len({view[0].numpy().tobytes() for view in views if not isinstance(view, UserError)}) == 3


@pytest.mark.parametrize(
    ("length", "options", "message", "hint"),
    [
        (
            20,
            {"batch_size": 8, "world": 2, "accum": 2},
            "20 training images are fewer than .* 32",
            "--batch-size 4, or --global-batch 16 where that is set",
        ),
        (
            7,
            {"batch_size": 9, "mirrored": False},
            "7 training images are fewer than .* 9",
            "--batch-size 7, or",
        ),
        (3, {"batch_size": 2, "world": 4}, "3 training images", "use fewer processes or"),
        (
            20,
            {"batch_size": 5},
            "batch_size is 5: mixup and cutmix mix images in pairs",
            "--mixup 0 --cutmix 0",
        ),
    ],
)
def test_impossible_batches(length: int, options: dict[str, int], message: str, hint: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        BatchSampler(length, seed=0, **options)  # type: ignore[arg-type]
    assert hint in caught.value.hint


# evaluation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "workers"), [(1, 0), (3, 0), (2, 2)])
def test_evaluation_is_sample_exact(digits: ImageData, world: int, workers: int) -> None:
    assert digits.val is not None
    seen: list[int] = []
    for rank in range(world):
        loader = val_loader(
            digits.val, view_of({"input_size": (3, 8, 8)}), 64, rank=rank, world=world, workers=workers
        )
        for images, labels, indices in loader:
            assert images.dtype == torch.uint8 and len(images) == len(labels) == len(indices)
            assert labels.tolist() == [digits.val.labels()[index] for index in indices]
            seen += indices.tolist()
        assert set(seen[-3:]) <= set(range(rank, 500, world))
    assert sorted(seen) == list(range(500))


# broken images --------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        for index in range(6):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            noise = np.random.RandomState(index).randint(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{index}.jpg")
    whole = (tmp_path / "a" / "2.jpg").read_bytes()
    (tmp_path / "a" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "5.jpg").write_text("no image at all")
    return tmp_path


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_ends_training_with_its_path(broken: Path, workers: int) -> None:
    train = open_data(data=str(broken), val_fraction=0).train
    assert train is not None
    with pytest.raises(UserError) as caught:
        epoch(Keyed(train, train_view((16, 16)), 0), workers, batch_size=12)
    error = caught.value
    assert error.message.startswith("cannot read image ") and error.message.count("\n") == 0
    assert str(broken / "a" / "2.jpg") in error.message or str(broken / "b" / "5.jpg") in error.message
    assert error.hint == "repair or delete it, or pass --skip-corrupt" and error.exit_code == 3


def test_the_reason_is_named(broken: Path) -> None:
    train = open_data(data=str(broken), val_fraction=0).train
    assert train is not None
    with pytest.raises(UserError, match=r"a/2\.jpg: (?i:.*truncated)"):
        train[2]
    with pytest.raises(UserError, match=r"b/5\.jpg: not a picture"):
        train[11]


@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_reported(broken: Path, workers: int) -> None:
    train = open_data(data=str(broken), val_fraction=0).train
    assert train is not None
    batches = epoch(Keyed(train, train_view((16, 16)), 0, skip_corrupt=True), workers, batch_size=4)
    skipped = sorted(path for batch in batches for path in batch.skipped)
    assert skipped == [str(broken / "a" / "2.jpg"), str(broken / "b" / "5.jpg")]
    labels = Counter(label for batch in batches for label in batch.labels.tolist())
    assert labels == {0: 6, 1: 6}  # others of the same class stand in


def test_a_class_without_readable_images_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.jpg").write_text("no image")
    train = open_data(data=str(tmp_path), val_fraction=0).train
    assert train is not None
    with pytest.raises(UserError, match=r"no image of the class of .*0\.jpg can be read"):
        epoch(Keyed(train, train_view((16, 16)), 0, skip_corrupt=True), batch_size=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_never_substitutes(broken: Path, workers: int) -> None:
    train = open_data(data=str(broken), val_fraction=0).train
    assert train is not None
    with pytest.raises(UserError) as caught:
        list(val_loader(train, view_of({"input_size": (3, 16, 16)}), 4, workers=workers))
    assert "2.jpg" in caught.value.message and caught.value.hint == "repair or delete it"


def test_everything_travels_to_a_spawned_worker(digits: ImageData) -> None:
    data = keyed(digits)
    copy = pickle.loads(pickle.dumps(data))
    first, second = data[(0, 1, 2)], copy[(0, 1, 2)]
    assert not isinstance(first, UserError) and torch.equal(first[0], second[0])


# streams --------------------------------------------------------------------------------------------------


class Shards:
    """A stream as timm's readers are: every worker reads its own shards, here 3, 1 and no images long."""

    def __iter__(self) -> Iterable[tuple[Image.Image, int]]:
        worker = torch.utils.data.get_worker_info()
        for index in (range(3), range(3, 4), range(0))[worker.id] if worker else range(4):
            yield Image.new("RGB", (8, 8)), index

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("workers", [0, 3])
def test_no_two_images_of_a_stream_share_an_index(workers: int) -> None:
    batches = list(val_loader(Stream(Shards(), "s"), view_of({"input_size": (3, 8, 8)}), 2, workers=workers))
    labels = [label for batch in batches for label in batch.labels.tolist()]
    indices = [index for batch in batches for index in batch.indices.tolist()]
    assert sorted(labels) == [0, 1, 2, 3] and len(set(indices)) == 4


class Counted(Shards):
    """A stream that says how long it is and shows what was read of it."""

    def __init__(self, length: int, stored: int) -> None:
        self.length, self.stored, self.read = length, stored, 0

    def __iter__(self) -> Iterable[tuple[Image.Image, int]]:
        for index in range(self.stored):
            self.read += 1
            yield Image.new("RGB", (8, 8)), index

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None: ...

    def set_loader_cfg(self, num_workers: int) -> None: ...


def test_an_epoch_of_a_stream_reads_what_it_shows() -> None:
    stream = Counted(length=13, stored=13)
    images, view = Stream(stream, "s"), train_view((8, 8))
    batches = list(stream_loader(images, view, 2, epoch=0, accum=2))
    assert [batch.positions.tolist() for batch in batches] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
        [8, 9],
        [10, 11],
    ]
    assert stream.read == 12
    resumed = list(stream_loader(images, view, 2, epoch=0, accum=2, start_update=2))
    assert [batch.positions.tolist() for batch in resumed] == [[8, 9], [10, 11]]


def test_a_stream_that_ends_early_is_told_of() -> None:
    images = Stream(Counted(length=13, stored=5), "s")
    with pytest.raises(UserError, match="the data ended before its epoch did"):
        list(stream_loader(images, train_view((8, 8)), 2, epoch=0))


def test_a_bug_in_the_loop_ends_the_process(tmp_path: Path) -> None:
    script = tmp_path / "loop.py"
    script.write_text(
        "from vitkd_cli.data.datasets import open_data\n"
        "from vitkd_cli.data.keyed import BatchSampler, Keyed, train_loader\n"
        "from vitkd_cli.data.transforms import train_view\n"
        "def train():\n"
        "    images = open_data(data='digits').train\n"
        "    keys = BatchSampler(len(images), 4, seed=0).epoch(0)\n"
        "    batches = iter(train_loader(Keyed(images, train_view((8, 8)), 0), keys, workers=1))\n"
        "    next(batches)\n"
        "    raise RuntimeError('a bug')\n"
        "train()\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a bug\n")


def test_the_next_of_a_class_stands_in_then_the_first():
    keyed = Keyed(Images(range(6), [0, 1, 0, 2, 1, 0]), train_view((16, 16)), 0)
    assert [list(keyed._others(index)) for index in (0, 2, 5, 3, 4)] == [[2, 5], [5, 0], [0, 2], [], [1]]
