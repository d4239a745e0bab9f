"""Evaluation gives timm's own numbers, each image once."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy

from vitkd_cli import UserError, evaluate
from vitkd_cli.evaluation import measure

MODELS = {
    "vit_tiny_patch16_224": {"patch_size": 16, "embed_dim": 48, "depth": 2, "num_heads": 3},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "swin_tiny_patch4_window7_224": {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)},
    "beit_base_patch16_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
    "eva02_tiny_patch14_224": {"embed_dim": 48, "depth": 2, "num_heads": 3},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random model of three classes in timm's own folder format."""
    from timm.models._hub import save_for_hf

    def save(name):
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=3, **MODELS[name])
        folder = tmp_path_factory.mktemp("model") / name
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        save_for_hf(model, str(folder), safe_serialization=True)
        return folder

    return save


@torch.inference_mode()
def as_timm_validates(folder, data, **options):
    """What timm's validate.py does, with timm's own functions."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_data_config(options, model=model, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=str(data), split="validation"),
        input_size=config["input_size"],
        batch_size=16,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for images, target in loader:
        output = model(images)
        first, fifth = accuracy(output, target, topk=(1, 3))
        top1.update(float(first), len(images))
        top5.update(float(fifth), len(images))
        loss.update(float(torch.nn.functional.cross_entropy(output, target)), len(images))
    return top1.avg, top5.avg, loss.avg, top1.count


@pytest.mark.parametrize("name", MODELS)
def test_it_equals_timm(saved, photos, name):
    folder = saved(name)
    top1, _, loss, count = as_timm_validates(folder, photos)
    found = evaluate(f"local-dir:{folder}", str(photos), batch_size=10, workers=0)
    assert found.metrics.count == count == 72  # also with a ragged last batch
    assert found.metrics.top1 == pytest.approx(top1)
    assert found.metrics.loss == pytest.approx(loss, rel=1e-5)
    assert found.metrics.top5 == 100  # of three classes


def test_it_equals_timm_with_another_crop(saved, photos):
    folder = saved("vit_tiny_patch16_224")
    top1, _, loss, _ = as_timm_validates(folder, photos, crop_pct=0.6, interpolation="bilinear")
    found = evaluate(f"local-dir:{folder}", str(photos), crop_pct=0.6, interpolation="bilinear", workers=0)
    assert found.preprocessing["crop_pct"] == 0.6
    assert (found.metrics.top1, found.metrics.loss) == pytest.approx((top1, loss), rel=1e-5)


def test_two_processes_count_each_image_once(saved, photos, vitkd):
    folder = saved("vit_tiny_patch16_224")
    arguments = ["eval", f"local-dir:{folder}", "--data", str(photos), "--json", "-j", "0", "-b", "7"]
    one, two = (
        json.loads(vitkd(*arguments, "--num-processes", str(processes)).stdout) for processes in (1, 2)
    )
    assert one["count"] == two["count"] == 72
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    assert (one["top1"], one["top5"]) == (two["top1"], two["top5"])


def test_measure_keeps_the_dataset_s_order():
    scores = torch.tensor([[0.0, 1, 2], [3.0, 1, 2], [0.0, 5, 2]])
    labels = torch.tensor([2, 1, 1])
    images = torch.zeros(3, 3, 1, 1, dtype=torch.uint8)
    positions = torch.tensor([2, 0, 1])
    found = measure(lambda _: scores, [(images, labels, positions)], 3, device=torch.device("cpu"))
    assert found.predictions.tolist() == [0, 1, 2]
    assert found.top1 == pytest.approx(200 / 3) and found.count == 3
    assert found.agreement(found) == 100


def test_a_model_without_classes_is_refused(tmp_path, photos):
    from timm.models._hub import save_for_hf

    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, depth=1)
    save_for_hf(model, str(tmp_path / "headless"), safe_serialization=True)
    with pytest.raises(UserError, match="has no classes to score"):
        evaluate(f"local-dir:{tmp_path / 'headless'}", str(photos))


def test_other_classes_are_refused(saved, tmp_path, photos):
    import shutil

    folder = saved("vit_tiny_patch16_224")
    shutil.copytree(photos, tmp_path / "more")
    shutil.copytree(photos / "cat", tmp_path / "more" / "dog")
    with pytest.raises(UserError, match="4 classes, the model 3"):
        evaluate(f"local-dir:{folder}", str(tmp_path / "more"))


def test_a_run_is_scored_on_the_images_that_it_set_aside(tiny, flags, cli, photos, tmp_path):
    kwargs = tiny["teacher_kwargs"].replace("num_classes=10", "num_classes=3")
    values = {**tiny, "data": str(photos), "shots": 5, "batch_size": 10, "steps": 1, "teacher_kwargs": kwargs}
    values["val_fraction"] = 0.25
    assert cli("distill", *flags(values), "--output", str(tmp_path / "run"))[0] == 0
    held_out = json.loads((tmp_path / "run" / "split.json").read_text())["validation"]
    for model in ("run", "run/student"):
        code, out, err = cli("eval", str(tmp_path / model), "--data", str(photos), "--json", "-j", "0", "-q")
        assert code == 0, err
        assert json.loads(out)["count"] == len(held_out) == 18
