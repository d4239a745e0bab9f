"""Weights by other hands: containers, wrappers, dialects, heads; and files that hold no weights."""

from __future__ import annotations

import argparse
import json
import os
import re

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from torch import nn

from vitkd_cli import UserError
from vitkd_cli.requests import Weights
from vitkd_cli.vit.build import build, open_model
from vitkd_cli.vit.names import resolve

FLAT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}


def random(name="vit_tiny_patch16_224", **options):
    """A model with nothing at its start value, so that a tensor that was not loaded shows."""
    torch.manual_seed(3)
    model = timm.create_model(name, **{**FLAT, "num_classes": 7, **options}).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def load(path, name="vit_tiny", **options):
    kwargs = ",".join(f"{key}={value}" for key, value in {**FLAT, **options}.items())
    return build(resolve(name), Weights(checkpoint=str(path)), kwargs=kwargs)


def prefixed(state, prefix):
    return {f"{prefix}{key}": value for key, value in state.items()}


def same(built, model):
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(built.net.eval()(images), model(images))
    return True


def refused(path, **options):
    with pytest.raises(UserError) as raised:
        load(path, **options)
    return raised.value


# --- containers and wrappers --------------------------------------------------------------------------------


def lightning(state):
    return {"state_dict": prefixed(state, "model.") | {"loss.weight": torch.ones(7)}, "epoch": 1}


WRAPPED = {
    "Lightning": lightning,
    "a head beside the backbone": lambda s: {
        "state_dict": {f"{'net.' if 'head' in k else 'net.backbone.'}{k}": v for k, v in s.items()}
    },
    "detectron2": lambda s: {"model": prefixed(s, "backbone.bottom_up.net."), "iteration": 3},
    "MAE": lambda s: {"model": s, "args": argparse.Namespace(lr=1e-3), "scaler": {"scale": 1.0}},
    "DINOv2": lambda s: {"teacher": prefixed(s, "backbone.") | {"dino_head.mlp.0.weight": torch.ones(2, 2)}},
    "DDP and compile": lambda s: {"model": prefixed(s, "module._orig_mod.")},
    "a container in a container": lambda s: {"model": {"state_dict": s}},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
def test_weights_are_found_inside_of_what_people_wrap_them_in(wrap, tmp_path):
    model = random()
    torch.save(wrap(model.state_dict()), tmp_path / "it.pth")
    built = load(tmp_path / "it.pth")
    assert same(built, model) and not any("random" in note for note in built.notes)


@pytest.mark.parametrize("flat", [False, True])
def test_of_dino_s_two_the_teacher_is_taken_and_said(flat, tmp_path):
    state = random().state_dict()
    body = {key: value for key, value in state.items() if "head" not in key}
    head = {"head.mlp.0.weight": torch.ones(64, 24), "head.mlp.0.bias": torch.ones(64)}
    student = prefixed({key: value + 1 for key, value in body.items()} | head, "module.backbone.")
    both = {"student": student, "teacher": prefixed(body, "backbone.") | head, "epoch": 3}
    if flat:
        both = {"model": prefixed(both["student"], "student.") | prefixed(both["teacher"], "teacher.")}
    torch.save(both, tmp_path / "dino.pth")
    built = load(tmp_path / "dino.pth")
    assert torch.equal(built.net.norm.weight, state["norm.weight"])
    assert "teacher" in built.notes[0] and "was taken" in built.notes[0]
    assert built.spec.num_classes == 0 and "head.mlp.0.weight" in built.notes[1]  # it projects


def test_several_models_of_one_file_are_never_chosen_among_by_chance(tmp_path):
    state = random().state_dict()
    torch.save(prefixed(state, "model.net.") | prefixed(state, "backbone."), tmp_path / "two.pth")
    assert "two.pth holds several models: backbone., model.net." in refused(tmp_path / "two.pth").message


def test_dinov2_s_chunks_of_blocks(tmp_path):
    model = random("vit_small_patch14_dinov2", num_classes=0)
    state = {re.sub(r"blocks\.(\d)", r"blocks.\1.\1", k): v for k, v in model.state_dict().items()}
    torch.save(
        {"teacher": prefixed(state | {"mask_token": torch.ones(1, 24)}, "backbone.")}, tmp_path / "d.pth"
    )
    assert same(load(tmp_path / "d.pth", "vit_small_patch14_dinov2"), model)


# --- dialects -----------------------------------------------------------------------------------------------

CONFIG = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "image_size": 32,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
}


