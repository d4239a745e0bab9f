"""Classes and embeddings of images: the same as eval's, in three forms, whole after a kill."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import sys
from multiprocessing import get_context

import pytest
import timm
import torch
from safetensors import safe_open
from timm.models._hub import save_for_hf

from vitkd_cli import UserError, evaluate_all, predict
from vitkd_cli.cli import main
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.transforms import view_of
from vitkd_cli.evaluation import opening, predictions
from vitkd_cli.requests import PredictRequest

KWARGS = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Random models: one of the photos' three classes with their names, one without a head."""
    folders = []
    for name, classes in (("three", 3), ("bare", 0)):
        torch.manual_seed(5)
        net = timm.create_model("vit_tiny_patch16_224", num_classes=classes, **KWARGS)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        if classes:
            net.pretrained_cfg = {**net.pretrained_cfg, "label_names": ["astronaut", "cat", "coffee"]}
        folders.append(tmp_path_factory.mktemp("models") / name)
        config = {"label_names": ["astronaut", "cat", "coffee"]} if classes else {}
        save_for_hf(net, str(folders[-1]), model_config=config, safe_serialization=True)
    return [f"local-dir:{folder}" for folder in folders]


OPTIONS = {"workers": 0, "device": "cpu"}


def rows_of(file):
    with open(file, newline="", encoding="utf-8") as opened:
        return [*csv.DictReader(opened)]


def test_it_says_what_eval_says(models, photos, tmp_path):
    evaluate_all(models[:1], str(photos), predictions=str(tmp_path / "eval.csv"), **OPTIONS)
    found = predict(models[0], [str(photos)], output=str(tmp_path / "own.csv"), **OPTIONS)
    theirs, ours = rows_of(tmp_path / "eval.csv"), rows_of(tmp_path / "own.csv")
    assert len(ours) == len(theirs) == 72 and len({row["class_1"] for row in ours}) > 1
    for one, other in zip(ours, theirs, strict=True):
        assert (one["image"], one["class_1"]) == (other["image"], other["prediction"])
        assert one["name_1"] == other["prediction_name"]
        assert float(one["probability_1"]) == pytest.approx(float(other["confidence"]), rel=1e-6)
        assert sum(float(one[f"probability_{k}"]) for k in (1, 2, 3)) == pytest.approx(1)
        assert "class_4" not in one  # of three
    by_data = predict(models[0], data=str(photos), topk=1, **OPTIONS)
    assert by_data.images == found.images and torch.equal(by_data.classes[:, 0], found.classes[:, 0])


