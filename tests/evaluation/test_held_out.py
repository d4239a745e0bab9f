"""A model is scored on images that it did not learn from, wherever it and they were moved to."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from vitkd_cli import Recipe, UserError, distill, evaluate
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.images import Stream
from vitkd_cli.data.listing import read_split
from vitkd_cli.evaluation import evaluate_all
from vitkd_cli.evaluation.images import Chosen, Provenance, _set_aside
from vitkd_cli.export import export
from vitkd_cli.inspection.images import images_of
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import recipe_of
from vitkd_cli.requests import InspectRequest
from vitkd_cli.vit.build import open_model


@pytest.fixture(scope="module")
def trained(tiny, photos, tmp_path_factory):
    """Train for one update on a copy of the photos that a function may change: ``(run folder, its data)``."""

    def train(change=lambda data: None, **values):
        place = tmp_path_factory.mktemp("trained")
        shutil.copytree(photos, place / "photos")
        change(place / "photos")
        fields = {key: value for key, value in tiny.items() if "teacher" not in key and key != "shots"}
        fields |= {"data": str(place / "photos"), "loss": "labels", "steps": 1, "val_fraction": 0.25}
        distill(Recipe(**fields | {"output": str(place / "run")} | values), reporter=Reporter(silent=True))
        return place / "run", place / "photos"

    return train


@pytest.fixture(scope="module")
def run(trained):
    return trained()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model of three classes without names."""
    import timm
    from timm.models._hub import save_for_hf

    kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **kwargs)
    save_for_hf(model, str(tmp_path_factory.mktemp("saved")), safe_serialization=True)
    return tmp_path_factory.getbasetemp() / "saved0"


@pytest.fixture
def moved(run, tmp_path):
    """The student and the images, each in a place of its own."""
    shutil.copytree(run[0] / "student", tmp_path / "student")
    shutil.copytree(run[1], tmp_path / "moved")
    return tmp_path / "student", tmp_path / "moved"


def names_in(images, root):
    return sorted(Path(images.path(i)).relative_to(root).as_posix() for i in range(len(images)))


def held_out(run):
    return sorted(read_split(run / "split.json")["validation"])


def into_splits(data):
    """A validation folder of a quarter, beside the rest."""
    for folder in [path for path in data.iterdir() if path.is_dir()]:
        for split, files in (
            ("validation", sorted(folder.iterdir())[:6]),
            ("train", sorted(folder.iterdir())),
        ):
            (data / split / folder.name).mkdir(parents=True)
            for file in files:
                if file.exists():
                    file.rename(data / split / folder.name / file.name)
        shutil.rmtree(folder)


def test_held_out_images_follow_student_and_data(run, moved, tmp_path):
    student, data = moved
    export(str(run[0]), "timm", output=tmp_path / "exported", check_forward=False)
    wanted = held_out(run[0])
    assert len(wanted) == 18
    for model, place in (
        (run[0], run[1]),
        (run[0], data),
        (student, run[1]),
        (student, data),
        (tmp_path / "exported", data),
        (student / "model.safetensors", data),
    ):
        chosen = Provenance([str(model)]).images(str(place))
        assert names_in(chosen.images, place) == wanted, (model, place)
        for index, label in enumerate(chosen.images.labels()):
            assert Path(chosen.images.path(index)).parent.name == chosen.names[label]
        assert not chosen.notes and str(place) in chosen.about


def test_a_home_in_a_name_is_expanded(run, moved, monkeypatch):
    student, data = moved
    monkeypatch.setenv("HOME", str(student.parent))
    for model in ("~/student", "local-dir:~/student", "~/student/model.safetensors"):
        assert names_in(Provenance([model]).images(str(data)).images, data) == held_out(run[0])


def test_what_a_student_carries_are_names_and_digests(run):
    config = json.loads((run[0] / "student" / "config.json").read_text())["vitkd"]["images"]
    with safe_open(run[0] / "student" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["vitkd"])["images"] == config
    assert sorted(config["validation"]["files"]) == held_out(run[0])
    assert "files" not in config["train"] and len(config["train"]["digest"]) == 64
    assert str(run[1].parent) not in json.dumps(config)


def test_a_run_is_scored_on_its_own_data(run, cli):
    code, out, err = cli("eval", str(run[0]), "-j", "0", "-q")
    assert code == 0, err
    assert f"18 images of {run[1]}, those that {run[0]} set aside" in out
    assert (
        Provenance([str(run[0] / "student")]).own_data == str(run[1])
        and Provenance(["vit_tiny"]).own_data is None
    )