def transformer(kind, **options):
    import transformers

    config = getattr(transformers, f"{kind[0]}Config")(**CONFIG, **options)
    torch.manual_seed(5)
    model = getattr(transformers, kind[0] + kind[1])(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("as_modules", [False, True], ids=["their file", "their state dict"])
@pytest.mark.parametrize(
    ("kind", "options", "name", "ours"),
    [
        (("ViT", "ForImageClassification"), {"intermediate_size": 96, "num_labels": 7}, "vit_tiny", {}),
        (
            ("DeiT", "ForImageClassificationWithTeacher"),
            {"intermediate_size": 96, "num_labels": 7},
            "deit_tiny_distilled",
            {},
        ),
        (("Dinov2", "Model"), {}, "vit_small_patch14_dinov2", {}),
        (("Dinov2WithRegisters", "Model"), {}, "vit_small_patch14_reg4_dinov2", {}),
        (
            ("Dinov2WithRegisters", "Model"),
            {"use_swiglu_ffn": True},
            "vit_giant_patch14_reg4_dinov2",
            {"mlp_ratio": 128 / 24},
        ),
    ],
    ids=["ViT", "DeiT", "DINOv2", "registers", "SwiGLU"],
)
def test_transformers_models_answer_as_they_do_there(kind, options, name, ours, as_modules, tmp_path):
    model = transformer(kind, **options)
    model.save_pretrained(tmp_path)
    if as_modules:
        torch.save(model.state_dict(), tmp_path / "model.pth")
    file = tmp_path / ("model.pth" if as_modules else "model.safetensors")
    built = load(file, name, **ours)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model(images)
        if built.spec.num_classes:
            torch.testing.assert_close(built.net.eval()(images), theirs.logits)
            assert built.spec.num_classes == 7
        else:
            final = built.net.eval().forward_features(images)
            torch.testing.assert_close(final, theirs.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert not any("random" in note or "not used" in note for note in built.notes)


def test_torchvision_s_vit_answers_as_it_does_there(tmp_path):
    from torchvision.models import VisionTransformer

    torch.manual_seed(5)
    model = VisionTransformer(32, 8, 2, 3, 24, 96, num_classes=7).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    built = load(tmp_path / "tv.pth")
    assert same(built, model)
    assert built.notes == ("its head of 7 classes is called heads.head in the file",)


# --- heads --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("called", ["heads.head", "classifier", "head.1", "fc", "model.head.fc"])
def test_a_head_under_another_name_is_known_by_its_shape_and_said(called, tmp_path):
    model = random()
    save_file(
        {re.sub(r"^head\.", f"{called}.", key): value for key, value in model.state_dict().items()},
        tmp_path / "it.safetensors",
    )
    built = load(tmp_path / "it.safetensors")
    assert same(built, model) and built.spec.num_classes == 7
    assert built.notes == (f"its head of 7 classes is called {called} in the file",)


@pytest.mark.parametrize(
    "others",
    [
        {"head.0.running_mean": torch.ones(24)},  # MAE's linear probe normalises what its head reads
        {"fc.weight": torch.ones(3, 24), "fc.bias": torch.ones(3)},  # which of the two?
    ],
)
def test_a_head_that_may_be_another_is_left_out_and_said(others, tmp_path):
    state = {re.sub(r"^head\.", "head.1.", key): value for key, value in random().state_dict().items()}
    save_file(state | others, tmp_path / "it.safetensors")
    built = load(tmp_path / "it.safetensors")
    assert built.spec.num_classes == 0 and "not used from the file: " in built.notes[0]
    assert "head.1.weight" in built.notes[0]


@pytest.mark.parametrize(("bias", "classes"), [(1.0, 512), (0.0, 0), (None, 0)])
def test_512_outputs_are_classes_where_the_head_has_a_bias(bias, classes, tmp_path):
    state = random(num_classes=512).state_dict()
    if bias is None:
        del state["head.bias"]
    else:
        state["head.bias"].fill_(bias)
    save_file(state, tmp_path / "it.safetensors")
    assert load(tmp_path / "it.safetensors").spec.num_classes == classes


def test_a_file_of_mae_s_fine_tuning_averages_patch_tokens(tmp_path):
    model = random(global_pool="avg")
    torch.save({"model": model.state_dict()}, tmp_path / "mae.pth")
    built = load(tmp_path / "mae.pth")
    assert same(built, model)
    assert built.notes == (
        "patch tokens are averaged (global_pool=avg): the file has fc_norm in place of norm",
    )


# --- what a weight file is and is not -----------------------------------------------------------------------


def test_a_sharded_checkpoint_is_read_by_its_index(tmp_path):
    model = random()
    state = model.state_dict()
    shards = {
        "model-00001-of-00002.safetensors": sorted(state)[::2],
        "model-00002-of-00002.safetensors": sorted(state)[1::2],
    }
    for name, keys in shards.items():
        save_file({key: state[key] for key in keys}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: name for name, keys in shards.items() for key in keys}}))
    assert same(load(index), model)
    error = refused(tmp_path / "model-00001-of-00002.safetensors")
    assert "is shard 1 of 2, not the whole" in error.message and index.name in error.hint
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "names model-00002-of-00002.safetensors, which is not beside it" in refused(index).message


