"""Weights as people have them."""

from __future__ import annotations

import socket

import pytest
import timm
import torch
from safetensors.torch import save_file

from vitkd_cli import UserError
from vitkd_cli.requests import Weights
from vitkd_cli.vit.build import build
from vitkd_cli.vit.construct import parse_kwargs
from vitkd_cli.vit.names import resolve

SMALL = "patch_size=4,embed_dim=24,depth=2,num_heads=3"
VIT = resolve("vit_tiny")
RANDOM = Weights(pretrained=False)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, num_classes=7, patch_size=4, embed_dim=24, depth=2, num_heads=3
    )
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    return tmp_path, model.eval(), model.state_dict()


def load(path, **options):
    options = {"img_size": 32, "kwargs": SMALL, **options}
    return build(VIT, Weights(checkpoint=str(path)), **options)


def test_a_file_is_loaded_with_its_own_classes(weights):
    folder, model, _ = weights
    built = load(folder / "vit.safetensors")
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(built.net.eval()(images), model(images))
    assert built.spec.num_classes == 7 and not built.notes
    assert "state_dict" not in built.net.pretrained_cfg  # no second copy in memory


@pytest.mark.parametrize("container", [None, "state_dict", "model", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod.", "backbone."])
def test_containers_and_prefixes(weights, container, prefix):
    folder, model, state = weights
    content = {prefix + key: value for key, value in state.items()}
    torch.save({container: content, "epoch": 3} if container else content, folder / "vit.pth")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(load(folder / "vit.pth").net.eval()(images), model(images))


def test_a_file_takes_the_place_of_a_folder_s_weights(weights):
    from timm.models._hub import save_for_hf

    folder, _, state = weights
    args = {"img_size": 32, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}
    other = timm.create_model("vit_tiny_patch16_224", num_classes=7, **args)
    save_for_hf(other, str(folder / "own"), model_args=args, safe_serialization=True)
    built = build(resolve(str(folder / "own")), Weights(checkpoint=str(folder / "vit.safetensors")))
    assert torch.equal(built.net.head.weight, state["head.weight"]) and not built.notes


def test_head_and_position_embedding_adapt_and_it_says_so(weights):
    folder, _, state = weights
    built = load(folder / "vit.safetensors", img_size=48, num_classes=5)
    assert built.spec.num_classes == 5 and built.spec.final_grid == (12, 12)
    (note,) = built.notes
    assert "head.weight" in note and "pos_embed" in note
    assert torch.equal(built.net.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])


def test_what_is_missing_or_unused_is_named(weights):
    folder, _, state = weights
    state = {key: value for key, value in state.items() if "head" not in key}
    save_file({**state, "projector.weight": torch.ones(2)}, folder / "odd.safetensors")
    notes = " ".join(load(folder / "odd.safetensors", num_classes=4).notes)
    assert "not used from the file: projector.weight" in notes
    assert "not in the file, left at random: head.weight, head.bias" in notes


def test_another_architecture_s_file_is_refused(weights):
    folder, _, _ = weights
    with pytest.raises(UserError, match="does not fit") as refused:
        load(folder / "vit.safetensors", kwargs=SMALL.replace("24", "48"))
    assert "name the architecture" in refused.value.hint


def test_a_folder_in_timm_s_format(weights):
    from timm.models._hub import save_for_hf

    folder, model, _ = weights
    save_for_hf(
        model, str(folder / "saved"), model_config={"label_names": list("abcdefg")}, safe_serialization=True
    )
    built = build(resolve(f"local-dir:{folder / 'saved'}"), Weights())
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(built.net.eval()(images), model(images))
    assert built.class_names == tuple("abcdefg") and built.spec.input_size == (32, 32)
    (folder / "saved" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no \.safetensors weights"):
        build(resolve(f"local-dir:{folder / 'saved'}"), Weights())


@pytest.mark.parametrize("offline", ["a variable", "no network"])
def test_no_network_names_the_file_and_both_cures(monkeypatch, offline):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline == "a variable")
    for proxy in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(proxy, raising=False)

    def refuse(*_args, **_options):
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(UserError) as refused:
        build(resolve("deit3_small"), Weights(), file_flag="--teacher-checkpoint")
    assert "model.safetensors of timm/deit3_small_patch16_224.fb_in1k" in refused.value.message
    assert "connect once" in refused.value.hint and "--teacher-checkpoint" in refused.value.hint


def test_a_model_without_weights_in_timm():
    nobody = next(r for r in map(resolve, ("vit_base_patch16_xp_224", "coatnet_0_224")) if not r.has_weights)
    with pytest.raises(UserError, match="has no pretrained weights in timm"):
        build(nobody, Weights())


def test_arguments():
    assert parse_kwargs("depth=4,depths=(1,2),act_layer=gelu,qkv_bias=false,x=0.5") == {
        "depth": 4,
        "depths": (1, 2),
        "act_layer": "gelu",
        "qkv_bias": False,
        "x": 0.5,
    }
    assert parse_kwargs(None) == {}
    for wrong in ("depth", "depth=", "4", "depth=4;5", "depth=f(3)"):
        with pytest.raises(UserError, match="cannot read"):
            parse_kwargs(wrong)
    with pytest.raises(UserError, match="takes no argument 'colour'"):
        build(resolve("tiny_vit_5m"), RANDOM, kwargs="colour=3")
    for size, nearest in ((50, "48 or 64"), (225, "224 or 240"), (238, "224 or 240"), (40, "32 or 48")):
        with pytest.raises(UserError) as refused:
            build(resolve("deit_tiny"), RANDOM, img_size=size, kwargs="depth=1")
        assert nearest in refused.value.hint


@pytest.mark.parametrize("kwargs", ["img_size=40", "img_size=(32,40)"])
def test_a_size_among_the_constructor_s_arguments_is_checked_too(kwargs):
    with pytest.raises(UserError, match="40 pixels do not divide into patches of 16"):
        build(resolve("deit_tiny"), RANDOM, kwargs=f"depth=1,{kwargs}")


def test_a_grid_that_is_padded_on_its_way_is_no_mistake():
    slim = "depths=(1,1,1,1),embed_dim=24,num_heads=(1,1,1,1)"
    built = build(resolve("swin_tiny"), RANDOM, img_size=236, kwargs=slim)
    assert built.spec.blocks[0].grid == (59, 59) and built.spec.final_grid == (8, 8)
    with pytest.raises(UserError, match="234 pixels do not divide into patches of 4"):
        build(resolve("swin_tiny"), RANDOM, img_size=234, kwargs=slim)


def test_a_size_that_only_the_forward_refuses():
    with pytest.raises(UserError, match="mvitv2_tiny does not take 200×200 images"):
        build(resolve("mvitv2_tiny"), RANDOM, img_size=200)


@pytest.mark.parametrize(
    "text", ["features_only=true", "checkpoint_path='x.pth'", "pretrained_cfg_overlay={}"]
)
def test_kwargs_are_those_of_the_constructor(text):
    with pytest.raises(UserError, match="is no argument of a model's constructor"):
        parse_kwargs(text)
