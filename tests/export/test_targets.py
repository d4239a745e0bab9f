"""Every form gives the model's own numbers, to those who load it without us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from vitkd_cli import Recipe, Tap, TappedViT, UserError, evaluate
from vitkd_cli.export import TARGETS, export
from vitkd_cli.export.onnx_file import _unfused
from vitkd_cli.training.folder import check_folder
from vitkd_cli.vit.taps import features

CLASSES = ["2", "10", "x"]
VIT = "vit_tiny_patch16_224"
FLAT = [VIT, "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"]


def loaded(folder: Path, **options):
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


def images(count: int, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def in_onnx(path: Path, fed: np.ndarray) -> torch.Tensor:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: fed})[0])


@pytest.mark.parametrize(
    "name",
    [
        VIT,
        "swin_tiny_patch4_window7_224",
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*FLAT[1:], "hiera_tiny_224"]),
    ],
)
@torch.no_grad()
def test_a_family_in_every_form(name, saved, tmp_path):
    folder = saved(name)
    whole = loaded(folder)
    side = resolve_model_data_config(whole)["input_size"][1]
    batches = [images(count, side) for count in (1, 3, 7)]
    for to, target in TARGETS.items():
        done = export(str(folder), to, num_images=24)
        assert done.output == folder.with_name(f"model{target.ending}") and done.found.count == 24
        assert done.found.difference <= target.tolerance * done.found.scale
        assert done.found.agreement == (None if to == "features" else 100)

    assert all(torch.equal(loaded(folder.with_name("model-timm"))(x), whole(x)) for x in batches)
    twin = timm.create_model(f"local-dir:{folder}", num_classes=len(CLASSES)).eval()
    twin.load_state_dict(load_file(folder.with_name("model.safetensors")), strict=True)
    assert all(torch.equal(twin(x), whole(x)) for x in batches)
    program = torch.export.load(folder.with_name("model.pt2")).module()
    for x in batches:
        torch.testing.assert_close(program(x), whole(x))
        torch.testing.assert_close(
            in_onnx(folder.with_name("model.onnx"), x.numpy()), whole(x), atol=1e-4, rtol=0
        )
    for path in (folder.with_name("model.onnx"), folder.with_name("model.pt2")):
        assert b"site-packages" not in path.read_bytes()


@pytest.mark.parametrize("name", FLAT)
@torch.no_grad()
def test_feature_maps_are_the_outputs_of_the_blocks(name, saved, tmp_path):
    folder, x = saved(name), images(2)
    export(str(folder), "features", output=tmp_path / "backbone")
    signals = TappedViT(loaded(folder), [features(0), features(1)])(x)
    for asked in ((0, 1), (1,)):
        maps = loaded(tmp_path / "backbone", features_only=True, out_indices=asked)(x)
        for index, found in zip(asked, maps, strict=True):
            assert torch.equal(found.flatten(2).transpose(1, 2), signals[Tap("features", index)])
    assert not [key for key in load_file(tmp_path / "backbone/model.safetensors") if "head" in key]


@torch.no_grad()
def test_timm_and_transformers_read_the_folder(run, tmp_path):
    from transformers import AutoModelForImageClassification

    export(str(run), "timm", output=tmp_path / "student")
    x = images(3)
    wanted = loaded(run / "student")(x)
    ours = loaded(tmp_path / "student")
    theirs = AutoModelForImageClassification.from_pretrained(tmp_path / "student").eval()
    assert torch.equal(ours(x), wanted) and torch.equal(theirs(pixel_values=x).logits, wanted)
    digits = [str(digit) for digit in range(10)]
    assert ours.pretrained_cfg["label_names"] == digits == list(theirs.config.id2label.values())
    cards = [(folder / "README.md").read_text() for folder in (tmp_path / "student", run / "student")]
    assert cards[0] == cards[1] and "labels + vitkd" in cards[0].replace("*1", "")


def test_the_student_alone_leaves(run, tmp_path):
    keys = set(loaded(run / "student").state_dict())
    for to, file in (("timm", "s/model.safetensors"), ("state-dict", "s.safetensors")):
        export(str(run), to, output=tmp_path / file.partition("/")[0])
        assert set(load_file(tmp_path / file)) == keys
    export(str(run), "torch", output=tmp_path / "s.pt2")
    assert set(torch.export.load(tmp_path / "s.pt2").state_dict) == keys


def test_exports_belong_to_the_run(run):
    beside = export(str(run), "state-dict", check_forward=False).output
    assert beside == run / "student.safetensors"
    check_folder(run, True, Recipe())
    beside.rename(run / "thesis.safetensors")
    with pytest.raises(UserError, match="holds something that is no run"):
        check_folder(run, True, Recipe())
    (run / "thesis.safetensors").unlink()


def test_preprocessing_is_that_of_eval(run, tmp_path):
    export(str(run), "timm", output=tmp_path / "student")
    config = resolve_model_data_config(loaded(tmp_path / "student"))
    used = json.loads(json.dumps(evaluate(str(run), "digits", workers=0).preprocessing))
    assert json.loads(json.dumps(config)) == used
    assert used["mean"] == [0.4, 0.4, 0.4] and used["crop_pct"] == 0.9


def test_a_plain_model_says_less(model, tmp_path):
    export(str(model), "timm", output=tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert "exported with vitkd" in card and "Recipe" not in card and "| classes | 3 |" in card
    assert loaded(tmp_path / "out").pretrained_cfg["label_names"] == CLASSES


def test_a_prefix(model, tmp_path):
    export(str(model), "state-dict", output=tmp_path / "x.safetensors", prefix="backbone.")
    keys = loaded(model).state_dict().keys()
    assert load_file(tmp_path / "x.safetensors").keys() == {f"backbone.{key}" for key in keys}
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        facts = json.loads(file.metadata()["vitkd"])
    assert json.loads(facts["class_names"]) == CLASSES


def test_torch_needs_nothing_else(model, tmp_path):
    export(str(model), "torch", output=tmp_path / "x.pt2")
    torch.save((x := images(3), loaded(model)(x)), tmp_path / "wanted.pt")
    code = """
