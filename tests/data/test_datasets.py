"""What --data names: folders, the digits, timm's datasets, and every way to get it wrong."""

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkd_cli.data.datasets import DIGITS, NEEDS, named_split, open_data
from vitkd_cli.errors import UserError


def write_images(folder: Path, count: int, suffix: str = ".png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.full((8, 8, 3), (index * 16) % 256, np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}{suffix}")


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    for name in ("10", "2", "1"):
        write_images(tmp_path / "train" / name, 3)
        write_images(tmp_path / "val" / name, 2)
    return tmp_path


@pytest.fixture
def plain_folder(tmp_path: Path) -> Path:
    write_images(tmp_path / "cat", 20)
    write_images(tmp_path / "dog", 2)
    write_images(tmp_path / "emu", 1)
    return tmp_path


def refused(data: object, **options: object) -> UserError:
    with pytest.raises(UserError) as caught:
        open_data(data=str(data), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return caught.value


# digits ---------------------------------------------------------------------------------------------------


def test_digits_split_is_fixed() -> None:
    data = open_data(data="digits", seed=7)
    assert data.train is not None and data.val is not None
    assert (len(data.train), len(data.val), data.num_classes) == (1297, 500, 10)
    assert data.class_names == tuple("0123456789")
    assert np.bincount(data.val.labels()).tolist() == [50] * 10
    paths = ",".join(data.val.path(index) for index in range(500))
    assert hashlib.sha256(paths.encode()).hexdigest()[:16] == "6e5796f584a32afe"
    assert open_data(data="digits", seed=8).val.labels() == data.val.labels()  # type: ignore[union-attr]


def test_digits_are_rgb_from_black_to_white() -> None:
    train = open_data(data="digits").train
    assert train is not None
    image, label = train[0]
    assert (image.mode, image.size) == ("RGB", (8, 8)) and label == train.labels()[0]
    assert DIGITS.stat().st_size < 60_000
    with np.load(DIGITS, allow_pickle=False) as archive:
        assert archive["images"].shape == (1797, 8, 8) and archive["images"].max() == 16
        scan = archive["images"][int(train.path(0)[len("digits[") : -1])]
    grey = np.asarray(image)  # [8, 8, 3]
    assert (grey == np.round(scan[..., None] * (255 / 16))).all()
    assert {np.asarray(train[index][0]).min() for index in range(20)} == {0}
    assert max(np.asarray(train[index][0]).max() for index in range(20)) == 255


def test_unknown_digits_split() -> None:
    assert "no split 'tset'" in refused("digits", val_split="tset").message


# folders with splits --------------------------------------------------------------------------------------


def test_classes_are_in_natural_order(split_folder: Path) -> None:
    data = open_data(data=str(split_folder))
    assert data.class_names == ("1", "2", "10")
    assert data.train is not None and data.train.labels() == [0] * 3 + [1] * 3 + [2] * 3
    assert "9 training and 6 validation images, 3 classes" in data.description
    assert data.split_files is None


def test_validation_images_are_mapped_by_name(split_folder: Path) -> None:
    for image in (split_folder / "val" / "1").iterdir():
        image.unlink()
    data = open_data(data=str(split_folder))
    assert data.val is not None
    # by position "2" would have become class 0
    assert {(Path(data.val.path(i)).parent.name, data.val[i][1]) for i in range(4)} == {("2", 1), ("10", 2)}
    assert any("no val images for 1" in note for note in data.notes)


def test_a_class_that_only_validation_has_is_an_error(split_folder: Path) -> None:
    (split_folder / "val" / "2").rename(split_folder / "val" / "two")
    message = refused(split_folder).message
    assert "classes that" in message and "lacks: two" in message and "lacks 2" in message


def test_test_folder_stands_in_only_for_an_unnamed_split(split_folder: Path) -> None:
    (split_folder / "val").rename(split_folder / "test")
    data = open_data(data=str(split_folder))
    assert data.val is not None and len(data.val) == 6 and "test/" in data.description
    (split_folder / "test").rename(split_folder / "val")
    assert "no split folder 'test'" in refused(split_folder, val_split="test").message
    assert "no split folder 'trian'" in refused(split_folder, train_split="trian").message


def test_validation_alone(split_folder: Path) -> None:
    (split_folder / "train").rename(split_folder.parent / "elsewhere")
    data = open_data(data=str(split_folder))
    assert data.train is None and data.val is not None and len(data.val) == 6


def test_train_alone_is_split(split_folder: Path) -> None:
    (split_folder / "val").rename(split_folder.parent / "elsewhere2")
    data = open_data(data=str(split_folder))
    assert data.val is not None and sorted(data.val.labels()) == [0, 1, 2]
    assert data.split_files is not None and data.split_files["train"][0].startswith("train/")


def test_val_split_none_holds_out(split_folder: Path) -> None:
    data = open_data(data=str(split_folder), val_split="none")
    assert data.val is not None and all("/train/" in data.val.path(i) for i in range(len(data.val)))


def test_class_map_orders_and_leaves_out(split_folder: Path) -> None:
    (split_folder / "classes.txt").write_text("10\n1\n\n")
    (split_folder / "windows.txt").write_text("10\n1\n", encoding="utf-8-sig")
    for class_map in ("classes.txt", "windows.txt", str(split_folder / "classes.txt")):
        data = open_data(data=str(split_folder), class_map=class_map)
        assert data.class_names == ("10", "1") and data.train is not None and len(data.train) == 6
        assert {(Path(data.train.path(i)).parent.name, data.train[i][1]) for i in range(6)} == {
            ("10", 0),
            ("1", 1),
        }
        assert data.val is not None and sorted(data.val.labels()) == [0, 0, 1, 1]
        assert any("leaves out 1 folders of train/: 2" in note for note in data.notes)
    assert "Cannot locate" in refused(split_folder, class_map="nowhere.txt").message
    (split_folder / "others.txt").write_text("x\n")
    assert "names no class folder" in refused(split_folder, class_map="others.txt").message


def test_num_classes(split_folder: Path) -> None:
    error = refused(split_folder, num_classes=2)
    assert "num_classes is 2" in error.message and "3 classes" in error.message
    assert error.hint == "--num-classes 3"
    data = open_data(data=str(split_folder), num_classes=5)
    assert data.num_classes == 5 and data.class_names == ("1", "2", "10", "class 3", "class 4")


def test_shots_are_seeded_and_stratified(split_folder: Path) -> None:
    data = open_data(data=str(split_folder), shots=2, seed=1)
    assert data.train is not None and data.train_all is not None and data.val is not None
    assert data.train.labels() == [0, 0, 1, 1, 2, 2] and len(data.train_all) == 9 and len(data.val) == 6
    assert "6 training and 6 validation images (2 a class)" in data.description
    chosen = [data.train.path(i) for i in range(6)]
    again = open_data(data=str(split_folder), shots=2, seed=1).train
    assert again is not None and chosen == [again.path(i) for i in range(6)]
    others = (open_data(data=str(split_folder), shots=2, seed=seed).train for seed in range(2, 8))
    assert any(chosen != [other.path(i) for i in range(6)] for other in others if other)
    few = open_data(data=str(split_folder), shots=4)
    assert any("fewer than 4" in note for note in few.notes)
    assert "shots must be at least 1, not 0" in refused(split_folder, shots=0).message


# folders without splits -----------------------------------------------------------------------------------


def test_plain_folder_is_split_by_class(plain_folder: Path) -> None:
    data = open_data(data=str(plain_folder))
    assert data.train is not None and data.val is not None and data.split_files is not None
    assert np.bincount(data.val.labels(), minlength=3).tolist() == [2, 1, 0]
    assert np.bincount(data.train.labels()).tolist() == [18, 1, 1]
    train, val = (set(data.split_files[split]) for split in ("train", "validation"))
    assert not train & val and len(train | val) == 23 and "emu/0.png" in train
    assert any("single image" in note for note in data.notes)


def test_saved_split_is_reproduced(plain_folder: Path) -> None:
    data = open_data(data=str(plain_folder), seed=1)
    assert data.split_files is not None
    write_images(plain_folder / "ant", 3)  # new since then: must neither be used nor shift the classes
    again = open_data(data=str(plain_folder), seed=99, split_files=data.split_files)
    for before, after in ((data.train, again.train), (data.val, again.val)):
        assert before is not None and after is not None
        assert [before.path(i) for i in range(len(before))] == [after.path(i) for i in range(len(after))]
        assert before.labels() == after.labels()
    assert again.class_names == ("cat", "dog", "emu") and again.split_files == data.split_files
    assert any("3 images are not in the saved split" in note for note in again.notes)
    (plain_folder / "emu" / "0.png").unlink()
    assert "emu/0.png" in refused(plain_folder, split_files=data.split_files).message


def test_val_fraction(plain_folder: Path) -> None:
    data = open_data(data=str(plain_folder), val_fraction=0.5)
    assert data.val is not None and np.bincount(data.val.labels()).tolist() == [10, 1]
    assert open_data(data=str(plain_folder), val_fraction=0).val is None
    assert "val_fraction" in refused(plain_folder, val_fraction=1.0).message


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    for name in ("car", "plane", "train"):
        write_images(tmp_path / name, 4)
    assert open_data(data=str(tmp_path)).class_names == ("car", "plane", "train")


def test_one_class_is_noted(tmp_path: Path) -> None:
    write_images(tmp_path / "all", 4)
    data = open_data(data=str(tmp_path))
    assert data.num_classes == 1 and any("one class only" in note for note in data.notes)


# folders that are wrong -----------------------------------------------------------------------------------


def test_missing_folder(tmp_path: Path) -> None:
    error = refused(tmp_path / "nowhere")
    assert f"no folder {tmp_path / 'nowhere'}" in error.message and "digits" in error.hint
    assert "--data is empty" in refused("").message


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").write_bytes(b"")
    assert "is a file" in refused(tmp_path / "data.zip").message


def test_empty_folder(tmp_path: Path) -> None:
    error = refused(tmp_path)
    assert "no images" in error.message and ".png" in error.hint


def test_flat_folder(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    error = refused(tmp_path)
    assert "3 images but no class folders" in error.message and "FOLDER/train/CLASS" in error.hint


def test_flat_split(tmp_path: Path) -> None:
    write_images(tmp_path / "train", 3)
    assert "train has no class folders" in refused(tmp_path).message


def test_stray_and_hidden_images(split_folder: Path) -> None:
    write_images(split_folder / "train" / ".ipynb_checkpoints", 1)
    assert open_data(data=str(split_folder)).class_names == ("1", "2", "10")
    (split_folder / "train" / ".ipynb_checkpoints" / "0.png").rename(split_folder / "train" / "stray.png")
    assert "stray.png lies beside" in refused(split_folder).message


def test_empty_class_folder_is_noted(split_folder: Path) -> None:
    (split_folder / "train" / "3").mkdir()
    assert any(
        "without images in train/ are no classes: 3" in note
        for note in open_data(data=str(split_folder)).notes
    )


def test_data_dir_alone_and_file_types(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 4, ".ppm")
    error = refused("", data_dir=tmp_path)
    assert "no images" in error.message and "8 .ppm" in error.message
    data = open_data(data="", data_dir=tmp_path, input_key="ppm")
    assert data.train is not None and data.val is not None and len(data.train) + len(data.val) == 8


# one split alone ------------------------------------------------------------------------------------------


def test_a_split_alone(split_folder: Path) -> None:
    for data in (split_folder, split_folder / "val"):
        images, names = named_split(data=str(data))
        assert names == ["1", "2", "10"]
        assert [Path(images.path(i)).parent.name for i in range(6)] == ["1", "1", "2", "2", "10", "10"]
        assert images.labels() == [0, 0, 1, 1, 2, 2]
    assert len(named_split(data=str(split_folder), split="train")[0]) == 9
    assert len(named_split(data="digits")[0]) == 500


def test_an_unknown_split_is_refused(split_folder: Path) -> None:
    with pytest.raises(UserError, match="no split folder 'test'"):
        named_split(data=str(split_folder), split="test")[0]


# timm's datasets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["hfds/timm/x", "hfids/timm/x", "tfds/x"])
def test_missing_package(data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitkd_cli.data.datasets.find_spec", lambda name: None)
    error = refused(data)
    package, cure = NEEDS[data.partition("/")[0]]
    assert f"needs the package {package}" in error.message and error.hint == cure


def test_torch_needs_a_folder_and_a_download(tmp_path: Path) -> None:
    assert refused("torch/cifar10").hint == "--data-dir FOLDER"
    error = refused("torch/cifar10", data_dir=tmp_path)
    assert "cannot open the split 'train'" in error.message and "--dataset-download" in error.hint
    assert (
        "class_map does not apply" in refused("torch/cifar10", data_dir=tmp_path, class_map="x.txt").message
    )


def test_torchvision_set_is_read_and_mapped_by_name(split_folder: Path) -> None:
    for image in (split_folder / "val" / "1").iterdir():
        image.unlink()
    (split_folder / "val" / "1").rmdir()
    data = open_data(data="torch/image_folder", data_dir=split_folder)
    assert data.class_names == ("1", "10", "2")  # torchvision's order
    assert data.train is not None and data.val is not None
    assert data.train.labels() == [0] * 3 + [1] * 3 + [2] * 3 and data.val.labels() == [1, 1, 2, 2]
    assert data.train[0][0].mode == "RGB" and data.val[3][1] == 2
    write_images(split_folder / "val" / "7", 1)
    assert "lacks: 7" in refused("torch/image_folder", data_dir=split_folder).message


def test_unreadable_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr("vitkd_cli.data.datasets.find_spec", lambda name: True)
    monkeypatch.setattr("vitkd_cli.data.datasets.with_columns", offline)
    error = refused("hfds/timm/imagenet-1k")
    assert error.message.endswith("Couldn't reach the Hub") and "network" in error.hint


needs_datasets = pytest.mark.skipif(
    importlib.util.find_spec("datasets") is None, reason="needs the package datasets"
)


@needs_datasets
def test_hugging_face_folder(split_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    cache = tmp_path_factory.mktemp("cache")
    data = open_data(data=f"hfds/{split_folder}", data_dir=cache)
    assert data.train is not None and data.val is not None
    assert (len(data.train), len(data.val), data.num_classes) == (9, 6, 3)
    image, label = data.train[8]
    assert image.size == (8, 8) and label == data.train.labels()[8]
    assert "'tset'" in refused(f"hfds/{split_folder}", data_dir=cache, val_split="tset").message
    held = open_data(data=f"hfds/{split_folder}", data_dir=cache, val_split="none")
    assert held.val is not None and sorted(held.val.labels()) == [0, 1, 2]