def test_export_and_inspection_take_the_same_images(run, moved):
    student, data = moved
    assert names_in(images_of(InspectRequest(student, data=data)), data) == held_out(run[0])
    done = export(str(student), "state-dict", data=str(data), output=student.parent / "x.safetensors")
    assert done.found.count == 18


def test_a_model_of_no_run_is_scored_beside_one_on_what_that_held_out(saved, moved):
    student, data = moved
    names = Provenance([str(saved), str(student)]).images(str(data)).images
    found = evaluate(str(saved), str(data), beside=[str(student)], workers=0)
    assert found.metrics.count == len(names) == 18


def other_contents(data):
    for file in data.rglob("*.jpg"):
        file.write_bytes(file.read_bytes() + b"\0")


def other_folders(data):
    (data / "deep").mkdir()
    for name in ("astronaut", "cat", "coffee"):
        (data / name).rename(data / "deep" / name)
    (data / "deep").rename(data / "validation")


@pytest.mark.parametrize(
    ("change", "count", "note"),
    [
        (other_contents, 72, "have other contents: taken for other data"),
        (other_folders, 72, "of these images have name and size of ones that"),
    ],
)
def test_data_that_looks_like_the_run_s_is_told_of(moved, change, count, note):
    student, data = moved
    change(data)
    chosen = Provenance([str(student)]).images(str(data))
    assert len(chosen.images) == count and note in " ".join(chosen.notes)


def test_held_out_images_that_are_gone_are_told_of(run, moved):
    student, data = moved
    for name in held_out(run[0])[:3]:
        (data / name).unlink()
    chosen = Provenance([str(student)]).images(str(data))
    assert names_in(chosen.images, data) == held_out(run[0])[3:]
    assert "of the 18 images that" in chosen.notes[0] and "3 are gone" in chosen.notes[0]


def test_a_class_without_a_held_out_image_is_told_of(run, moved):
    student, data = moved
    shutil.rmtree(data / "cat")
    notes = Provenance([str(student)]).images(str(data)).notes
    assert "none of them is of cat" in notes[1]


def test_one_renamed_folder_is_refused_too(run, moved, cli):
    student, data = moved
    (data / "cat").rename(data / "chat")
    code, _, err = cli("eval", str(student), "--data", str(data), "-j", "0", "-q")
    assert code == 2 and "lacks: chat; its own are astronaut, cat, coffee" in err


def test_a_validation_folder_is_taken_before_what_was_held_out_of_training(trained):
    run, data = trained(into_splits, val_split="none")
    assert held_out(run)[0].startswith("train/")
    for model in (run, run / "student"):
        names = names_in(Provenance([str(model)]).images(str(data)).images, data)
        assert len(names) == 18 and all(name.startswith("validation/") for name in names)


def test_training_images_are_told_of(trained):
    run, data = trained(into_splits)
    assert not Provenance([str(run)]).images(str(data)).notes
    for place, split in ((data, "train"), (data / "train", "validation")):
        assert "was trained on these images" in Provenance([str(run)]).images(str(place), split).notes[0]


def test_a_run_that_learned_from_everything_is_not_scored_on_it(trained):
    run, _ = trained(val_fraction=0.0)
    with pytest.raises(UserError, match="learned from every image of"):
        evaluate(str(run))