import sys, json
class Refused:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in ("timm", "vitkd_cli"):
            raise ImportError(name)
sys.meta_path.insert(0, Refused())
import torch
facts = {"vitkd.json": ""}
program = torch.export.load("x.pt2", extra_files=facts).module()
x, wanted = torch.load("wanted.pt")
torch.testing.assert_close(program(x), wanted)
print(json.loads(facts["vitkd.json"])["class_names"])
try: import timm
except ImportError: print("alone")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split("\n")[:2] == [str(CLASSES), "alone"], done.stderr


# --- ONNX -------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_plain_images_in_probabilities_out(model, photos, tmp_path):
    path = tmp_path / "x.onnx"
    export(str(model), "onnx", output=path, preprocess=True, images=[photos / "cat"], num_images=5)
    whole, picture = loaded(model), Image.open(photos / "cat/03.jpg")
    config = resolve_model_data_config(whole)
    wanted = whole(create_transform(**config)(picture)[None]).softmax(1)
    # Resized and cropped as timm does it; everything behind that is in the file.
    view = create_transform(**config, normalize=False)(picture)  # [C, H, W] uint8
    found = in_onnx(path, view.permute(1, 2, 0).numpy()[None])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    file = onnx.load(path)
    facts = {entry.key: json.loads(entry.value) for entry in file.metadata_props}
    assert facts["class_names"] == CLASSES and facts["output"] == file.graph.output[0].name == "probabilities"
    assert (facts["input_size"], facts["crop_pct"]) == ([3, 32, 32], config["crop_pct"])
    assert facts["mean"] == list(config["mean"]) and facts["interpolation"] == config["interpolation"]


def test_attention_is_fused_again(model):
    vit = loaded(model)
    with pytest.raises(KeyError), _unfused(vit):
        assert not any(block.attn.fused_attn for block in vit.blocks)
        raise KeyError
    assert all(block.attn.fused_attn for block in vit.blocks)


