"""A run goes on with the images that it began with, or says what changed."""

from __future__ import annotations

import shutil
import unicodedata
from functools import partial

import pytest

from vitkd_cli import Recipe, UserError, distill
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.listing import read_split
from vitkd_cli.progress import Reporter


class Heard(Reporter):
    """Keeps what it is told."""

    def __init__(self):
        super().__init__(silent=True)
        self.lines = []

    def warn(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def began(tiny, photos, tmp_path_factory):
    """A run on train/ and validation/ that was stopped before its end."""
    place = tmp_path_factory.mktemp("began")
    for split, wanted in (("train", range(18)), ("validation", range(18, 24))):
        for name in ("astronaut", "cat", "coffee"):
            (place / "photos" / split / name).mkdir(parents=True)
            for index in wanted:
                shutil.copy(photos / name / f"{index:02d}.jpg", place / "photos" / split / name)
    fields = {key: value for key, value in tiny.items() if "teacher" not in key and key != "shots"}
    fields |= {"data": str(place / "photos"), "loss": "labels", "steps": 1, "output": str(place / "run")}
    distill(Recipe(**fields), reporter=Reporter(silent=True))
    for file in ("run.json", "result.json"):
        (place / "run" / file).unlink()
    return place


@pytest.fixture
def run(began, tmp_path):
    """A copy of it, with its data."""
    shutil.copytree(began, tmp_path / "here")
    recipe = Recipe.from_toml(tmp_path / "here" / "run" / "recipe.toml")
    recipe = recipe.but(data=str(tmp_path / "here" / "photos"))
    (tmp_path / "here" / "run" / "recipe.toml").write_text(recipe.to_toml())
    return tmp_path / "here" / "run"


def photos_of(run):
    return run.parent / "photos"


def add(data):
    shutil.copy(data / "train" / "cat" / "00.jpg", data / "train" / "cat" / "99.jpg")


def remove(data):
    (data / "validation" / "cat" / "20.jpg").unlink()


def rename(data):
    (data / "train" / "cat" / "03.jpg").rename(data / "train" / "cat" / "zz.jpg")


def exchange(data):
    shutil.copy(data / "train" / "cat" / "03.jpg", data / "train" / "coffee" / "05.jpg")


CHANGES = {
    add: ["train: 1 new (train/cat/99.jpg)"],
    remove: ["validation: 1 gone (validation/cat/20.jpg)"],
    rename: ["1 gone (train/cat/03.jpg)", "1 new (train/cat/zz.jpg)"],
    exchange: ["train: 1 of another size (train/coffee/05.jpg)"],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_images_are_refused_with_what_changed(run, change):
    change(photos_of(run))
    with pytest.raises(UserError, match=r"the data of .* changed") as refused:
        distill(resume=run, reporter=Reporter(silent=True))
    assert all(words in refused.value.message for words in CHANGES[change])
    assert "--accept-changed-data" in refused.value.hint
    heard = Heard()
    assert distill(resume=run, accept_changed_data=True, reporter=heard) is not None
    assert any(CHANGES[change][0] in line for line in heard.lines)
    assert (run / "student" / "config.json").is_file()


def test_other_classes_are_never_accepted(run):
    for split in ("train", "validation"):
        (photos_of(run) / split / "coffee").rename(photos_of(run) / split / "tea")
    with pytest.raises(UserError, match="classes: coffee gone and tea new") as refused:
        distill(resume=run, accept_changed_data=True, reporter=Reporter(silent=True))
    assert "start a new run" in refused.value.hint


def test_data_that_moved_is_gone_on_with(run):
    new = photos_of(run).rename(run.parent / "new")
    with pytest.raises(UserError, match="is no longer at"):
        distill(resume=run, reporter=Reporter(silent=True))
    assert distill(resume=run, machine={"data": str(new)}, reporter=Reporter(silent=True)) is not None
    assert Recipe.from_toml(run / "recipe.toml").data == str(new)


def test_other_data_is_no_moved_data(run, photos):
    with pytest.raises(UserError, match=r"the data of .* changed"):
        distill(resume=run, machine={"data": str(photos)}, reporter=Reporter(silent=True))
    (run / "data.json").unlink()
    with pytest.raises(UserError, match="has no record of its images"):
        distill(resume=run, machine={"data": str(photos)}, reporter=Reporter(silent=True))


def test_the_flags_reach_the_run(run, cli):
    add(photos_of(run))
    new = photos_of(run).rename(run.parent / "new")
    arguments = ["distill", "--resume", str(run), "--data", str(new), "--device", "cpu"]
    code, _, err = cli(*arguments)
    assert code == 2 and "1 new (train/cat/99.jpg)" in err
    assert cli(*arguments, "--accept-changed-data")[0] == 0
    code, _, err = cli("distill", "--data", str(new), "--accept-changed-data")
    assert code == 2 and "is about a run that goes on" in err


@pytest.mark.parametrize("text", ["[]", "null", "{", '{"held_out": false, "classes": null, "train": 3}'])
def test_a_damaged_record_is_named(run, text):
    (run / "data.json").write_text(text)
    with pytest.raises(UserError, match=r"data\.json is damaged"):
        distill(resume=run, reporter=Reporter(silent=True))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("null", "is damaged: it lists no training and validation images"),
        ('{"train": ["a/1.jpg"]}', "is damaged: it lists no"),
        ('{"train": [1], "validation": []}', "is damaged: it lists no"),
        ('{"train": [], "validation": []}', "is damaged: it lists no"),
        ("{", "is damaged: it lists no"),
        (
            '{"train": ["a/1.jpg", "a/2.jpg"], "validation": ["a/1.jpg"]}',
            r"is damaged: a/1\.jpg in both training and validation",
        ),
    ],
)
def test_a_damaged_split_is_named(tmp_path, text, message):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(UserError, match=message):
        read_split(tmp_path / "split.json")