def test_a_run_with_other_validation_data_set_nothing_aside(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in (f"{n}.{kind}" for n in range(40) for kind in ("png", "cls")):
            content = b"1"
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    data = f"wds:{tmp_path}/a.tar"
    alone = Recipe(student="vit_tiny", data=data)
    chosen = _set_aside(SimpleNamespace(recipe=alone, run=tmp_path), data, {})
    assert len(chosen.images) == 4
    for other in ({"val_data": "digits"}, {"num_classes": 0}):
        origin = SimpleNamespace(recipe=alone.but(**other), run=tmp_path)
        with pytest.raises(UserError, match="learned from every image of"):
            _set_aside(origin, data, {})


def test_what_the_data_was_read_with_goes_with_the_run(trained):
    def rename(data):
        for file in sorted(data.rglob("*.jpg"))[::2]:
            file.rename(file.with_suffix(".photo"))

    run, data = trained(rename, input_key=".photo")
    chosen = Provenance([str(run)]).images(str(data))
    assert len(chosen.images) == 9
    assert all(name.endswith(".photo") for name in names_in(chosen.images, data))
    assert evaluate(str(run), workers=0).metrics.count == 9


def test_runs_with_other_data_are_not_scored_together_unasked(run, trained):
    other, _ = trained()
    with pytest.raises(UserError, match="learned from different data"):
        evaluate_all([str(run[0]), str(other)])


def test_two_runs_that_set_other_images_aside(run, trained, tmp_path):
    other, _ = trained(data=str(run[1]), seed=7)
    with pytest.raises(UserError, match="set other images of"):
        Provenance([str(run[0]), str(other)]).images(str(run[1]))
    shutil.copytree(other / "student", tmp_path / "student")
    for models in ([run[0], tmp_path / "student"], [tmp_path / "student", run[0]]):
        with pytest.raises(UserError, match="set other images of"):
            Provenance(list(map(str, models))).images(str(run[1]))


def test_two_runs_that_set_other_images_of_a_dataset_aside(run, tmp_path, monkeypatch):
    def by_seed(data, *, seed, **_):
        digits = open_data(data="digits")
        return replace(digits, val=digits.train.subset([seed, seed + 1]))

    runs = [tmp_path / "a", tmp_path / "b"]
    for seed, place in enumerate(runs):
        shutil.copytree(run[0], place)
        recipe = replace(recipe_of(place), data="hfds/x", val_split="none", seed=seed)
        (place / "recipe.toml").write_text(recipe.to_toml())
    monkeypatch.setattr("vitkd_cli.evaluation.images.open_data", by_seed)
    with pytest.raises(UserError, match="set other images of hfds/x"):
        Provenance(list(map(str, runs))).images("hfds/x")


def test_a_stream_is_left_to_whoever_needs_an_index(run):
    built, stream = open_model(str(run[0])), Stream([], "hfids/x")
    names = list(built.class_names)[::-1]
    assert Chosen("hfids/x", stream, names, "").labelled_for(built) == (stream, ())


def test_data_that_is_gone(trained):
    run, data = trained()
    data.rename(data.parent / "elsewhere")
    with pytest.raises(UserError, match="is no longer at") as refused:
        evaluate(str(run))
    assert "--data PLACE" in refused.value.hint


@pytest.mark.parametrize("command", ["eval", "inspect-attention", "export"])
def test_an_unfinished_run_says_how_to_finish_it(run, cli, tmp_path, command):
    (tmp_path / "run").mkdir()
    shutil.copy(run[0] / "recipe.toml", tmp_path / "run" / "recipe.toml")
    code, _, err = cli(command, str(tmp_path / "run"), *(["--to", "torch"] if command == "export" else []))
    assert code == 2 and "has left no student yet" in err and "--resume" in err


def test_renamed_folders_are_refused_with_both_lists_and_the_cure(run, moved, cli):
    student, data = moved
    for old, new in (("astronaut", "espace"), ("cat", "chat"), ("coffee", "cafe")):
        (data / old).rename(data / new)
    arguments = ["eval", str(student), "--data", str(data), "-j", "0", "-q"]
    code, _, err = cli(*arguments)
    assert code == 2 and "lacks: cafe, chat, espace; its own are astronaut, cat, coffee" in err
    assert "--class-map" in err
    (data.parent / "map.txt").write_text("espace\nchat\ncafe\nlune\n")
    code, _, err = cli(*arguments, "--class-map", str(data.parent / "map.txt"))
    assert code == 2 and "espace" in err
    (data.parent / "map.txt").write_text("espace\nchat\n")
    assert cli(*arguments, "--class-map", str(data.parent / "map.txt"))[0] == 0


def test_how_pictures_were_decoded_follows_the_student(trained, saved, tmp_path):
    run, _ = trained(alpha_fill="black")
    shutil.copytree(run / "student", tmp_path / "student")
    for model in (run, tmp_path / "student", tmp_path / "student" / "model.safetensors"):
        assert Provenance([str(model)]).decoding().alpha_fill == "black"
    other, _ = trained()
    found = evaluate_all([str(other)], checkpoint=run / "student" / "model.safetensors", workers=0)
    assert found.images.decoding.alpha_fill == "black"
    beside = evaluate_all([saved], str(run.parent / "photos"), beside=[str(run)], workers=0)
    assert beside.images.decoding.alpha_fill == "black"


def test_a_project_that_was_moved_finds_its_data(trained, tmp_path):
    run, data = trained()
    wanted = names_in(Provenance([str(run)]).images(str(data)).images, data)
    project = run.parent.rename(tmp_path / "project")
    assert Provenance([str(project / "run")]).own_data == str(project / "photos")
    chosen = Provenance([str(project / "run")]).images(str(project / "photos"))
    assert names_in(chosen.images, project / "photos") == wanted
    assert "set aside" in chosen.about
