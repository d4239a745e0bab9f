"""Configurations and arguments that no model can have are refused in a line, before memory is asked for."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

from vitkd_cli import UserError
from vitkd_cli.requests import Weights
from vitkd_cli.vit import construct
from vitkd_cli.vit.build import build, open_model
from vitkd_cli.vit.names import resolve

FLAT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    place = tmp_path_factory.mktemp("models") / "model"
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **FLAT)
    save_for_hf(model, str(place), model_args=FLAT, safe_serialization=True)
    return place, json.loads((place / "config.json").read_text())


def refused(saved, change):
    place, config = saved
    config = json.loads(json.dumps(config))
    change(config)
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as raised:
        open_model(str(place))
    assert raised.value.hint and "\n" not in raised.value.message
    return raised.value.message


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", 7, "architecture must be text, not 7"),
        ("architecture", "no_such_model", "Unknown model (no_such_model)"),
        ("num_classes", "ten", "num_classes must be a whole number of at most 200,000, not 'ten'"),
        ("num_classes", 10**9, "num_classes must be a whole number of at most 200,000"),
        ("label_names", 3, "label_names must be a list of names, not 3"),
        ("pretrained_cfg", [], "pretrained_cfg must be an object, not []"),
        ("model_args", "x", "model_args must be an object, not 'x'"),
    ],
)
def test_a_value_of_another_type(key, value, message, saved):
    assert message in refused(saved, lambda config: config.update({key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("input_size", [3, -32, 32], "input_size must be three whole numbers above 0"),
        ("input_size", "3,32,32", "input_size must be three whole numbers above 0"),
        ("mean", [float("nan")] * 3, "mean must be a list of numbers"),
        ("std", [0, 1, 1], "std must be a list of numbers above 0"),
        ("crop_pct", -1, "crop_pct must be a number above 0"),
        ("interpolation", "bicubik", "interpolation must be bicubic or "),
        ("classifier", {"head": 1}, "classifier must be text or a list of texts"),
        ("colour", 1, "takes no argument 'colour'"),
    ],
)
def test_a_value_of_the_preprocessing(key, value, message, saved):
    assert message in refused(saved, lambda config: config["pretrained_cfg"].update({key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("depth", 10**9, "depth = 1000000000 is more than any ViT has"),
        ("embed_dim", [10**12], "embed_dim = [1000000000000] is more than"),
        ("depth", 0, "has no transformer blocks"),
        ("num_heads", 0, "cannot be built with its own configuration"),
        ("num_heads", -1, "does not take 32×32 images"),
        ("patch_size", "x", "cannot be built with its own configuration"),
        ("depth", 10**5, "needs over 100 tensors for its weights"),
        ("features_only", True, "is no whole model"),
        ("checkpoint_path", "x.pth", "takes no argument 'checkpoint_path'"),
    ],
)
def test_an_argument(key, value, message, saved, monkeypatch):
    monkeypatch.setattr(construct, "MOST_TENSORS", 100)
    assert message in refused(saved, lambda config: config["model_args"].update({key: value}))


@pytest.mark.parametrize("content", [b"[1]", b"{", b"\xff\xfe", b"null", b"[" * 9999])
def test_what_is_no_configuration(content, saved):
    place, _ = saved
    (place / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json (is not JSON|names no timm architecture)"):
        resolve(str(place))
    with pytest.raises(UserError, match=r"config\.json (is not JSON|names no timm architecture)"):
        open_model(f"local-dir:{place}")


def test_an_address_on_the_hub_takes_the_same_door(saved, monkeypatch, tmp_path):
    import huggingface_hub

    (tmp_path / "config.json").write_text(json.dumps({**saved[1], "num_classes": "ten"}))
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda *_: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(tmp_path / "config.json"))
    with pytest.raises(UserError, match="num_classes must be"):
        open_model("hf-hub:someone/something")


def test_memory_is_counted_before_it_is_asked_for():
    with pytest.raises(UserError, match=r"needs at least [\d,.]+ GiB for its weights, and .* GiB are free"):
        build(resolve("vit_tiny"), Weights(pretrained=False), kwargs="embed_dim=199998,num_heads=3,depth=2")
    with pytest.raises(UserError, match="no ViT is that large"):
        build(resolve("vit_tiny"), Weights(pretrained=False), kwargs="depth=1000000000")


# --- image sizes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "size"), [("tiny_vit_5m", 64), ("tiny_vit_5m", 224), ("pvt_v2_b0", 96), ("caformer_s18", 96)]
)
def test_a_family_without_an_argument_for_it_takes_any_size(name, size):
    with torch.device("meta"):
        assert build(resolve(name), Weights(pretrained=False), img_size=size).spec.input_size == (size, size)


@pytest.mark.parametrize(
    ("name", "size", "hint"),
    [
        ("levit_128s", 200, "192 or 208 does"),
        ("swin_tiny", 234, "232 or 236"),
    ],
)
def test_sizes_that_fit_are_named(name, size, hint):
    with pytest.raises(UserError) as raised:
        build(resolve(name), Weights(pretrained=False), img_size=size)
    assert hint in raised.value.hint