@pytest.mark.parametrize("embed", [False, True])
def test_every_form_holds_the_same(models, photos, tmp_path, embed):
    pytest.importorskip("pyarrow")
    from pyarrow import parquet

    files = {ending: tmp_path / f"said.{ending}" for ending in ("csv", "parquet", "safetensors")}
    for file in files.values():
        found = predict(models[embed], [str(photos)], embed=embed, output=str(file), **OPTIONS)
    text, table = rows_of(files["csv"]), parquet.read_table(files["parquet"]).to_pylist()
    with safe_open(files["safetensors"], "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    assert tuple(bytes(tensors["images"].numpy()).decode().split("\0")) == found.images
    assert [row["image"] for row in text] == [row["image"] for row in table] == [*found.images]
    if embed:
        assert found.embeddings.shape == (72, 24) and torch.equal(tensors["embeddings"], found.embeddings)
        assert torch.equal(torch.tensor([row["embedding"] for row in table]), found.embeddings)
        written = torch.tensor([[float(row[f"e{i}"]) for i in range(24)] for row in text])
        assert torch.equal(written, found.embeddings)
    else:
        assert json.loads(about["class_names"]) == ["astronaut", "cat", "coffee"]
        assert torch.equal(tensors["classes"].long(), found.classes)
        for kind in (text, table):
            shares = torch.tensor([[float(row[f"probability_{k}"]) for k in (1, 2, 3)] for row in kind])
            assert torch.equal(shares, tensors["probabilities"])
            assert [row["name_2"] for row in kind] == [found.names[c] for c in found.classes[:, 1]]


def test_embeddings_are_the_model_s(models, photos):
    from PIL import Image
    from timm.data import create_transform, resolve_data_config

    found = predict(models[1], [str(photos / "cat")], embed=True, **OPTIONS)
    net = timm.create_model(models[1], pretrained=True).eval()
    view = create_transform(**resolve_data_config({}, model=net))
    with torch.inference_mode():
        own = net(torch.stack([view(Image.open(path).convert("RGB")) for path in found.images]))
    torch.testing.assert_close(found.embeddings, own, rtol=1e-4, atol=1e-5)


def killed_at_the_third_part(arguments: list[str]) -> None:
    """``vitkd ARGUMENTS``, in a process of its own."""
    predictions.EVERY = 0.0
    write, written = predictions._Parts.write, []

    def then_die(self, *args):
        write(self, *args)
        written.append(1)
        if len(written) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    predictions._Parts.write = then_die
    sys.argv = ["vitkd", *arguments]
    main()


def test_a_call_that_was_killed_goes_on(models, photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "data")
    out, data = tmp_path / "out.safetensors", tmp_path / "data"
    command = ["predict", models[0], "--images", str(data), "-o", str(out), "-b", "8", "-j", "0"]
    arguments = [*command, "--device", "cpu"]
    forked = get_context("fork").Process(target=killed_at_the_third_part, args=[arguments])
    forked.start()
    forked.join(60)
    assert forked.exitcode == -signal.SIGKILL and not out.exists()
    assert len([*(tmp_path / "out.safetensors.parts").iterdir()]) == 3
    changed = data / "astronaut" / "00.jpg"
    shutil.copy(data / "cat" / "00.jpg", changed)
    (data / "astronaut" / "01.jpg").unlink()
    seen, real = [], opening.val_loader

    def counting(some, *given, **options):
        seen.append(len(some))
        return real(some, *given, **options)

    monkeypatch.setattr(opening, "val_loader", counting)
    found = predict(models[0], [str(data)], output=str(out), batch_size=8, **OPTIONS)
    assert (found.resumed, seen) == (22, [71 - 22])  # of 24, one is other and one is gone
    assert out.exists() and not (tmp_path / "out.safetensors.parts").exists()
    whole = predict(models[0], [str(data)], batch_size=8, **OPTIONS)
    assert whole.images == found.images and torch.equal(whole.classes, found.classes)
    # Batches that are made up otherwise round otherwise.
    torch.testing.assert_close(whole.probabilities, found.probabilities, rtol=1e-5, atol=1e-7)


def test_parts_of_another_request_are_not_taken(models, photos, tmp_path, monkeypatch):
    out = tmp_path / "out.csv"
    monkeypatch.setattr(predictions, "EVERY", 0.0)
    monkeypatch.setattr(predictions.Predictions, "write", lambda *_: 1 / 0)

    def stopped(**options):
        with pytest.raises(ZeroDivisionError):
            predict(models[0], [str(photos)], output=str(out), batch_size=24, **OPTIONS, **options)

    stopped()
    assert len([*(tmp_path / "out.csv.parts").iterdir()]) == 2
    kept = {file.name for file in (tmp_path / "out.csv.parts").iterdir()}
    stopped(topk=2)
    assert kept.isdisjoint(file.name for file in (tmp_path / "out.csv.parts").iterdir())
    damaged = next((tmp_path / "out.csv.parts").iterdir())
    damaged.write_bytes(damaged.read_bytes()[:-5])
    monkeypatch.undo()
    found = predict(models[0], [str(photos)], output=str(out), topk=2, **OPTIONS)
    assert found.resumed == 24 and len(rows_of(out)) == 72


def test_what_cannot_be_read_is_refused_together_or_left_out(models, photos, tmp_path, cli):
    shutil.copytree(photos, tmp_path / "data")
    for name in ("cat/00.jpg", "coffee/05.jpg"):
        (tmp_path / "data" / name).write_bytes(b"no picture")
    arguments = ["predict", models[0], "--images", str(tmp_path / "data"), "-j", "0", "--device", "cpu"]
    code, out, err = cli(*arguments)
    assert code == 3 and "2 of 72 image files cannot be read" in err and "--skip-corrupt" in err
    assert "cat/00.jpg" in err and "coffee/05.jpg" in err and not out
    code, out, err = cli(*arguments, "--skip-corrupt")
    assert code == 0 and len(out.splitlines()) == 71 and "2 files cannot be read and are left out" in err
    assert "cat/00.jpg" in err and "cat/00.jpg" not in out


def test_imagenet_s_classes_are_said_in_words(photos):
    found = predict("deit_tiny", [str(photos / "cat" / "00.jpg")], pretrained=False, **OPTIONS)
    assert len(found.names) == 1000 and found.names[281] == "tabby, tabby cat"
    assert [*found.columns()][:4] == ["image", "class_1", "name_1", "probability_1"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "x.txt"}, "--output x.txt is no .csv or .parquet or .safetensors"),
        ({"data": "digits"}, "exclude each other"),
        ({"topk": 0}, "topk must be at least 1"),
        ({"embed": True, "test_time_pool": True}, "--test-time-pool is about heads"),
        ({"images": ("nowhere.jpg",)}, "there is no image or folder nowhere.jpg"),
        ({}, "has no classes: it gives an embedding"),
    ],
)
def test_what_does_not_fit_is_refused(models, photos, settings, message):
    with pytest.raises(UserError, match=message):
        predict(models[1], **{"images": [str(photos)], **OPTIONS, **settings})


def test_an_output_is_not_replaced_unasked(models, photos, tmp_path, cli):
    out = tmp_path / "out.csv"
    arguments = ["predict", models[0], "--images", str(photos), "-o", str(out), "-j", "0", "--device", "cpu"]
    assert "72 images" in cli(*arguments)[1]
    before = os.stat(out).st_mtime_ns
    code, _, err = cli(*arguments)
    assert code == 2 and "--overwrite replaces it" in err and os.stat(out).st_mtime_ns == before
    assert cli(*arguments, "--overwrite")[0] == 0 and os.stat(out).st_mtime_ns != before


def test_a_batch_fits_the_caches_of_a_cpu():
    images, sizes = open_data(data="digits").val.subset(range(70)), []
    table, view = torch.zeros(70, 1), view_of({"input_size": (3, 16, 16)})

    def answer(labels, seen):
        return labels[:, None].float()

    over_images = opening.over_images
    rows = over_images(answer, images, view, table, PredictRequest("m", workers=0), advance=sizes.append)
    assert sizes == [32, 32, 6] and rows[:, 0].tolist() == images.labels()
    sizes.clear()
    asked = PredictRequest("m", workers=0, batch_size=50)
    over_images(answer, images, view, table, asked, advance=sizes.append)
    assert sizes == [50, 20]