@pytest.mark.parametrize("kind", ["half", "int8"])
def test_fewer_bits(kind, run, tmp_path):
    path = tmp_path / "x.onnx"
    done = export(str(run), "onnx", output=path, num_images=90, **{kind: True})
    file = onnx.load(path)
    types = {entry.data_type for entry in file.graph.initializer}
    assert {"half": onnx.TensorProto.FLOAT16, "int8": onnx.TensorProto.INT8}[kind] in types
    weights = sum(len(entry.raw_data) for entry in file.graph.initializer)
    assert weights < 0.6 * done.model_bytes
    assert {entry.key for entry in file.metadata_props} >= {"class_names", "mean", "model"}
    # What it says of accuracy is what the file does.
    from vitkd_cli.data.datasets import named_split
    from vitkd_cli.data.keyed import val_loader
    from vitkd_cli.data.transforms import view_of

    student = loaded(run / "student")
    config = resolve_model_data_config(student)
    view = view_of({"input_size": (3, 32, 32), **{k: config[k] for k in ("crop_pct", "interpolation")}})
    hits = 0
    for batch, labels, _ in val_loader(
        named_split(data="digits")[0].balanced_subset(90), view, 45, rank=0, world=1, workers=0
    ):
        mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        named = in_onnx(path, ((batch / 255 - mean) / std).numpy()).argmax(1)
        hits += int((named == labels).sum())
    assert done.found.top1[1] == pytest.approx(100 * hits / 90)
    drop = done.found.top1[0] - done.found.top1[1]
    assert any("calibrated on" in note for note in done.notes) == (kind == "int8")
    assert any("--half is the better" in note for note in done.notes) == (kind == "int8" and drop > 1)


def test_an_embedding_leaves_too(saved, tmp_path):
    folder = saved(VIT, num_classes=0)
    done = export(str(folder), "torch", output=tmp_path / "x.pt2")
    assert done.found.agreement is None and done.found.scale > 0
    x = images(5)
    assert torch.equal(torch.export.load(tmp_path / "x.pt2").module()(x), loaded(folder)(x))


# --- the command --------------------------------------------------------------------------------------------


def test_the_command(cli, model, tmp_path):
    out = tmp_path / "x.safetensors"
    arguments = ["export", str(model), "--to", "state-dict", "--output", str(out)]
    code, shown, _ = cli(*arguments)
    assert code == 0 and "the same class on 100.00 %" in shown and str(out) in shown
    code, shown, _ = cli(*arguments, "--overwrite", "--json", "--num-images", "20")
    found = json.loads(shown)
    assert (found["output"], found["images"], found["difference"]) == (str(out), 20, 0)
    assert found["bytes"] == out.stat().st_size
    code, shown, _ = cli(*arguments, "--overwrite", "--no-check-forward", "--img-size", "48")
    assert code == 0 and "not checked" in shown
    assert load_file(out)["pos_embed"].shape[1] == 1 + 6 * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.safetensors"]


def test_a_name_of_timms(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, _ = cli("export", "test_vit", "--no-pretrained", "--to", "state-dict", "--num-images", "4")
    assert code == 0 and (tmp_path / "test_vit.safetensors").is_file()


def test_the_hub_gets_the_folder(cli, model, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, RepoUrl, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    sent = {}
    url = "https://huggingface.co/me/mine"
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: RepoUrl(url))
    monkeypatch.setattr(HfApi, "upload_folder", lambda self, **options: sent.update(options))
    out = tmp_path / "out"
    code, shown, err = cli(
        "export", str(model), "--to", "timm", "--output", str(out), "--push-to-hub", "me/mine"
    )
    assert code == 0 and f"pushed to {url}" in shown, err
    assert sent["repo_id"] == "me/mine"
    files = sorted(path.name for path in Path(sent["folder_path"]).iterdir())
    assert files == ["README.md", "config.json", "manifest.json", "model.safetensors"]
    assert 'create_model("hf-hub:me/mine"' in (out / "README.md").read_text()
