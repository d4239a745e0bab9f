"""A student's folder is what was written, or it is not used."""

from __future__ import annotations

import json
import shutil

import pytest
import timm
import torch
from transformers import AutoModelForImageClassification

from vitkd_cli import UserError
from vitkd_cli.files import MANIFEST, sha256_of
from vitkd_cli.vit.build import open_model


@pytest.fixture
def student(run, tmp_path):
    return shutil.copytree(run / "student", tmp_path / "student")


def test_it_names_weights_and_configuration_and_others_load_the_folder(student):
    promised = json.loads((student / MANIFEST).read_text())
    assert promised == {name: sha256_of(student / name) for name in ("config.json", "model.safetensors")}
    (student / "README.md").write_text("# Mine\n")  # a card may be written further
    images = torch.rand(2, 3, 32, 32)
    ours = timm.create_model(f"local-dir:{student}", pretrained=True).eval()
    theirs = AutoModelForImageClassification.from_pretrained(student).eval()
    with torch.no_grad():
        assert torch.equal(ours(images), theirs(images).logits)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda content: content[:-40] + bytes([content[-40] ^ 1]) + content[-39:]),
        ("model.safetensors", lambda content: content[:-4]),
        ("config.json", lambda content: content.replace(b"32", b"40")),
        (MANIFEST, lambda content: content[:-4]),
    ],
)
def test_a_flipped_bit_a_cut_and_an_edit_are_named(name, change, student):
    (student / name).write_bytes(change((student / name).read_bytes()))
    with pytest.raises(UserError, match=f"is damaged or was changed: {name} "):
        open_model(str(student))


def test_a_changed_student_is_refused_wherever_it_is_used(student, tmp_path, cli, flags, tiny):
    with open(student / "model.safetensors", "ab") as file:
        file.write(b"x")
    tiny = {**tiny, "loss": "labels + kd", "steps": 1}
    for command in (
        ["eval", str(student), "--data", "digits"],
        ["export", str(student), "--to", "state-dict"],
        ["inspect-attention", str(student), "--data", "digits", "--output", str(tmp_path / "maps")],
        ["distill", *flags({**tiny, "student": student, "pretrained": True}), "--dry-run"],
        ["distill", *flags({**tiny, "teacher": student}), "--dry-run"],
    ):
        code, _, err = cli(*command)
        assert code == 2 and f"{student} is damaged or was changed: model.safetensors" in err
        assert "--no-verify" in err


def test_who_must_can_use_it_as_it_is(student, cli):
    config = student / "config.json"
    config.write_text(config.read_text() + "\n")
    code, out, _ = cli("eval", str(student), "--data", "digits", "--workers", "0", "--no-verify", "--json")
    assert code == 0 and json.loads(out)
