"""Cached images: the pixels that decoding gives; nothing half-written, damaged or out of date among them."""

import errno
import os
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from photographs import photo, saved, views

from vitkd_cli.data import decoded
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.decoded import cached, fill
from vitkd_cli.data.images import Images, UnreadableImage
from vitkd_cli.data.keyed import BatchSampler, Keyed, train_loader
from vitkd_cli.data.pixels import decoded_fast
from vitkd_cli.data.transforms import train_view
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Augmentation, Recipe

PLAIN = Augmentation(aa="none")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Images:
    """Five images, in shards of two."""
    monkeypatch.setattr(decoded, "SHARD", 2)
    monkeypatch.setattr(decoded, "_verified", set())
    for index in range(5):
        saved(tmp_path / "photos" / str(index % 2), f"{index}.{'png' if index == 3 else 'jpg'}", photo(index))
    return opened(tmp_path)


def opened(tmp_path: Path) -> Images:
    train = open_data(data=str(tmp_path / "photos"), val_fraction=0).train
    assert isinstance(train, Images)
    return train


def filled(images: Images, place: Path | str, side: int | None = None) -> tuple[Images, str, list[str]]:
    told: list[str] = []
    decoded._verified.clear()  # as another process would find it
    line = fill(images, str(place), side, say=told.append)
    return cached(images, str(place), side), line, told


@pytest.mark.parametrize("fast", [False, True])
def test_views_are_those_of_the_files(photos: Images, tmp_path: Path, fast: bool) -> None:
    images = decoded_fast(photos) if fast else photos
    assert isinstance(images, Images)
    kept, line, told = filled(images, tmp_path / "cache")
    assert "5 images decoded" in line and "0 of 3 shards were there" in line and told == []
    expected = views(images, PLAIN)
    if fast:  # a cropped PNG is torch's, too: Pillow's within a grey level
        assert ((views(kept, PLAIN).int() - expected.int()).abs() <= 1).float().mean() > 0.99
        assert torch.equal(views(kept, PLAIN)[:3], expected[:3])
    else:
        assert torch.equal(views(kept, PLAIN), expected)
    data = Keyed(pickle.loads(pickle.dumps(kept)), train_view((64, 64), PLAIN), seed=3)
    keys = list(BatchSampler(5, 2, seed=0).epoch(0))
    none, two = (list(train_loader(data, iter(keys), workers)) for workers in (0, 2))
    assert all(torch.equal(a.images, b.images) for a, b in zip(none, two, strict=True))
    assert [kept.path(i) for i in range(5)] == [images.path(i) for i in range(5)]
    _, line, told = filled(images, tmp_path / "cache")
    assert "3 of 3 shards were there" in line and told == []


def test_a_changed_image_has_a_new_shard(photos: Images, tmp_path: Path) -> None:
    filled(photos, tmp_path / "cache")
    Path(photos.path(0)).unlink()
    saved(Path(photos.path(0)).parent, Path(photos.path(0)).name, photo(77))
    kept, line, _ = filled(photos, tmp_path / "cache")
    assert "2 of 3 shards were there" in line and "of other images or settings" in line
    assert torch.equal(views(kept, PLAIN), views(photos, PLAIN))


@pytest.mark.parametrize("damage", ["byte", "cut", "empty", "gone"])
def test_a_damaged_shard_is_named_and_made_anew(photos: Images, tmp_path: Path, damage: str) -> None:
    kept, _, _ = filled(photos, tmp_path / "cache")
    shard = kept.open.paths[1]  # type: ignore[attr-defined]
    whole = shard.read_bytes()
    other = whole[:-7] + bytes([whole[-7] ^ 1]) + whole[-6:]
    shard.write_bytes({"byte": other, "cut": whole[:-100], "empty": b"", "gone": b""}[damage])
    (tmp_path / "cache" / f".part-{shard.name}").write_bytes(whole[:50])  # of a run that was killed
    if damage == "gone":
        shard.unlink()
    kept, line, told = filled(photos, tmp_path / "cache")
    assert "2 of 3 shards were there" in line and shard.read_bytes() == whole
    assert len(told) == (damage != "gone") and all(str(shard) in text for text in told)
    assert not list((tmp_path / "cache").glob(".part-*"))
    shard.unlink()  # under a run that uses the cache: the file itself is read
    assert torch.equal(views(kept, PLAIN), views(photos, PLAIN))