def test_data_beside_the_tensors_does_not_make_a_file_unsafe(tmp_path):
    model = random()
    beside = {
        "best": np.float64(81.5),
        "epoch": np.int64(3),
        "curve": np.arange(3),
        "args": argparse.Namespace(lr=1e-3),
        "output": tmp_path,
    }
    torch.save({"model": model.state_dict(), **beside}, tmp_path / "it.pth")
    assert same(load(tmp_path / "it.pth"), model)


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["it.pth", "model.safetensors", "pytorch_model.bin", "pathlib.bin"])
def test_a_pickle_is_not_executed_whatever_it_is_called(name, tmp_path):
    torch.save({"model": random().state_dict(), "x": Evil(tmp_path / "pwned")}, tmp_path / name)
    error = refused(tmp_path / name)
    assert ("needs Python's pickle" in error.message) != (name == "model.safetensors")
    assert ("it is PyTorch's pickle" in error.message) == (name == "model.safetensors")
    assert not (tmp_path / "pwned").exists()


PAGES = {
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "a web page": b"\n<!DOCTYPE html><html><title>model.pth</title></html>",
    "JSON without a weight_map": b'{"error": "Entry not found"}',
    "no safetensors file": b"weights",
}


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("what", PAGES)
def test_what_is_no_weight_file_is_called_what_it_is(what, ending, tmp_path):
    (tmp_path / f"it.{ending}").write_bytes(PAGES[what])
    error = refused(tmp_path / f"it.{ending}")
    assert (what if ending == "safetensors" or "no " not in what else "is not a readable") in error.message
    assert error.hint


def test_nan_among_loaded_weights_is_named(tmp_path):
    state = random().state_dict()
    for value in (float("nan"), float("inf")):
        state["blocks.1.mlp.fc1.weight"][0, 0] = value
        save_file(state, tmp_path / "it.safetensors")
        error = refused(tmp_path / "it.safetensors")
        assert "it.safetensors: blocks.1.mlp.fc1.weight holds NaN or infinite values" in error.message


# --- folders ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    from timm.models._hub import save_for_hf

    model = random()
    save_for_hf(model, str(tmp_path / "model"), model_args=FLAT, safe_serialization=True)
    return tmp_path / "model", model


