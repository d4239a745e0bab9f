"""What is said of the data before it is used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitkd_cli.data.census import FEW, in_training, summary
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.images import Images

TINY = "img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


def write(place: Path, value: int) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(value).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(noise).save(place)


@pytest.fixture
def leaking(tmp_path: Path) -> Path:
    """Two of six validation images are in training, under another name and class."""
    for index in range(12):
        write(tmp_path / "train" / ("cat", "dog")[index % 2] / f"{index}.png", index)
        write(tmp_path / "val" / ("cat", "dog")[index % 2] / f"{index}.png", 100 + index // 2)
    for index in range(6, 12):
        (tmp_path / "val" / ("cat", "dog")[index % 2] / f"{index}.png").unlink()
    shutil.copy(tmp_path / "train" / "cat" / "0.png", tmp_path / "val" / "cat" / "0.png")
    shutil.copy(tmp_path / "train" / "cat" / "2.png", tmp_path / "val" / "dog" / "1.png")
    return tmp_path


def test_validation_images_that_are_in_training_are_named(leaking: Path) -> None:
    data = open_data(data=str(leaking))
    assert data.train is not None and data.val is not None
    told: list[tuple[int, int]] = []
    note = in_training(data.train, data.val, lambda done, total: told.append((done, total)))
    assert note == "2 of 6 validation images are in training, too: cat/0.png, dog/1.png" and told
    held_out = open_data(data=str(leaking / "train"))
    assert held_out.train is not None and held_out.val is not None
    assert not in_training(held_out.train, held_out.val)
    digits = open_data(data="digits")
    assert digits.train is not None and digits.val is not None
    assert not in_training(digits.train, digits.val)


def test_only_files_that_agree_in_size_and_middle_are_read_whole(
    leaking: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr("vitkd_cli.data.census._content", lambda path: (read.append(path), path)[1])
    data = open_data(data=str(leaking))
    assert data.train is not None and data.val is not None
    in_training(data.train, data.val)
    assert len(read) == 4


def test_a_limit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vitkd_cli.data.census.MOST_FILES", 3)
    images = Images(["a", "b"], [0, 1])
    assert "not looked for" in in_training(images, images)


def test_classes_and_their_sizes_are_shown(tmp_path: Path) -> None:
    for number in range(10):
        for index in range(FEW + number if number else 2):
            write(tmp_path / "train" / f"class-{number}" / f"{index}.png", index)
        write(tmp_path / "val" / f"class-{number}" / "0.png", 200)
    for name in ("x.heic", "y.HEIC"):
        (tmp_path / "train" / "class-1" / name).touch()
    (tmp_path / "train" / "class-2" / "notes").touch()
    lines = summary(open_data(data=str(tmp_path)))
    assert lines[0].startswith("class-0, class-1, ") and lines[0].endswith("class-7 and 2 more")
    assert lines[1] == "training images of a class: 2 at least, median 9, 14 at most"
    assert lines[2] == "fewer than 5 training images: class-0 (2)"
    assert lines[3] == "skipped for their ending: 2 .heic, 1 without one"
    shutil.rmtree(tmp_path / "val")  # the same where images are held out
    assert summary(open_data(data=str(tmp_path)))[-1] == lines[3]
    # classes that were asked for beyond those that there are have no images, and are not said to lack any
    assert summary(open_data(data=str(tmp_path), num_classes=1000, val_fraction=0))[1:] == lines[1:]


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_run_begins_with_its_classes(dry_run: bool, leaking: Path, tmp_path: Path, cli: Any) -> None:
    flags = f"--student vit_tiny --model-kwargs {TINY} --loss labels --epochs 1 --batch-size 4 --workers 0"
    where = f"--data {leaking} --output {tmp_path / 'run'} --device cpu"
    code, out, err = cli("distill", *flags.split(), *where.split(), *(["--dry-run"] if dry_run else []))
    assert code == 0, err
    assert "classes  cat, dog\n" in out
    assert "training images of a class: 6 at least, median 6, 6 at most" in out
    assert "note: 2 of 6 validation images are in training, too: cat/0.png, dog/1.png" in out


@pytest.mark.parametrize(
    "command", ["distill --student vit_tiny", "eval vit_tiny", "inspect-attention vit_tiny"]
)
@pytest.mark.parametrize("flag", ["--data", "--split"])
def test_an_empty_value_is_an_error(command: str, flag: str, cli: Any) -> None:
    flag = flag.replace("split", "val-split") if command.startswith("distill") else flag
    code, out, err = cli(*command.split(), flag, "")
    assert code == 2 and f"{flag} is empty" in err and not out


def test_empty_data_of_a_recipe_is_an_error(tmp_path: Path, cli: Any) -> None:
    (tmp_path / "mine.toml").write_text('data = ""\nstudent = "vit_tiny"\nloss = "labels"\n')
    code, _, err = cli("distill", "--recipe", str(tmp_path / "mine.toml"), "--output", str(tmp_path / "run"))
    assert code == 2 and "--data is empty" in err


# columns --------------------------------------------------------------------------------------------------

IMAGES = [Image.fromarray(np.full((8, 8, 3), 20 * index, np.uint8)) for index in range(6)]
KINDS = ["dog", "cat", "dog", "cat", "ant", "ant"]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("table")  # the package takes a folder called test for a split


def saved(folder: Path, columns: dict[str, Any], kinds: dict[str, Any]) -> str:
    """A folder of Parquet files with a training and a validation split, as ``--data`` has it."""
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    features = datasets.Features({"id": datasets.Value("int64"), **kinds})
    table = datasets.Dataset.from_dict({"id": list(range(6)), **columns}, features=features)
    table.to_parquet(str(folder / "train.parquet"))
    table.select([0, 1]).to_parquet(str(folder / "validation.parquet"))
    return f"hfds/{folder}"


def test_columns_are_found_by_their_type(folder: Path, tmp_path: Path, cli: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    kinds = {"img": datasets.Image(), "fine_label": datasets.ClassLabel(names=["ant", "cat", "dog"])}
    data = saved(folder, {"img": IMAGES, "fine_label": [2, 1, 2, 1, 0, 0]}, kinds)
    found = open_data(data=data, data_dir=tmp_path)
    assert found.class_names == ("ant", "cat", "dog") and found.train is not None and found.val is not None
    assert found.train.labels() == [2, 1, 2, 1, 0, 0] and found.val.labels() == [2, 1]
    assert np.asarray(found.train[3][0]).max() == 60
    flags = f"--student vit_tiny --model-kwargs {TINY} --loss labels --steps 1 --batch-size 4 --workers 0"
    where = f"--data {data} --data-dir {tmp_path} --output {tmp_path / 'run'} --device cpu"
    assert cli("distill", *flags.split(), *where.split())[0] == 0
    config = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert config["label_names"] == ["ant", "cat", "dog"]  # the student knows its classes by name


def test_a_label_in_words_names_the_classes(folder: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    kinds = {"photo": datasets.Image(), "kind": datasets.Value("string"), "name": datasets.Value("string")}
    data = saved(folder, {"photo": IMAGES, "kind": KINDS, "name": list("abcdef")}, kinds)
    found = open_data(data=data, data_dir=tmp_path)
    assert found.class_names == ("ant", "cat", "dog") and found.train is not None and found.val is not None
    assert found.train.labels() == [2, 1, 2, 1, 0, 0] and found.val.labels() == [2, 1]
    (tmp_path / "map.txt").write_text("dog\ncat\nant\n")
    mapped = open_data(data=data, data_dir=tmp_path, class_map=tmp_path / "map.txt")
    assert mapped.train is not None and mapped.train.labels() == [0, 1, 0, 1, 2, 2]
    named = open_data(data=data, data_dir=tmp_path, target_key="name", val_split="none", val_fraction=0)
    assert named.class_names == tuple("abcdef")


def test_eval_takes_the_endings_of_a_folder(leaking: Path, cli: Any) -> None:
    for place in leaking.rglob("*.png"):
        place.rename(place.with_suffix(".ppm"))
    flags = ("--no-pretrained", "--data", str(leaking), "--device", "cpu", "--workers", "0")
    code, _, err = cli("eval", "vit_tiny", *flags)
    assert code == 2 and "6 .ppm" in err
    code, _, err = cli("eval", "vit_tiny", *flags, "--input-key", ".ppm")
    assert code == 2 and "lacks" in err  # read, and none of ImageNet's classes


def test_columns_are_asked_for_by_the_names_that_exist(folder: Path, tmp_path: Path, cli: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    label = datasets.ClassLabel(names=["ant", "cat", "dog"])
    kinds = {"img": datasets.Image(), "fine_label": label, "coarse_label": label}
    labels = [2, 1, 2, 1, 0, 0]
    data = saved(folder, {"img": IMAGES, "fine_label": labels, "coarse_label": labels}, kinds)
    flags = ("--data", data, "--data-dir", str(tmp_path), "--device", "cpu", "--workers", "0")
    code, _, err = cli("eval", "vit_tiny", "--no-pretrained", *flags)
    assert code == 2 and "which column holds the label: fine_label, coarse_label" in err
    assert "--target-key NAME" in err
    code, _, err = cli("eval", "vit_tiny", "--no-pretrained", *flags, "--target-key", "fine")
    assert code == 2 and "has no column 'fine'" in err and "fine_label (3 classes)" in err
    found = open_data(data=data, data_dir=tmp_path, target_key="coarse_label")
    assert found.class_names == ("ant", "cat", "dog")
