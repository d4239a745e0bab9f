"""From a teacher without a head, over images without labels, to a classifier of few labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from vitkd_cli import Recipe, UserError, distill
from vitkd_cli.data.datasets import open_data

TEACHER = "img_size=32,patch_size=8,embed_dim=48,depth=3,num_heads=3"
STUDENT = "img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3"


@pytest.fixture(scope="module")
def flat(photos, tmp_path_factory) -> Path:
    """The photographs without their class folders."""
    folder = tmp_path_factory.mktemp("flat")
    for path in sorted(photos.rglob("*.jpg")):
        shutil.copy(path, folder / f"{path.parent.name}-{path.name}")
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A DINOv2-style teacher: registers, no head; its weights in a file."""
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3
    )
    assert model.num_classes == 0
    path = tmp_path_factory.mktemp("teacher") / "dino.safetensors"
    save_file(model.state_dict(), path)
    return path


def recipe(flat: Path, weights: Path, output: Path, **changes) -> Recipe:
    return Recipe(
        **{
            "teacher": "vit_small_patch14_reg4_dinov2",
            "teacher_checkpoint": str(weights),
            "teacher_kwargs": TEACHER,
            "student": "vit_tiny",
            "model_kwargs": STUDENT,
            "data": str(flat),
            "loss": "features",
            "epochs": 2,
            "batch_size": 24,
            "workers": 0,
            "device": "cpu",
            "output": str(output),
            **changes,
        }
    )


def test_the_whole_road(flat, photos, teacher, tmp_path, cli):
    run = distill(recipe(flat, teacher, tmp_path / "features", val_data=str(photos), checkpoint_hist=9))
    result = json.loads((run.folder / "result.json").read_text())
    assert 0 < result["top1"] <= result["top5"] <= 100 and result["loss"] is None
    assert len(result["history"]) == 2 and run.teacher.top1 is not None  # scored alike, so comparable
    assert not (run.folder / "split.json").exists()

    headless = timm.create_model(f"local-dir:{run.student}", pretrained=True).eval()
    assert headless.num_classes == 0 and headless(torch.rand(1, 3, 32, 32)).shape == (1, 24)
    learned = load_file(run.student / "model.safetensors")
    assert not any(key.startswith("head") for key in learned)

    # Cut back to the first epoch, it goes on to the same student.
    (run.folder / "run.json").unlink()
    (run.folder / "result.json").unlink()
    for checkpoint in sorted((run.folder / "checkpoints").glob("update-*"))[1:]:
        shutil.rmtree(checkpoint)
    distill(resume=run.folder)
    again = load_file(run.student / "model.safetensors")
    assert all(torch.equal(again[key], learned[key]) for key in learned)

    code, out, err = cli(
        "distill", "--student", str(run.folder), "--pretrained", "--loss", "labels", "--data", str(photos),
        "--shots", "5", "--epochs", "1", "-b", "4", "--lr", "1e-45", "--warmup-lr", "0", "--min-lr", "0",
        "--workers", "0", "--device", "cpu", "--output", str(tmp_path / "tuned"),
    )  # fmt: skip
    assert code == 0, out + err
    tuned = load_file(tmp_path / "tuned" / "student" / "model.safetensors")
    assert tuned["head.weight"].shape == (3, 24)
    assert all(torch.equal(tuned[key], learned[key]) for key in learned)  # at so small a rate nothing moved


def test_logits_need_no_labels(flat, teacher, tmp_path):
    teaching = {"teacher": "vit_tiny", "teacher_checkpoint": None, "teacher_pretrained": False}
    kwargs = {"teacher_kwargs": f"{TEACHER},num_classes=7", "loss": "kd", "epochs": 1}
    run = distill(recipe(flat, teacher, tmp_path / "kd", **teaching, **kwargs))
    student = timm.create_model(f"local-dir:{run.student}", pretrained=True)
    assert student.num_classes == 7 and run.results[0].top1 is None


def test_a_validation_folder_of_one_split_is_scored_image_by_image(flat, photos, teacher, tmp_path):
    shutil.copytree(photos, tmp_path / "labelled" / "validation")
    changes = {"val_data": str(tmp_path / "labelled"), "epochs": 1}
    run = distill(recipe(flat, teacher, tmp_path / "run", **changes))
    assert run.results[0].top1 is not None and run.teacher.top1 is not None


def test_nothing_is_held_out_beside_a_validation_folder(photos, tmp_path):
    changes = {"loss": "labels", "teacher": None, "teacher_checkpoint": None, "teacher_kwargs": None}
    run = distill(recipe(photos, photos, tmp_path / "run", val_data=str(photos), epochs=1, **changes))
    assert run.results[0].loss is not None and not (run.folder / "split.json").exists()


def test_a_labelled_folder_may_be_used_for_its_images(photos, teacher, tmp_path):
    run = distill(recipe(photos, teacher, tmp_path / "labelled", num_classes=0, epochs=1))
    assert run.results[0].top1 is None and not (run.folder / "split.json").exists()


def test_all_images_below_count_but_hidden_ones(flat, tmp_path):
    folder = tmp_path / "nested"
    shutil.copytree(flat, folder)
    (folder / "more").mkdir()
    (folder / ".thumbs").mkdir()
    for name in ("more", ".thumbs"):
        shutil.copy(next(flat.glob("*.jpg")), folder / name / "again.jpg")
    found = open_data(data=str(folder), unlabelled=True)
    assert len(found.train) == 72 + 1 and not found.labelled and set(found.train.labels()) == {-1}


@pytest.mark.parametrize(
    ("changes", "message", "hint"),
    [
        ({"loss": "labels + features"}, "no class folders", "features"),
        ({"shots": 3}, "shots needs classes", "leave out --shots"),
        ({"eval_metric": "loss"}, "nearest neighbours have none", "top1"),
        ({"select": "best"}, "needs a validation split", ""),
        ({"loss": "kd"}, "not known beforehand", "--num-classes"),
    ],
)  # fmt: skip
def test_what_unlabelled_images_cannot_do(flat, teacher, tmp_path, changes, message, hint):
    with pytest.raises(UserError) as refusal:
        distill(recipe(flat, teacher, tmp_path / "no", **changes))
    assert message in refusal.value.message and hint in refusal.value.hint
    assert not (tmp_path / "no").exists()
