"""Folders as people have them: which files are images, which class is theirs, in which order."""

from __future__ import annotations

import errno
import os
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from vitkd_cli.data.datasets import named_split, open_data
from vitkd_cli.data.images import loose_images
from vitkd_cli.data.walk import in_order, walk
from vitkd_cli.errors import UserError

Tree = Callable[..., Path]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """``tree("cat/1.png", …)``: a folder with these files, images where the ending is one's."""

    def plant(*paths: str) -> Path:
        for number, path in enumerate(paths):
            place = tmp_path / "photos" / path
            place.parent.mkdir(parents=True, exist_ok=True)
            try:
                Image.fromarray(np.full((8, 8, 3), number % 256, np.uint8)).save(place)
            except (ValueError, KeyError):
                place.write_bytes(b"no image")
        return tmp_path / "photos"

    return plant


def refused(data: Path, **options: object) -> UserError:
    with pytest.raises(UserError) as caught:
        open_data(data=str(data), **options)  # type: ignore[arg-type]
    assert "\n" not in caught.value.message
    return caught.value


def classes_of(data: Path) -> dict[str, str]:
    """Name of each training and validation image → its class."""
    found = open_data(data=str(data))
    assert found.class_names is not None
    splits = [images for images in (found.train, found.val) if images is not None]
    return {
        os.path.relpath(images.path(index), data): found.class_names[label]
        for images in splits
        for index, label in enumerate(images.labels())
    }


# classes --------------------------------------------------------------------------------------------------


def test_the_class_is_the_first_folder(tree: Tree) -> None:
    root = tree(*(f"{c}/{y}/{i}.png" for c in ("cat", "dog") for y in ("2023", "2024") for i in range(2)))
    assert open_data(data=str(root)).class_names == ("cat", "dog")
    assert all(path.startswith(name) for path, name in classes_of(root).items())
    (note,) = (note for note in open_data(data=str(root)).notes if "inside" in note)
    assert "8 images" in note and "cat/2023" in note
    images, names = named_split(data=str(root))
    assert names == ["cat", "dog"] and images.labels() == [0] * 4 + [1] * 4
    assert any("cat/2023" in note for note in images.notes)


def test_files_of_one_name_in_two_spellings_are_refused(tree: Tree) -> None:
    data = tree("caf\u00e9/1.png", "caf\u00e9/2.png", "dog/1.png", "dog/2.png")
    tree("cafe\u0301/3.png")
    assert sorted(classes_of(data).values()) == ["caf\u00e9"] * 3 + ["dog"] * 2
    tree("cafe\u0301/1.png")
    assert "are called caf\u00e9/1.png, in two spellings" in refused(data).message


def test_class_order_is_a_function_of_the_names() -> None:
    names = ["a", "A", "01", "1", "001", "10", "2", "ß", "²", "é", "É", "e\u0301", "B", "b"]
    expected = in_order(names)
    assert expected[:6] == ["001", "01", "1", "2", "10", "A"]
    for seed in range(20):  # as a set has them in another process
        random.Random(seed).shuffle(names)
        assert in_order(names) == expected


