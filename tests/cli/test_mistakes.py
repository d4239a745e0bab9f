"""Every mistake a user can make gets one clear line with a cure, and loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from vitkd_cli.data.datasets import open_data


@pytest.fixture
def refused(cli, flags, tiny, tmp_path):
    """Run ``vitkd distill`` with changes to a recipe that works; the two lines that it prints."""

    def run(*more: str, code: int = 2, **changes) -> str:
        values = {key: value for key, value in {**tiny, **changes}.items() if value is not None}
        if "output" not in values:
            values["output"] = str(tmp_path / "run")
        got, _, err = cli("distill", *flags(values), *more)
        assert got == code, err
        assert not (tmp_path / "run").exists() or code == 3  # nothing is left for a second try to meet
        lines = err.strip().splitlines()
        lines = [line for line in lines if not line.startswith("  ")]  # details
        assert len(lines) <= 2 and lines[0].startswith("error: "), err
        return err

    return run


def test_names(refused):
    assert "deit_small" in refused(student="deit_smal")
    assert "ambiguous" in refused(student="cait")
    assert "no ViT" in refused(teacher="resnet50") or "no vision" in refused(teacher="resnet50")
    assert "no student is named" in refused(student=None)
    assert "--teacher NAME" in refused(teacher=None)


def test_weights(refused, tmp_path):
    message = refused(teacher_pretrained=True, teacher_kwargs=None)
    assert "model.safetensors" in message and "--teacher-checkpoint" in message
    assert "there is no weight file" in refused(teacher_checkpoint=str(tmp_path / "none.pth"))
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    assert "is no safetensors file" in refused(teacher_checkpoint=str(tmp_path / "junk.safetensors"))
    torch.save({"model": Pickled()}, tmp_path / "unsafe.pth")
    message = refused(teacher_checkpoint=str(tmp_path / "unsafe.pth"))
    assert "pickle" in message and not Pickled.ran


class Pickled:
    ran = False

    def __reduce__(self):
        return (setattr, (Pickled, "ran", True))


def test_class_counts(refused, tiny):
    kwargs = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=7")
    message = refused(teacher_kwargs=kwargs)
    assert "7" in message and "10" in message
    assert message.index("--finetune-teacher") < message.index("labels + vitkd")
    headless = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=0")
    assert "vitkd" in refused(teacher_kwargs=headless)


def test_sizes(refused):
    message = refused(img_size=50, model_kwargs="patch_size=8,embed_dim=24,depth=3,num_heads=3")
    assert "50" in message and "8" in message
    assert "takes no argument 'embed_dims'" in refused(model_kwargs="embed_dims=3")
    assert "cannot read 'depth'" in refused(model_kwargs="depth")
    assert "even" in refused(batch_size=5)
    assert "400" in refused(batch_size=400)


def test_data(refused, photos, tmp_path):
    assert "none" in refused(data=str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    assert "empty" in refused(data=str(tmp_path / "empty"))
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "a.png")
    assert "FOLDER/CLASS/image.jpg" in refused(data=str(flat))
    split = tmp_path / "split"
    shutil.copytree(photos, split / "train")
    shutil.copytree(photos, split / "val")
    (split / "val" / "cat").rename(split / "val" / "dog")
    message = refused(data=str(split), shots=None)
    assert "dog" in message
    assert "no device 'tpu'" in refused(device="tpu")


def test_broken_images_are_listed_at_once_before_training(refused, cli, flags, tiny, photos, tmp_path):
    root = tmp_path / "broken"
    shutil.copytree(photos, root)
    data = open_data(data=str(root))
    cut, empty, text = data.train.path(5), data.train.path(9), data.val.path(0)
    Path(cut).write_bytes(Path(cut).read_bytes()[:-100])
    Path(empty).write_bytes(b"")
    Path(text).write_text("no image")
    values = {"data": str(root), "shots": None, "batch_size": 22, "loss": "labels + vitkd"}
    message = refused(code=3, **values)
    assert "3 of 72 image files cannot be read" in message and "--skip-corrupt" in message
    for file, why in ((cut, "truncated"), (empty, "the file is empty"), (text, "not a picture")):
        assert f"{file}: " in message and why in message.partition(f"{file}: ")[2].partition("\n")[0]
    assert not (tmp_path / "run").exists()

    run = tmp_path / "skipping"
    values = {**tiny, **values, "output": str(run), "skip_corrupt": True}
    del values["shots"]
    code, out, err = cli("distill", *flags(values))
    assert code == 0, err
    assert "3 of 72 image files cannot be read" in out and "validation goes without 1" in out
    assert "unreadable image was replaced" in out
    assert json.loads((run / "result.json").read_text())["images"] == len(data.val) - 1
    assert {cut, empty, text} == set((run / "skipped.txt").read_text().split("\n")) - {""}
    code, _, err = cli("eval", str(run), "--data", str(root), "-q", "-j", "0")
    assert code == 3 and f"{text}: not a picture" in err and "eval leaves out none" in err


def test_the_formula(refused):
    assert "did you mean nkd" in refused(loss="labels + nkdd")
    assert "cannot be read" in refused(loss="labels +")
    assert "no option 'gama'" in refused(loss="labels + nkd(gama=1)")
    assert "no block 7" in refused(loss="labels + mimic(blocks=7)")
    assert "--baseline" in refused("--baseline", loss="vitkd")


def test_nkd_with_two_classes(refused, tiny, photos, tmp_path):
    two = tmp_path / "two"
    shutil.copytree(photos, two)
    shutil.rmtree(two / "cat")
    kwargs = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=2")
    assert "kd" in refused(data=str(two), teacher_kwargs=kwargs)


def test_the_recipe(refused, tmp_path):
    toml = tmp_path / "my.toml"
    toml.write_text("epoch = 3\n")
    message = refused("--recipe", str(toml))
    assert "'epoch'" in message and str(toml) in message and "did you mean epochs" in message
    toml.write_text("epochs = 'many'\n")
    assert "epochs must be a whole number" in refused("--recipe", str(toml), epochs=None)
    toml.write_text("epochs = \n")
    assert "is not TOML" in refused("--recipe", str(toml))
    assert "did you mean finetune" in refused("--recipe", "finetun")
    assert "--remode must be one of" in refused(remode="pixle")
    assert "--opt adamm" in refused(opt="adamm")
    assert "scheduler" in refused(sched="cosin") or "--sched" in refused(sched="cosin")
    assert "needs an average" in refused(select="ema")
    assert "timm cannot read" in refused(aa="randaugment")
    assert "no tracker 'notebook'" in refused(log_with="notebook")
    assert "pip install comet_ml" in refused(log_with="comet_ml")


def test_the_output_folder(refused, cli, flags, tiny, tmp_path):
    kept = tmp_path / "mine"
    kept.mkdir()
    (kept / "thesis.txt").write_text("three years")
    assert "is not empty" in refused(output=str(kept))
    assert "no run (thesis.txt); it was not touched" in refused("--overwrite", output=str(kept))
    assert (kept / "thesis.txt").read_text() == "three years"
    values = {**tiny, "steps": 1, "output": str(tmp_path / "done")}
    assert cli("distill", *flags(values))[0] == 0
    message = refused(output=str(tmp_path / "done"))
    assert "--overwrite" in message and "--resume" in message
    assert cli("distill", *flags(values), "--overwrite")[0] == 0
    (tmp_path / "done" / "notes.txt").write_text("mine")
    assert "notes.txt" in refused("--overwrite", output=str(tmp_path / "done"))
    assert (tmp_path / "done" / "run.json").exists()
    own = tmp_path / "own"
    own.mkdir()
    (own / "recipe.toml").write_text("# written by hand\nepochs = 1\n")
    assert "is not empty" in refused("--recipe", str(own / "recipe.toml"), output=str(own))
    assert (own / "recipe.toml").read_text().startswith("# written by hand")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(output=str(tmp_path / "file"))


def test_what_only_the_formula_can_say(cli):
    code, _, err = cli("distill", "--kd-temperature", "4")
    assert code == 2 and "kd(temperature=…)" in err
    code, _, err = cli("distill", "--opt-betas", "0.9", "0.999")
    assert code == 2 and "--opt-betas 0.9,0.999" in err
    code, _, err = cli("distill", "--epoch", "3")
    assert code == 2 and "--epochs" in err


def test_a_teacher_smaller_than_the_student_is_only_warned_of(cli, flags, tiny, tmp_path):
    values = {**tiny, "steps": 1, "output": str(tmp_path / "run")}
    values["teacher_kwargs"] = tiny["teacher_kwargs"].replace("embed_dim=48", "embed_dim=12")
    code, out, _ = cli("distill", *flags(values))
    assert code == 0 and "is smaller than the student" in out


def test_a_run_never_destroys_what_it_reads(refused, cli, flags, tiny, tmp_path):
    teacher = tmp_path / "teacher"
    assert cli("distill", *flags({**tiny, "steps": 1, "output": str(teacher)}))[0] == 0
    message = refused(
        "--overwrite", teacher=str(teacher), teacher_kwargs=None, teacher_pretrained=True, output=str(teacher)
    )
    assert "holds what this run reads (teacher)" in message
    assert (teacher / "student" / "model.safetensors").exists()


def test_a_teacher_of_other_classes(refused, cli, flags, tiny, photos, tmp_path):
    three = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=3")
    values = {**tiny, "data": str(photos), "shots": 5, "batch_size": 10, "steps": 1, "teacher_kwargs": three}
    assert cli("distill", *flags(values), "--output", str(tmp_path / "teacher"))[0] == 0
    other = tmp_path / "other"
    shutil.copytree(photos, other)
    (other / "cat").rename(other / "dog")
    changes = {"teacher": str(tmp_path / "teacher"), "teacher_kwargs": None, "teacher_pretrained": True}
    message = refused(**{**values, "data": str(other), **changes})
    assert "lacks: dog; its own are astronaut, cat, coffee" in message and "--finetune-teacher" in message


def test_best_needs_a_validation_split(refused, photos):
    message = refused(
        data=str(photos), shots=None, val_fraction=0.0, select="best", loss="labels", teacher=None
    )
    assert "needs a validation split" in message
