"""Weight files by other hands, averages, and files that belong to another architecture."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import save_file

from vitkd_cli import UserError
from vitkd_cli.requests import Weights
from vitkd_cli.vit import loading
from vitkd_cli.vit.build import build
from vitkd_cli.vit.loading import looks_like
from vitkd_cli.vit.names import resolve
from vitkd_cli.vit.weights import read_weights
from vitkd_cli.vit.zoo import anatomy

FLAT = "img_size=32,patch_size=8,embed_dim=24,depth=2,num_heads=3"
SWIN = "depths=(1,2,1,1),embed_dim=12,num_heads=(1,2,2,2)"


def random(name, kwargs=FLAT, **options):
    """A model with nothing at its start value, so that a tensor that was not loaded shows."""
    torch.manual_seed(3)
    model = build(
        resolve(name), Weights(pretrained=False), kwargs=kwargs, **{"num_classes": 7, **options}
    ).net.eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def load(path, name="vit_tiny", kwargs=FLAT, **options):
    return build(resolve(name), Weights(checkpoint=str(path)), kwargs=kwargs, **options)


def same(built, model, side=32):
    images = torch.randn(2, 3, side, side)
    return torch.equal(built.net.eval()(images), model(images))


def in_mmpretrain(key):
    """A timm name as MMPretrain's classifiers have it."""
    if key.startswith("head"):
        return re.sub(r"^(head|head_dist)\.", r"head.layers.\1.", key)
    key = re.sub(r"^norm\.", "ln1.", re.sub(r"^fc_norm\.", "ln2.", key))
    key = key.replace("patch_embed.proj.", "patch_embed.projection.").replace("blocks.", "layers.")
    key = key.replace(".norm1.", ".ln1.").replace(".norm2.", ".ln2.")
    key = key.replace(".ls1.gamma", ".attn.gamma1.weight").replace(".ls2.gamma", ".ffn.gamma2.weight")
    key = key.replace(".mlp.fc1.", ".ffn.layers.0.0.").replace(".mlp.fc2.", ".ffn.layers.1.")
    return f"backbone.{key}"


@pytest.mark.parametrize("name", ["deit_small", "deit_small_distilled", "deit3_small", "beit_base"])
def test_a_file_of_mmpretrain(name, tmp_path):
    model = random(name)
    state = {in_mmpretrain(key): value for key, value in model.state_dict().items()}
    assert not {k for k in state if "blocks" in k or "norm" in k or "gamma." in k}
    torch.save({"meta": {"epoch": 300, "CLASSES": None}, "state_dict": state}, tmp_path / "mm.pth")
    built = load(tmp_path / "mm.pth", name)
    assert same(built, model) and built.spec.num_classes == 7 and not built.notes


def test_a_file_of_mmpretrain_adapts_and_says_so(tmp_path):
    state = {in_mmpretrain(key): value for key, value in random("deit_small").state_dict().items()}
    torch.save({"state_dict": {**state, "backbone.extra": torch.ones(2)}}, tmp_path / "mm.pth")
    changed, unused = load(
        tmp_path / "mm.pth", "deit_small", num_classes=5, kwargs=FLAT.replace("32", "48")
    ).notes
    assert changed.startswith("resampled or renewed: ")
    assert set(changed.partition(": ")[2].split(", ")) == {"pos_embed", "head.weight", "head.bias"}
    assert unused == "not used from the file: extra"


@pytest.mark.parametrize(
    ("name", "kwargs", "other", "table"),
    [
        (
            "swin_tiny",
            f"{SWIN},img_size=64,window_size=4",
            f"{SWIN},img_size=64,window_size=8",
            "layers.0.blocks.0",
        ),
        ("beit_base", FLAT, FLAT.replace("32", "48"), "blocks.0"),
    ],
)
def test_window_tables_are_resampled_and_named(name, kwargs, other, table, tmp_path):
    model = random(name, kwargs)
    # Files of these families' authors hold the index into the table too, which timm computes.
    state = {**model.state_dict(), f"{table}.attn.relative_position_index": torch.zeros(3, 3)}
    save_file(state, tmp_path / "it.safetensors")
    assert not load(tmp_path / "it.safetensors", name, kwargs).notes
    (note,) = load(tmp_path / "it.safetensors", name, other).notes
    assert note.startswith("resampled") and f"{table}.attn.relative_position_bias_table" in note