@pytest.mark.parametrize("kind", ["folder", "tar", "flat"])
def test_class_order_does_not_hang_on_hashing(
    kind: str, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["1", "01", "A", "a", "b", "B"]
    root = tree(*(f"{name}/{name}.png" for name in names))
    if kind == "tar":
        with tarfile.open(tmp_path / "photos.tar", "w") as file:
            file.add(root, "photos")
        found = named_split(data=str(tmp_path / "photos.tar"))[1]
    elif kind == "flat":
        flat = tree(*(f"flat/{number}.png" for number in range(6))) / "flat"
        (tmp_path / "list.txt").write_text("".join(f"{n}.png {c}\n" for n, c in enumerate(names)))
        monkeypatch.setattr("vitkd_cli.data.imagenet._synset", str)
        found = named_split(data=str(flat), ground_truth=tmp_path / "list.txt")[1]
    else:
        found = named_split(data=str(root))[1]
    assert found == ["01", "1", "A", "a", "B", "b"]


def test_imagenet_is_read_as_timm_reads_it(tree: Tree) -> None:
    synsets = ("n01440764", "n02102040", "n01443537")
    root = tree(*(f"{name}/{name}_{i}.JPEG" for name in synsets for i in (10, 2, 7)))
    samples, classes = find_images_and_targets(str(root))
    images, names = named_split(data=str(root))
    assert [(images.path(i), label) for i, label in enumerate(images.labels())] == samples
    assert names == list(classes)


def test_tars_are_read_as_timm_reads_them(tree: Tree, tmp_path: Path) -> None:
    synsets = ("n01440764", "n02102040", "n01443537")
    root = tree(*(f"{name}/{name}_{i}.JPEG" for name in synsets for i in (10, 2, 7)))
    (tmp_path / "train").mkdir()
    for name in synsets:
        with tarfile.open(tmp_path / "train" / f"{name}.tar", "w") as file:
            for image in (root / name).iterdir():
                file.add(image, image.name)
    with tarfile.open(tmp_path / "all.tar", "w") as file:
        for tar in (tmp_path / "train").iterdir():
            file.add(tar, tar.name)
    for place in (tmp_path / "train", tmp_path / "all.tar"):
        theirs = ReaderImageInTar(str(place), cache_tarinfo=False)
        images, names = named_split(data=str(place))
        assert [Path(images.path(i)).name for i in range(9)] == [theirs.filename(i) for i in range(9)]
        assert images.labels() == list(theirs.targets) and names == list(theirs.class_name_to_idx)
        assert np.array_equal(images[4][0], Image.open(theirs[4][0]))


def test_tars_have_the_first_folder_as_class(tree: Tree, tmp_path: Path) -> None:
    root = tree("cat/2023/1.png", "cat/2024/2.webp", "dog/2023/3.png", "dog/._4.png", "__MACOSX/dog/4.png")
    with tarfile.open(tmp_path / "photos.tar", "w") as file:
        file.add(root, "./photos")
    images, names = named_split(data=str(tmp_path / "photos.tar"))
    assert names == ["cat", "dog"] and images.labels() == [0, 0, 1]
    with tarfile.open(tmp_path / "splits.tar", "w") as file:
        file.add(root, "photos/train")
        file.add(root, "photos/val")
    with pytest.raises(UserError, match="holds the splits train, val"):
        named_split(data=str(tmp_path / "splits.tar"))


# files ----------------------------------------------------------------------------------------------------


def test_a_tar_of_what_systems_leave_behind_has_no_images(tree: Tree, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(tree("cat/1.png") / "cat" / "1.png", "cat/._1.png")
    with pytest.raises(UserError, match=r"there are no images in photos\.tar"):
        named_split(data=str(tmp_path / "photos.tar"))


def test_what_systems_leave_behind_is_passed_over(tree: Tree) -> None:
    root = tree(
        *("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"),
        *("cat/._1.png", "cat/.DS_Store", "cat/Thumbs.db", "__MACOSX/cat/1.png", ".trash/dog/1.png"),
        *("cat/.hidden/3.png", "dog/@eaDir/1.png"),
    )
    assert sorted(classes_of(root)) == ["cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"]
    assert not walk(root).skipped
    assert len(named_split(data=str(root))[0]) == len(loose_images([root])) == 4


def test_endings_that_pillow_reads_count_and_others_are_counted(tree: Tree) -> None:
    kinds = ("png", "jpg", "JPEG", "webp", "bmp", "tiff", "tif", "gif")
    root = tree(*(f"cat/{i}.{kind}" for i, kind in enumerate(kinds)), "dog/1.png", "dog/2.heic", "dog/3.heic")
    assert len(walk(root).files) == 9 and walk(root).skipped == {".heic": 2}
    assert len(loose_images([root / "cat"])) == 8
    with pytest.raises(UserError, match=r"2 \.heic"):
        (root / "dog" / "1.png").unlink()
        named_split(data=str(root / "dog"))


def test_folders_are_visited_once(tree: Tree) -> None:
    root = tree("train/cat/1.png", "train/dog/1.png", "val/cat/2.png", "val/dog/2.png")
    (root / "train" / "cat" / "up").symlink_to("../..")  # to a folder that holds both splits
    (root / "train" / "cat" / "dogs").symlink_to("../dog")
    (root / "val" / "dog" / "itself").symlink_to(".")
    (root / "val" / "everything").symlink_to("/")
    found = open_data(data=str(root))
    assert found.train is not None and found.val is not None
    assert (len(found.train), len(found.val)) == (2, 2) and found.class_names == ("cat", "dog")
    notes = " | ".join(found.notes)
    assert "links to folders that are read at their own place (1): cat/dogs" in notes
    assert "cat/up → " in notes and "everything → /" in notes


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_link_above_is_no_split(split: str, tree: Tree) -> None:
    root = tree("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png")
    (root / split).symlink_to("/")
    (root / "everything").symlink_to("..")
    found = open_data(data=str(root))
    assert found.class_names == ("cat", "dog") and found.split_files is not None
    images, names = named_split(data=str(root))
    assert names == ["cat", "dog"] and len(images) == 4


def test_a_link_outside_is_followed_one_level(tree: Tree, tmp_path: Path) -> None:
    root = tree("cat/1.png", "../elsewhere/dogs/1.png", "../elsewhere/dogs/old/2.png")
    (root / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    found = walk(root)
    assert [(Path(path).name, name) for path, name in found.files] == [("1.png", "cat"), ("1.png", "dog")]
    assert "dog → " in found.notes[0] and "not entered (1): dog/old" in found.notes[1]


def test_a_pipe_is_no_image_and_a_link_to_nowhere_is_a_broken_one(tree: Tree) -> None:
    root = tree("cat/1.png")
    os.mkfifo(root / "cat" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(root / "cat" / "socket.png"))
    (root / "cat" / "null.png").symlink_to("/dev/null")
    (root / "cat" / "loop.png").symlink_to("loop.png")
    found = walk(root)
    assert [Path(path).name for path, _ in found.files] == ["1.png", "loop.png"]
    assert "pipes, sockets or devices are no images (3)" in found.notes[0]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_may_not_be_read_is_said(tree: Tree) -> None:
    root = tree("cat/1.png", "dog/1.png")
    (root / "dog").chmod(0)
    assert "cannot read the folder" in refused(root).message


def test_a_folder_of_unlabelled_images_that_may_not_be_read_is_said(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree("1.png")

    def deny(folder: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    for name in ("scandir", "listdir"):
        monkeypatch.setattr(os, name, deny)
    assert "cannot read the folder" in refused(root, unlabelled=True).message


# splits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "val"),
    [
        ("seg_train/seg_train", "seg_test/seg_test"),  # with a folder of unlabelled images beside
        ("flowers/train", "flowers/val"),
        ("archive/flowers/Train", "archive/flowers/Test"),
        ("training_set/training_set", "test_set/test_set"),
        ("train/train", "valid/valid"),
    ],
)
def test_splits_are_found_where_archives_have_them(train: str, val: str, tree: Tree) -> None:
    root = tree(*(f"{split}/{c}/{i}.png" for split in (train, val) for c in ("cat", "dog") for i in range(2)))
    if train.startswith("seg"):
        tree("seg_pred/seg_pred/1.png", "seg_pred/seg_pred/2.png")
    found = open_data(data=str(root))
    assert found.class_names == ("cat", "dog") and found.train is not None and found.val is not None
    assert all(f"/{train}/" in found.train.path(i) for i in range(len(found.train)))
    assert all(f"/{val}/" in found.val.path(i) for i in range(len(found.val)))
    assert f"{train}/ and {val}/" in found.description
    images, names = named_split(data=str(root))
    assert names == ["cat", "dog"] and [images.path(i) for i in range(4)] == [
        found.val.path(i) for i in range(4)
    ]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("cat/1.png", "dog/1.png", "test/1.png"), "test lies among the class folders cat, dog"),
        (("cat/1.png", "dog/1.png", "Pred/1.png"), "Pred lies among"),
        (("cat/train/1.png", "cat/val/2.png", "dog/train/1.png"), "cat/val holds images of a split inside"),
        (("train/1.png", "test/1.png"), "has no class folders"),
        (("photos/cat/1.png", "photos/dog/1.png"), "holds one folder, photos, and the images lie in"),
        (("car/1.png", "plane/1.png", "train/2023/1.png"), "may be the training split or a class"),
    ],
)
def test_no_training_image_comes_from_a_held_out_folder(
    paths: tuple[str, ...], message: str, tree: Tree
) -> None:
    assert message in refused(tree(*paths)).message


def test_the_hint_of_a_wrapped_folder_works(tree: Tree) -> None:
    hint = refused(tree("a/b/cat/1.png", "a/b/cat/2.png", "a/b/dog/1.png")).hint
    assert open_data(data=hint.split()[1]).class_names == ("cat", "dog")


def test_unlabelled_images_come_from_no_held_out_folder(tree: Tree) -> None:
    root = tree("1.png", "more/2.png", "val/3.png", "more/test/4.png")
    found = open_data(data=str(root), unlabelled=True)
    assert found.train is not None and len(found.train) == 2 and any("left out (2)" in n for n in found.notes)


# a saved split --------------------------------------------------------------------------------------------


def test_deleted_images_of_a_saved_split_are_dropped(tree: Tree) -> None:
    root = tree(*(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(20)))
    before = open_data(data=str(root))
    assert before.train is not None and before.val is not None and before.split_files is not None
    gone = [before.split_files["train"][3], before.split_files["validation"][1]]
    for path in gone:
        (root / path).unlink()
    after = open_data(data=str(root), split_files=before.split_files)
    assert after.train is not None and after.val is not None
    assert len(after.train) == len(before.train) and len(after.val) == len(before.val) - 1
    moved = [i for i in range(len(after.train)) if after.train.path(i) != before.train.path(i)]
    assert moved == [3] and after.train.labels() == before.train.labels()
    assert after.split_files == before.split_files  # the next resume finds the same
    notes = " | ".join(after.notes)
    assert f"training images that are gone, others of their class stand in (1): {gone[0]}" in notes
    assert f"validation images that are gone are left out (1): {gone[1]}" in notes
    for path in before.split_files["train"]:
        if path.startswith("dog"):
            (root / path).unlink()
    assert "all training images of dog" in refused(root, split_files=before.split_files).message