def test_a_folder_takes_the_same_door_as_a_file(folder, tmp_path):
    place, model = folder
    assert same(open_model(str(place)), model)
    state = load_file(place / "model.safetensors")
    (place / "model.safetensors").unlink()
    torch.save({"state_dict": prefixed(state, "module.")}, place / "pytorch_model.bin")
    assert same(open_model(str(place)), model)
    torch.save({"state_dict": state, "x": Evil(tmp_path / "pwned")}, place / "pytorch_model.bin")
    with pytest.raises(UserError, match="needs Python's pickle"):
        open_model(str(place))
    (place / "model.safetensors").write_bytes((place / "pytorch_model.bin").read_bytes())
    with pytest.raises(UserError, match="it is PyTorch's pickle"):
        open_model(str(place))
    state["norm.weight"][3] = torch.nan
    save_file(state, place / "model.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
        open_model(str(place))
    save_file(random(depth=3).state_dict(), place / "model.safetensors")
    with pytest.raises(UserError, match=r"blocks\.2\.attn\.proj\.bias is not in the model"):
        open_model(str(place))
    assert not (tmp_path / "pwned").exists()


def test_the_same_notes_everywhere(folder, tmp_path, cli, photos):
    from timm.models._hub import save_for_hf

    place = tmp_path / "patch16"
    save_for_hf(
        random(patch_size=16), str(place), model_args={**FLAT, "patch_size": 16}, safe_serialization=True
    )
    state = random(num_classes=3).state_dict() | {"extra": torch.ones(1)}
    save_file(state, tmp_path / "patch8.safetensors")
    given = [str(place), "--checkpoint", str(tmp_path / "patch8.safetensors")]
    for command, options in {
        "eval": ["--data", str(photos), "--workers", "0"],
        "export": ["--to", "state-dict", "--output", str(tmp_path / "out.safetensors"), "--no-check-forward"],
        "inspect-attention": [
            "--images",
            str(photos / "cat"),
            "--num-images",
            "1",
            "--output",
            str(tmp_path / "a"),
        ],
    }.items():
        code, out, err = cli(command, *given, *options)
        text = " ".join((out + err).split())
        assert code == 0, err
        assert "resampled or renewed: " in text and "patch_embed.proj.weight" in text
        assert "not used from the file: extra" in text


@pytest.mark.parametrize(
    ("key", "tensor", "said"),
    [
        ("blocks.0.mlp.fc1.weight", torch.eye(3).to_sparse(), "blocks.0.mlp.fc1.weight is not in the file"),
        ("norm.weight", torch.ones(24, dtype=torch.int8), "norm.weight holds int8, no weights"),
        ("cls_token", torch.zeros(1).expand(10**9), "cls_token comes to 1000000000 where"),
        ("head.bias", torch.tensor(1.0), "head.bias comes to a number where the model has 7"),
    ],
)
def test_a_tensor_that_is_no_weight_is_refused(key, tensor, said, tmp_path):
    torch.save(random().state_dict() | {key: tensor}, tmp_path / "it.pth")
    assert said in refused(tmp_path / "it.pth").message


def test_what_is_no_plain_tensor_is_left_out_and_said(tmp_path):
    model = random()
    odd = {"freqs": torch.ones(2, dtype=torch.complex64)}
    torch.save(model.state_dict() | odd, tmp_path / "it.pth")
    built = load(tmp_path / "it.pth")
    assert same(built, model)
    assert built.notes == ("not used from the file, for they are sparse, quantised or complex: freqs",)


def test_a_model_whose_projections_stand_apart_keeps_them_apart(tmp_path):
    small = {
        "img_size": 64,
        "depth": 2,
        "depth_token_only": 2,
        "embed_dim": 48,
        "num_heads": 2,
        "num_classes": 7,
    }
    model = timm.create_model("cait_xxs24_224", **small).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, tmp_path, model_args={key: small[key] for key in small if key != "num_classes"})
    built = open_model(str(tmp_path))
    assert not built.notes
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(built.net.eval()(images), model(images), rtol=0, atol=0)
