"""What cannot be exported is refused in a line, and nothing half written stays."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from vitkd_cli.export.state_dict import StateDictFile


@pytest.fixture
def refused(cli, model, tmp_path, monkeypatch):
    """The message of ``vitkd export MODEL ARGUMENTS``, which leaves the folder as it was."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, of: Path | str = model, code: int = 2) -> str:
        before = sorted(tmp_path.rglob("*"))
        found, out, err = cli("export", str(of), *arguments)
        assert (found, out) == (code, ""), err
        assert sorted(tmp_path.rglob("*")) == before
        (line, *hint) = err.strip().splitlines()
        assert len(hint) == 1 and hint[0].startswith("hint: ")
        return line

    return run


FLAGS = {
    "--to png": "there is no export form 'png'",
    "--to torch --half": "--half does not go with --to torch",
    "--to timm --int8": "--int8 does not go with --to timm",
    "--to onnx --prefix x.": "--prefix does not go with --to onnx",
    "--to onnx --push-to-hub me/mine": "--push-to-hub does not go with --to onnx",
    "--to onnx --half --int8": "--half and --int8 exclude each other",
    "--to timm --push-to-hub mine": "--push-to-hub 'mine' is no ORG/NAME",
    "--to timm --push-to-hub me/mine": "HF_HUB_OFFLINE is set",
    "--to timm --data digits --images .": "--data and --images exclude each other",
    "--to timm --data digits": "its own are 2, 10, x",
    "--to onnx --int8 --data digits": "its own are 2, 10, x",
    "--to timm --images nowhere": "there is no image or folder nowhere",
    "--to onnx --int8": "--int8 is calibrated on images of the model's own kind",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_a_wrong_request(flags, refused):
    assert FLAGS[flags] in refused(*flags.split(), "--output", "out")


def test_nobody_is_logged_in(refused, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("vitkd_cli.export.hub.get_token", lambda: None)
    assert "nobody is logged in" in refused("--to", "timm", "--push-to-hub", "me/mine", "--output", "x")


def test_the_hub_says_no(cli, model, tmp_path, monkeypatch):
    from huggingface_hub import HfApi, constants

    def no(self, name, **options):
        raise OSError("403 Forbidden")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    monkeypatch.setattr(HfApi, "create_repo", no)
    out = tmp_path / "out"
    code, _, err = cli("export", str(model), "--to", "timm", "--output", str(out), "--push-to-hub", "a/b")
    assert code == 3 and "--push-to-hub a/b: 403 Forbidden" in err and (out / "config.json").is_file()


def test_what_is_there_stays(refused, cli, model, tmp_path):
    (tmp_path / "x.onnx").write_text("mine")
    assert "x.onnx is there already" in refused("--to", "onnx", "--output", "x.onnx")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/thesis.txt").write_text("mine")
    line = refused("--to", "timm", "--output", "folder", "--overwrite")
    assert "folder is a folder with thesis.txt" in line
    assert "folder is a folder" in refused("--to", "onnx", "--output", "folder", "--overwrite")
    assert "x.onnx is a file" in refused("--to", "timm", "--output", "x.onnx", "--overwrite")
    for own in (model, f"local-dir:{model}"):
        line = refused("--to", "features", "--output", str(model), "--overwrite", of=own)
        assert "is what is being exported" in line


def test_overwriting_an_earlier_export(cli, model, tmp_path):
    out = tmp_path / "before"
    for _ in range(2):
        code, _, err = cli(
            "export", str(model), "--to", "timm", "--output", str(out), "--overwrite", "--num-images", "4"
        )
        assert code == 0, err
    assert (out / "model.safetensors").is_file() and [file.name for file in tmp_path.iterdir()] == ["before"]


def test_an_output_that_cannot_be(refused, tmp_path):
    (tmp_path / "file").write_text("")
    line = refused("--to", "onnx", "--output", "file/x.onnx")
    assert "--output: cannot write file/.x.onnx: File exists" in line


@pytest.mark.parametrize("content", [b"not an image", b"\xff\xd8\xff\xe0 cut short"])
def test_a_file_that_is_no_image(content, refused, photos, tmp_path):
    (tmp_path / "photo.jpg").write_bytes(content)
    shown = ["--images", str(photos), "--images", "photo.jpg", "--num-images", "99"]
    line = refused("--to", "timm", *shown, "--output", "x", code=3)
    assert "cannot read image photo.jpg" in line


def test_a_missing_package(refused, monkeypatch):
    monkeypatch.setattr("vitkd_cli.errors.find_spec", lambda name: None if name == "onnxscript" else name)
    assert "--to onnx needs the package onnxscript" in refused("--to", "onnx", "--output", "x.onnx")


def test_no_feature_maps(refused, monkeypatch):
    monkeypatch.delattr(VisionTransformer, "forward_intermediates")
    assert "gives no feature maps in timm" in refused("--to", "features", "--output", "x")


# --- a check that fails ------------------------------------------------------------------------------------


def test_other_weights_are_not_kept(refused, monkeypatch):
    write = StateDictFile.write

    def spoil(self, path, others):
        write(self, path, others)
        state = load_file(path)
        state["head.bias"] += 1e-3
        save_file(state, path)
        return ()

    monkeypatch.setattr(StateDictFile, "write", spoil)
    line = refused("--to", "state-dict", "--output", "x.safetensors", code=3)
    assert "failed its check and was not kept: its outputs differ by up to 1.00e-03" in line


def test_numbers_that_are_none(refused, saved, tmp_path):
    folder = saved()
    state = load_file(folder / "model.safetensors")
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    save_file(state, folder / "model.safetensors")
    assert "are not finite" in refused("--to", "timm", "--output", "x", of=folder, code=3)


@pytest.mark.slow
def test_a_frozen_batch_is_found(refused, monkeypatch):
    """torch's exporter takes the batch of its trace for a constant, and says nothing of it."""
    head = VisionTransformer.forward_head

    def choosy(self, x, pre_logits=False):
        return head(self, x + 1 if x.shape[0] == 2 else x, pre_logits)

    monkeypatch.setattr(VisionTransformer, "forward_head", choosy)
    line = refused("--to", "onnx", "--output", "x.onnx", code=3)
    assert "it does not run on a batch of 3" in line
    line = refused("--to", "torch", "--output", "x.pt2", code=3)
    assert "torch.export cannot trace" in line


def test_an_operator_that_onnx_lacks(refused, monkeypatch):
    head = VisionTransformer.forward_head
    monkeypatch.setattr(
        VisionTransformer,
        "forward_head",
        lambda self, x, pre_logits=False: doubled(head(self, x, pre_logits)),
    )
    line = refused("--to", "onnx", "--output", "x.onnx", code=3)
    assert "ONNX has no operator for vitkd_test.doubled" in line


@torch.library.custom_op("vitkd_test::doubled", mutates_args=())
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@doubled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_an_opset_that_torch_does_not_write(refused):
    line = refused("--to", "onnx", "--opset", "11", "--output", "x.onnx")
    assert "--opset 11: torch" in line and "writes this model in opset" in line


def test_a_model_over_two_gib(refused, monkeypatch):
    monkeypatch.setattr("vitkd_cli.export.onnx_file.LIMIT", 1000)
    assert "is over the 2 GiB of one ONNX file" in refused("--to", "onnx", "--output", "x.onnx")
