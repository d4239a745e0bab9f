"""Tars by index: WebDataset's, class folders in tars, and every way in which they do not fit."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tarred import cls, picture, refused, samples, shards, write_tar

from vitkd_cli.data import tars, webdataset
from vitkd_cli.data.datasets import has_split, named_split, open_data
from vitkd_cli.data.decoded import cached, fill
from vitkd_cli.data.keyed import BatchSampler, Keyed, train_loader
from vitkd_cli.data.transforms import train_view
from vitkd_cli.errors import UserError
from vitkd_cli.files import CannotWrite

# what is read ---------------------------------------------------------------------------------------------


def test_samples_are_numbered_tar_after_tar(tmp_path, monkeypatch):
    pattern = shards(tmp_path)
    data = open_data(data=pattern, val_fraction=0)
    assert data.description == "train-{000..002}.tar: 24 training images, 3 classes, 3 tars"
    train = data.train
    assert train.labels() == [number % 3 for number in range(24)] and not data.notes
    for number in (0, 8, 9, 12, 13, 23):
        assert np.array_equal(train[number][0], Image.open(io.BytesIO(picture(number))))
        assert train.path(number).endswith(f".tar/{number:05d}.png")
    assert train.place(10)[0] == str(tmp_path / "train-001.tar") and train.file(0) is None
    # Again, from the indices alone, and in a worker that was spawned.
    monkeypatch.setattr(tars, "_members", None)
    again = pickle.loads(pickle.dumps(open_data(data=pattern, val_fraction=0).train.subset([23, 3])))
    assert np.array_equal(again[0][0], train[23][0]) and again.path(1) == train.path(3)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    key = "/".join(["folder" * 9] * 3) + ("/x" if form == tarfile.USTAR_FORMAT else "/é" + "x" * 120)
    path = write_tar(tmp_path / "a.tar", {f"{key}.png": picture(1), f"{key}.cls": "0"}, form)
    train = open_data(data=f"wds:{path}", val_fraction=0).train
    assert train.path(0) == f"{path}/{key}.png" and train[0][1] == 0


@pytest.mark.parametrize(
    ("files", "options", "labels", "names"),
    [
        ({"cls": cls}, {}, [0, 1, 2, 0], None),
        ({"cls": lambda n: "dog" if n % 2 else "cat\n"}, {}, [0, 1, 0, 1], ("cat", "dog")),
        ({"cls": lambda n: "10" if n % 2 else "b9"}, {}, [1, 0, 1, 0], ("10", "b9")),
        ({"json": lambda n: json.dumps({"label": n % 2, "width": 3})}, {}, [0, 1, 0, 1], None),
        (
            {"cls": cls, "json": lambda n: json.dumps({"fine": 1 - n % 2})},
            {"target_key": "fine"},
            [1, 0, 1, 0],
            None,
        ),
        ({"json": lambda n: json.dumps({"label": n - 1})}, {}, [0, 1, 2], None),  # timm leaves -1 out
        ({"kind.txt": cls}, {"target_key": "kind.txt"}, [0, 1, 2, 0], None),
    ],
    ids=["numbers", "words", "both", "json", "a field", "negative", "an ending"],
)
def test_where_classes_are_found(tmp_path, files, options, labels, names):
    path = write_tar(tmp_path / "a.tar", samples(0, 4, **files))
    data = open_data(data=f"wds:{path}", val_fraction=0, **options)
    assert data.train.labels() == labels and data.class_names == names
    assert (len(labels) < 4) == ("images whose class is negative are left out (1)" in data.notes)


def test_words_agree_over_tars_and_splits(tmp_path):
    for name, words in (("train-0", "ab"), ("train-1", "cb"), ("val-0", "bc")):
        write_tar(tmp_path / f"{name}.tar", samples(0, 4, cls=lambda n, words=words: words[n % 2]))
    data = open_data(data=f"wds:{tmp_path}")
    assert data.class_names == ("a", "b", "c")
    assert data.train.labels() == [0, 1, 0, 1, 2, 1, 2, 1] and data.val.labels() == [1, 2, 1, 2]
    (tmp_path / "map.txt").write_text("c\nb\na\n")
    data = open_data(data=f"wds:{tmp_path}", class_map=str(tmp_path / "map.txt"))
    assert data.class_names == ("c", "b", "a") and data.val.labels() == [1, 0, 1, 0]


def test_without_classes_for_objectives_that_read_none(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 4))
    data = open_data(data=f"wds:{path}", unlabelled=True)
    assert not data.labelled and data.train.labels() == [-1] * 4


# which tars -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["names", "folders", "info", "timm"])
def test_splits_of_a_folder(tmp_path, layout):
    inside = {"folders": ("train/shard", "val/shard")}.get(layout, ("x-train", "x-validation"))
    for name, sizes in zip(inside, [(9, 4), (5,)], strict=True):
        shards(tmp_path / Path(name).parent, Path(name).name, sizes)
    options = {}
    if layout == "info":
        files = [["x-train-000.tar", "x-train-001.tar"], ["x-validation-000.tar"]]
        splits = {
            split: {"name": split, "filenames": names, "shard_lengths": lengths, "num_samples": sum(lengths)}
            for split, names, lengths in zip(("train", "validation"), files, ([9, 4], [5]), strict=True)
        }
        (tmp_path / "_info.json").write_text(json.dumps({"splits": splits}))
    if layout == "timm":
        options = {"train_split": "x-train-{000..001}.tar|13", "val_split": "x-validation-000.tar"}
    data = open_data(data=f"wds:{tmp_path}", **options)
    assert (len(data.train), len(data.val)) == (13, 5)
    if not options:
        assert len(named_split(data=f"wds:{tmp_path}")[0]) == 5
        assert has_split(data=f"wds:{tmp_path}", split="validation")
    below = open_data(data=f"wds:{tmp_path.name}", data_dir=str(tmp_path.parent), **options)
    assert below.val.labels() == data.val.labels()


def test_one_split_alone(tmp_path):
    pattern = shards(tmp_path, "shard")
    for name in (pattern, f"wds:{tmp_path}"):
        images, names = named_split(data=name)
        assert len(images) == 24 and names is None and not has_split(data=name, split="validation")
        data = open_data(data=name)  # a share is held out, by the seed
        assert len(data.train) + len(data.val) == 24 and data.split_files is None
    with pytest.raises(UserError, match="no tars of the split 'test'"):
        named_split(data=f"wds:{tmp_path}", split="test")
    shards(tmp_path / "other")
    with pytest.raises(UserError, match="no tars of the split 'validation'"):
        named_split(data=f"wds:{tmp_path / 'other'}")


def test_patterns():
    assert webdataset._braces("a{08..10}{x,y}") == [f"a{n}{c}" for n in ("08", "09", "10") for c in "xy"]
    assert webdataset._braces("{8..10}") == ["8", "9", "10"] and webdataset._braces("a") == ["a"]


# class folders in tars ------------------------------------------------------------------------------------


@pytest.fixture
def flowers(tmp_path) -> tuple[Path, dict[str, bytes]]:
    files = {
        f"{name}/{n}.png": picture(7 * n + len(name))
        for name in ("rose", "daisy", "aster2")
        for n in range(9, 13)
    }
    for name, content in files.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(content)
    return tmp_path, files


@pytest.mark.parametrize("form", ["one", "one each", "tar of tars"])
def test_a_tar_of_class_folders_is_the_folder(flowers, form):
    root, files = flowers
    place = root / "tars" / "flowers.tar"
    if form == "one":
        write_tar(place, {f"./flowers/{name}": files[name] for name in sorted(files, reverse=True)})
    else:
        place = root / "tars"
        for kind in ("rose", "daisy", "aster2"):
            write_tar(
                place / f"{kind}.tar", {Path(n).name: c for n, c in files.items() if n.startswith(kind)}
            )
        if form == "tar of tars":
            place = write_tar(
                root / "all.tar", {path.name: path.read_bytes() for path in place.glob("*.tar")}
            )
    ours, theirs = open_data(data=str(place), seed=3), open_data(data=str(root / "folder"), seed=3)
    assert ours.class_names == theirs.class_names == ("aster2", "daisy", "rose")
    for split in ("train", "val"):
        one, other = getattr(ours, split), getattr(theirs, split)
        assert one.labels() == other.labels()
        assert all(np.array_equal(one[i][0], other[i][0]) for i in range(len(one)))


def test_imagenets_own_tars(tmp_path):
    root = tmp_path / "ILSVRC"
    parts = {
        c: write_tar(tmp_path / f"{c}.tar", {f"{c}_{n}.JPEG": picture(n) for n in range(3)})
        for c in ("n02", "n01")
    }
    write_tar(root / "ILSVRC2012_img_train.tar", {path.name: path.read_bytes() for path in parts.values()})
    write_tar(
        root / "ILSVRC2012_img_val.tar", {f"ILSVRC2012_val_0000000{n}.JPEG": picture(n) for n in (2, 1)}
    )
    (root / "val.txt").write_text("ILSVRC2012_val_00000001.JPEG n02\nILSVRC2012_val_00000002.JPEG n01\n")
    data = open_data(data=str(root))
    assert data.class_names == ("n01", "n02") and data.train.labels() == [0, 0, 0, 1, 1, 1]
    assert data.val.labels() == [1, 0] and data.train.path(0).endswith("img_train.tar/n01_0.JPEG")


def test_images_of_tars_are_kept_decoded(tmp_path):
    train = open_data(data=shards(tmp_path), val_fraction=0).train.subset(range(5, 24))
    fill(train, str(tmp_path / "cache"))
    kept = cached(train, str(tmp_path / "cache"))
    for tar in tmp_path.glob("*.tar"):
        tar.unlink()
    assert np.array_equal(kept[0][0], Image.open(io.BytesIO(picture(5)))) and kept.label(0) == 2


# what does not fit ----------------------------------------------------------------------------------------


def test_what_is_missing_is_named(tmp_path):
    pattern = shards(tmp_path)
    (tmp_path / "train-001.tar").unlink()
    assert "train-001.tar is missing" in refused(pattern).message
    assert "lacks train-001.tar" in refused(f"wds:{tmp_path}").message
    assert "no file fits" in refused(f"wds:{tmp_path}/val-*.tar").message
    assert "there is no folder" in refused(f"wds:{tmp_path}/nowhere").message
    (tmp_path / "empty").mkdir()
    assert "names no tars" in refused(f"wds:{tmp_path / 'empty'}").message
    assert "wds:FOLDER" in refused("wds/x").hint
    assert "holds 9 images, and 10 are announced" in refused(f"wds:{tmp_path}/train-000.tar|10").message
    info = {"splits": {"train": {"filenames": ["train-000.tar"], "shard_lengths": [8]}}}
    (tmp_path / "_info.json").write_text(json.dumps(info))
    assert "train-000.tar holds 9 images, and 8 are announced" in refused(f"wds:{tmp_path}").message


def test_tars_that_do_not_serve(tmp_path):
    lone = write_tar(
        tmp_path / "a.tar", {**samples(0, 2, cls=cls), "x.png": picture(1), "x.json": '{"kind": 3}'}
    )
    error = refused(f"wds:{lone}")
    assert "x.png has no class; there is .png, .json (kind)" in error.message and "--target-key" in error.hint
    error = refused(f"wds:{write_tar(tmp_path / 'b.tar', {'1.npy': 'x', '1.cls': '0'})}")
    assert "there are no images in b.tar, but .npy, .cls" in error.message
    twice = write_tar(tmp_path / "c.tar", {"1.png": picture(1), "1.PNG": picture(1), "1.cls": "0"})
    assert "1.PNG twice in one sample" in refused(f"wds:{twice}").message
    (tmp_path / "d.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    assert "compressed" in refused(f"wds:{tmp_path / 'd.tar'}").message
    cut = tmp_path / "e.tar"
    cut.write_bytes(lone.read_bytes()[:3000])
    assert "e.tar is cut or damaged" in refused(f"wds:{cut}").message
    flat = refused(write_tar(tmp_path / "f.tar", {"1.png": picture(1)}))
    assert "holds images without class folders" in flat.message


def test_an_index_counts_for_its_own_tar_only(tmp_path):
    path = write_tar(tmp_path / "a.tar", samples(0, 4, cls=cls))
    train = open_data(data=f"wds:{path}", val_fraction=0).train
    (index,) = tmp_path.glob("a.tar.*.idx.safetensors")
    write_tar(path, samples(4, 4, cls=cls))  # as long as it was
    with pytest.raises(UserError, match="changed under the run"):
        train[0]
    data = open_data(data=f"wds:{path}", val_fraction=0)
    assert data.notes == (f"the index {index} does not fit a.tar, which is indexed anew",)
    assert np.array_equal(data.train[0][0], Image.open(io.BytesIO(picture(4))))
    for damage in (b"", index.read_bytes()[:-3], b"\xff" * 99):
        index.write_bytes(damage)
        assert open_data(data=f"wds:{path}", val_fraction=0).train.labels() == [1, 2, 0, 1]
    assert open_data(data=f"wds:{path}", val_fraction=0).notes == ()
    other = open_data(data=f"wds:{path}", val_fraction=0, input_key="jpg;png").train  # another index
    assert len(other) == 4 and len(list(tmp_path.glob("a.tar.*.idx.safetensors"))) == 2
    assert not list(tmp_path.glob(".part-*"))


def test_an_index_goes_to_a_cache_where_the_tar_lies_on_a_disk_to_read(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "a.tar", samples(0, 4, cls=cls))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write, full = tars._write, [str(tmp_path / "a.tar")]

    def refuse(place, *rest):
        if str(place).startswith(tuple(full)):
            raise CannotWrite(f"cannot write {place}: the disk is full")
        write(place, *rest)

    monkeypatch.setattr(tars, "_write", refuse)
    assert open_data(data=f"wds:{path}", val_fraction=0).train[1][1] == 1
    (index,) = (tmp_path / "cache").rglob("*.idx.safetensors")
    monkeypatch.setattr(tars, "_members", None)
    assert len(open_data(data=f"wds:{path}", val_fraction=0).train) == 4
    index.unlink()
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tars, "_write", refuse)
    full.append(str(tmp_path / "cache"))
    error = refused(f"wds:{path}")
    assert "the disk is full" in error.message and "XDG_CACHE_HOME" in error.hint


# keyed order ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_one_process_without_workers(tmp_path, workers, monkeypatch):
    monkeypatch.setattr(tars, "_OPEN", 2)
    train = open_data(data=shards(tmp_path), val_fraction=0).train

    def epoch(workers, **options):
        sampler = BatchSampler(len(train), seed=1, **options)
        return list(train_loader(Keyed(train, train_view((8, 8)), 1), sampler.epoch(0), workers))

    def by_position(batches):
        return {
            int(p): (i.numpy().tobytes(), int(y))
            for b in batches
            for i, y, p in zip(b.images, b.labels, b.positions, strict=True)
        }

    alone = by_position(epoch(0, batch_size=8))
    halves = [by_position(epoch(workers, batch_size=4, rank=rank, world=2)) for rank in range(2)]
    assert alone == halves[0] | halves[1] and len(alone) == 24


def test_blocks_of_tars_are_shuffled(tmp_path):
    train = open_data(data=shards(tmp_path, sizes=[7, 5, 6] * 10), val_fraction=0).train.subset(range(2, 180))
    of = tars.tar_numbers(train)
    assert of.tolist() == [int(Path(train.place(i)[0]).stem[-3:]) for i in range(len(train))]

    def sampler(world=1, rank=0, block=4):
        found = BatchSampler(len(train), 24 // world, seed=1, world=world, rank=rank)
        if block:
            found.in_blocks(of, block)
        return found

    def touched(block):
        order = np.array(sampler(block=block).order(3))
        return max(len({*of[order[first : first + 24]]}) for first in range(0, len(order), 24))

    assert touched(block=4) <= 8 and touched(block=None) > 15
    whole = sampler().order(3)
    assert len(whole) == len({*whole}) == 168 and whole != sampler().order(4) and whole == sampler().order(3)
    shared = [key for rank in (0, 1) for batch in sampler(2, rank).epoch(3) for key in batch]
    assert sorted(shared) == [(3, position, index) for position, index in enumerate(whole)]


def test_processes_begin_at_different_tars(tmp_path, monkeypatch):
    pattern, order = shards(tmp_path, sizes=(2, 2, 2, 2)), []
    real = tars._index_of
    monkeypatch.setattr(
        tars, "_index_of", lambda tar, layout: order.append(tar.stem[-1]) or real(tar, layout)
    )
    monkeypatch.setattr(tars, "_THREADS", 1)
    monkeypatch.setattr(tars, "rank", lambda: 1)
    monkeypatch.setattr(tars, "world_size", lambda: 2)
    assert open_data(data=pattern, val_fraction=0).train.labels() == [n % 3 for n in range(8)]
    assert order == ["2", "3", "0", "1"]