def test_what_timm_renames_is_not_reported_as_missing(tmp_path):
    model = random("swin_tiny", f"{SWIN},img_size=64")
    # In Swin's own repository a stage ends with the downsampling that timm begins the next one with.
    state = {key.replace("head.fc.", "head."): value for key, value in model.state_dict().items()}
    state = {re.sub(r"(\d)(?=\.downsample)", lambda n: str(int(n[1]) - 1), k): v for k, v in state.items()}
    assert "layers.0.downsample.reduction.weight" in state
    save_file(state, tmp_path / "authors.safetensors")
    built = load(tmp_path / "authors.safetensors", "swin_tiny", f"{SWIN},img_size=64")
    assert same(built, model, 64) and not built.notes


def test_a_backbone_beside_its_head(tmp_path):
    model = random("vit_tiny")
    torch.save(
        {k if k.startswith("head") else f"backbone.{k}": v for k, v in model.state_dict().items()},
        tmp_path / "b.pth",
    )
    assert same(load(tmp_path / "b.pth"), model)


def test_a_file_without_a_head_gives_a_model_without_classes(tmp_path):
    state = random("vit_tiny").state_dict()
    save_file({k: v for k, v in state.items() if not k.startswith("head")}, tmp_path / "body.safetensors")
    built = load(tmp_path / "body.safetensors")
    assert built.spec.num_classes == 0 and not built.notes


def test_checkpoints_of_a_run(tmp_path, cli, flags, tiny):
    values = {
        **tiny,
        "loss": "labels",
        "teacher": "vit_tiny",
        "steps": 3,
        "model_ema": True,
        "model_ema_decay": 0.5,
    }
    assert cli("distill", *flags(values), "--output", str(tmp_path / "run"))[0] == 0
    place = tmp_path / "run" / "checkpoints" / "update-00000003"
    raw, average = (read_weights(place / f"{name}.safetensors").tensors for name in ("learner", "ema"))
    assert raw.keys() == average.keys() and not torch.equal(raw["head.bias"], average["head.bias"])
    assert load(place / "learner.safetensors", kwargs=tiny["model_kwargs"]).spec.num_classes == 10
    with pytest.raises(UserError, match="no averaged weights") as refused:
        read_weights(place / "learner.safetensors", use_ema=True)
    assert "ema.safetensors" in refused.value.hint


# --- averages -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", ["model_ema", "state_dict_ema", "ema"])
def test_raw_weights_unless_the_average_is_asked_for(container, tmp_path):
    raw = random("vit_tiny").state_dict()
    average = {f"module.{key}": value + 1 for key, value in raw.items()}
    torch.save({container: average, "model": raw}, tmp_path / "both.pth")
    assert torch.equal(read_weights(tmp_path / "both.pth").tensors["head.bias"], raw["head.bias"])
    assert torch.equal(
        read_weights(tmp_path / "both.pth", use_ema=True).tensors["head.bias"], raw["head.bias"] + 1
    )


def test_use_ema_reaches_student_teacher_and_eval(tmp_path, cli, flags, tiny, photos):
    raw = random("vit_tiny", tiny["model_kwargs"], num_classes=10).state_dict()
    torch.save({"model": raw}, tmp_path / "raw.pth")
    torch.save({"model": raw, "model_ema": {k: v * torch.nan for k, v in raw.items()}}, tmp_path / "both.pth")
    files = {"initial_checkpoint": tmp_path / "both.pth", "steps": 1, "output": tmp_path / "run"}
    teacher = {"teacher_checkpoint": tmp_path / "both.pth", "teacher_kwargs": tiny["model_kwargs"]}
    for given in (files, {**teacher, "steps": 1, "output": tmp_path / "run"}):
        _, _, err = cli("distill", *flags({**tiny, "loss": "labels + kd", **given}), "--use-ema")
        assert "both.pth: cls_token holds NaN or infinite values" in err  # the average that was planted
    files["initial_checkpoint"] = tmp_path / "raw.pth"
    code, _, err = cli("distill", *flags({**tiny, **files}), "--use-ema")
    assert code == 2 and "raw.pth holds no averaged weights" in err
    _, _, err = cli("distill", *flags(tiny), "--use-ema")
    assert "none is given" in err and "--teacher-checkpoint FILE" in err
    _, _, err = cli("eval", "deit_tiny", "--data", str(photos), "--use-ema")
    assert "none is given" in err and "--checkpoint FILE" in err
    _, _, err = cli(
        "eval", "deit_tiny", "--data", str(photos), "--use-ema", "--checkpoint", str(tmp_path / "raw.pth")
    )
    assert "holds no averaged weights" in err