def test_a_class_map_s_names_that_are_no_folders_are_named(photos, tmp_path):
    (tmp_path / "map.txt").write_text("cat\ncofee\nastronaut\n")
    data = open_data(data=str(photos), class_map=str(tmp_path / "map.txt"))
    assert any("names 1 folders that" in note and note.endswith("lacks: cofee") for note in data.notes)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_split_that_was_saved_on_a_mac_is_found_again(photos, tmp_path, form):
    for name in ("café", "thé"):
        shutil.copytree(photos / "cat", tmp_path / unicodedata.normalize(form, name))
    first = open_data(data=str(tmp_path))
    composed = partial(unicodedata.normalize, "NFC")
    split = {key: list(map(composed, names)) for key, names in first.split_files.items()}
    again = open_data(data=str(tmp_path), split_files=split)
    assert again.class_names == ("café", "thé")
    assert len(again.train) == len(first.train) and len(again.val) == len(first.val)


def test_validation_data_is_matched_by_name(tiny, photos, tmp_path):
    """torchvision sorts folders as text, we as numbers: the names say which is which."""
    from vitkd_cli.training.data import data_of

    for name, source in (("2", "cat"), ("10", "coffee")):
        shutil.copytree(photos / source, tmp_path / "own" / name)
        shutil.copytree(photos / source, tmp_path / "other" / "train" / name)
        shutil.copytree(photos / source, tmp_path / "other" / "val" / name)
    fields = {key: value for key, value in tiny.items() if "teacher" not in key and key != "shots"}
    fields |= {"data": str(tmp_path / "own"), "loss": "labels"}
    recipe = Recipe(**fields, val_data=str(tmp_path / "other"))
    data = data_of(recipe, True, None)
    assert data.class_names == ("2", "10")
    shutil.rmtree(tmp_path / "other" / "train" / "2")
    shutil.rmtree(tmp_path / "other" / "val" / "2")
    data = data_of(recipe, True, None)
    assert set(data.val.labels()) == {1}  # coffee, of the run's classes
    (tmp_path / "other" / "train" / "10").rename(tmp_path / "other" / "train" / "ten")
    (tmp_path / "other" / "val" / "10").rename(tmp_path / "other" / "val" / "ten")
    with pytest.raises(UserError, match="has other classes than own: ten, not 2, 10"):
        data_of(recipe, True, None)