def test_what_does_not_fit_is_refused_with_numbers(
    photos: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    line = decoded.planned(photos, str(cache))
    assert re.search(r"5 images decoded take about [\d.]+ KiB more, and .* are free; 0 of 3 shards", line)
    with monkeypatch.context() as patch:
        patch.setattr(decoded, "free_bytes", lambda place: 100_000)
        for act in (filled, lambda images, place: decoded.planned(images, str(place))):
            with pytest.raises(
                UserError, match=r"5 images take about [\d.]+ KiB, and 97.7 KiB are free in .*cache"
            ) as caught:
                act(photos, cache)
            assert "--cache-side 256" in caught.value.hint
    filled(photos, cache)
    assert "take nothing more; 3 of 3 shards are there" in decoded.planned(photos, str(cache))
    shutil.rmtree(cache)


def test_a_full_disk_keeps_whole_shards(
    photos: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, wrote = decoded.save_file, []

    def full(tensors: object, path: Path, metadata: object) -> None:
        write(tensors, path, metadata)
        if wrote:
            raise OSError(errno.ENOSPC, "No space left on device")
        wrote.append(path)

    monkeypatch.setattr(decoded, "save_file", full)
    monkeypatch.setattr(decoded, "cores", lambda: 1)
    with pytest.raises(UserError, match="the disk is full"):
        filled(photos, tmp_path / "cache")
    assert len([*(tmp_path / "cache").iterdir()]) == 2  # a shard, and the lock
    monkeypatch.setattr(decoded, "save_file", write)
    _, line, _ = filled(photos, tmp_path / "cache")
    assert "1 of 3 shards were there" in line


def test_an_image_that_cannot_be_read_says_so_as_ever(photos: Images, tmp_path: Path) -> None:
    Path(photos.path(2)).write_bytes(b"no image")
    kept, _, _ = filled(photos, tmp_path / "cache")
    with pytest.raises(UnreadableImage, match=f"cannot read image {photos.path(2)}: not a picture"):
        kept[2]
    data = Keyed(kept, train_view((32, 32), PLAIN), seed=0, skip_corrupt=True)
    assert data[(0, 0, 2)][3] == photos.path(2)  # type: ignore[index]


def test_smaller_copies_take_the_same_crops(photos: Images, tmp_path: Path) -> None:
    images = decoded_fast(photos)
    assert isinstance(images, Images)
    kept, _, _ = filled(images, tmp_path / "cache", side=80)
    values, size = kept[0][0]
    assert values.shape == (3, 80, 109) and size == (110, 150)
    ours, whole = views(kept, PLAIN).int(), views(images, PLAIN).int()
    assert (ours - whole).abs().float().mean() < 10  # of other boxes, or erased elsewhere, it is above 50
    kept.open.paths[0].unlink()  # type: ignore[attr-defined]
    assert torch.equal(views(pickle.loads(pickle.dumps(kept)), PLAIN).int(), ours)


def test_two_runs_fill_one_cache(photos: Images, tmp_path: Path) -> None:
    told: list[str] = []
    with ThreadPoolExecutor(2) as pool:
        lines = list(pool.map(lambda _: fill(photos, str(tmp_path / "cache"), say=told.append), range(2)))
    assert sorted(line.split(", ")[2][:1] for line in lines) == ["0", "3"]


def test_what_a_waiting_run_writes_is_no_shard(photos: Images, tmp_path: Path) -> None:
    line = filled(photos, tmp_path / "cache")[1]
    for name in (".part-0.safetensors", "renamed.safetensors"):
        (tmp_path / "cache" / name).symlink_to(tmp_path / "gone")
    (tmp_path / "cache" / ".part-1.safetensors").write_bytes(bytes(2**22))
    again = filled(photos, tmp_path / "cache")[1]
    assert "other images" not in again and again.split(", ")[:2] == line.split(", ")[:2]


def test_a_full_cache_is_read_without_its_lock(
    photos: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(photos, tmp_path / "cache")

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(decoded.FileLock, "acquire", refused)
    kept, line, _ = filled(photos, tmp_path / "cache")
    assert "3 of 3 shards were there" in line
    kept.open.paths[1].write_bytes(b"damaged")  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="permission denied"):
        filled(photos, tmp_path / "cache")


@pytest.mark.parametrize(("shards", "threads"), [(0.5, 1), (2.5, 2), (1000, 7)])
def test_shards_are_made_in_a_part_of_the_memory(
    photos: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: float, threads: int
) -> None:
    size, used = 2 * 3 * 150 * 110 + 9 * 150 * 110, list[int]()
    pool = decoded.ThreadPoolExecutor
    monkeypatch.setattr(decoded, "cores", lambda: 7)
    monkeypatch.setattr(decoded, "ThreadPoolExecutor", lambda n: used.append(n) or pool(n))
    memory = SimpleNamespace(available=4 * shards * size)
    monkeypatch.setattr(decoded.psutil, "virtual_memory", lambda: memory)
    filled(photos, tmp_path / "cache")
    assert used[-1] == threads


def test_memory_is_given_back(photos: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[tuple[object, ...]] = []
    monkeypatch.setattr(decoded, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(decoded, "_held", {})
    monkeypatch.setattr(decoded.atexit, "register", lambda *call: left.append(call))
    folder = tmp_path / f"vitkd-{os.getuid()}"
    folder.mkdir()
    (folder / "killed.safetensors").write_bytes(b"left by a run that was killed")
    kept, _, _ = filled(photos, "ram")
    assert len([*folder.glob("*.safetensors")]) == 3 and not (folder / "killed.safetensors").exists()
    filled(photos, "ram")
    assert torch.equal(views(kept, PLAIN), views(photos, PLAIN))
    [(forget, *arguments)] = left
    forget(*arguments)  # type: ignore[operator]
    assert not [*folder.glob("*.safetensors")]


def test_a_place_that_is_no_folder_of_ours_is_refused(
    photos: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "README.md").touch()
    for place in (tmp_path / "README.md", tmp_path / "README.md" / "inside"):
        with pytest.raises(UserError, match=r"cannot write .*README.md.*: a file lies") as caught:
            fill(photos, str(place))
        assert caught.value.hint.startswith("--cache-images FOLDER")
    monkeypatch.setattr(decoded, "SHARED_MEMORY", tmp_path)
    (tmp_path / f"vitkd-{os.getuid()}").symlink_to(tmp_path / "photos")
    with pytest.raises(UserError, match="is a link"):
        fill(photos, "ram")
    monkeypatch.setattr(decoded, "SHARED_MEMORY", tmp_path / "none")
    with pytest.raises(UserError, match="this system has no"):
        fill(photos, "ram")


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    digits = open_data(data="digits").train
    assert isinstance(digits, Images)
    with pytest.raises(UserError, match="keeps image files, and these are none"):
        fill(digits, str(tmp_path))
    with pytest.raises(UserError, match="--cache-side reduces cached images"):
        Recipe(cache_side=300)
    with pytest.raises(UserError, match="pillow crops whole images"):
        Recipe(cache_side=300, cache_images="ram", input_backend="pillow")
    assert Recipe(cache_side=300, cache_images="ram").decodes_fast("cpu")