# --- files that do not belong -------------------------------------------------------------------------------


def refused(path, *arguments, **options):
    with pytest.raises(UserError) as raised:
        load(path, *arguments, **options)
    return raised.value


@pytest.mark.parametrize("classes", [7, 5])  # timm itself is strict in the first case only
def test_another_family(classes, tmp_path):
    save_file(random("swin_tiny", f"{SWIN},img_size=64").state_dict(), tmp_path / "swin.safetensors")
    error = refused(tmp_path / "swin.safetensors", num_classes=classes)
    assert "swin.safetensors does not fit vit_tiny" in error.message
    assert "patch_embed.proj.bias comes to 12 where the model has 24 and 26 more" in error.message
    assert "name the architecture that it was trained with" in error.hint


@pytest.mark.parametrize(
    ("kwargs", "reason"),
    [
        (FLAT.replace("=24", "=48"), "cls_token comes to 1×1×24 where the model has 1×1×48"),
        (FLAT.replace("depth=2", "depth=3"), "blocks.2.norm1.weight is not in the file"),
        (FLAT.replace("depth=2", "depth=1"), "blocks.1.norm1.weight is not in the model"),
        (f"{FLAT},init_values=1", "blocks.0.ls1.gamma is not in the file"),
    ],
)
@pytest.mark.parametrize("classes", [7, 5])
def test_another_size_or_another_kind_of_block(kwargs, reason, classes, tmp_path):
    torch.save(random("vit_tiny").state_dict(), tmp_path / "vit.pth")
    assert reason in refused(tmp_path / "vit.pth", "vit_tiny", kwargs, num_classes=classes).message


def test_it_names_the_architecture_that_a_file_looks_like(tmp_path, monkeypatch):
    model = random("vit_tiny")
    other_size = random("vit_tiny", FLAT.replace("32", "64"), num_classes=3)
    table = {
        "vit_of_the_file": anatomy(other_size.state_dict()),
        "its_twin": anatomy({k: v for k, v in model.state_dict().items() if "head" not in k}),
        "wider": anatomy(random("vit_tiny", FLAT.replace("=24", "=48")).state_dict()),
        "deeper": anatomy(random("vit_tiny", FLAT.replace("depth=2", "depth=3")).state_dict()),
    }
    monkeypatch.setattr(loading, "zoo", lambda: table)
    assert looks_like(model.state_dict()) == ["vit_of_the_file", "its_twin"]
    save_file(model.state_dict(), tmp_path / "vit.safetensors")
    error = refused(tmp_path / "vit.safetensors", "deit3_small", "img_size=32,depth=1")
    assert error.hint == "it looks like vit_of_the_file, its_twin: name that architecture"


def test_a_folder_given_as_a_file(tmp_path):
    assert "is a folder" in refused(tmp_path).message
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").touch()
    for folder in (tmp_path, tmp_path / "student"):
        assert f"give {tmp_path / 'student' / 'model.safetensors'}" in refused(folder).hint


def test_what_is_no_weight_file(tmp_path):
    (tmp_path / "cut.pth").write_bytes(b"PK\x03\x04 cut short")
    assert "is not a readable weight file" in refused(tmp_path / "cut.pth").message
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    assert "holds no tensors by name" in refused(tmp_path / "empty.pth").message
    torch.save({"model": random("vit_tiny")}, tmp_path / "whole.pth")
    assert "which could run any code; it was refused" in refused(tmp_path / "whole.pth").message
    assert "there is no weight file" in refused(tmp_path / "nowhere.pth").message
