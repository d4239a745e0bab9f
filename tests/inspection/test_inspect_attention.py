"""``vitkd inspect-attention`` as a user types it: what it writes, prints and refuses."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.numpy import load_file
from timm.models._hub import save_for_hf

from vitkd_cli.cli.spelling import respell
from vitkd_cli.data.transforms import view_of
from vitkd_cli.inspection.maps import attend, attention_layers
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.spec import as_seen_by

TEACHER = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
STUDENT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 10}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models in folders, as a run leaves them."""
    root = tmp_path_factory.mktemp("models")
    models = {
        "teacher": ("vit_tiny_patch16_224", TEACHER),
        "student": ("vit_tiny_patch16_224", STUDENT),
        "same": ("vit_tiny_patch16_224", {**TEACHER, "img_size": 32}),
        "cait": ("cait_xxs24_224", {**TEACHER, "img_size": 32, "depth_token_only": 1}),
        "gap": ("vit_tiny_patch16_224", {**STUDENT, "class_token": False, "global_pool": "avg"}),
    }
    found = {}
    for name, (architecture, arguments) in models.items():
        torch.manual_seed(0)
        model = timm.create_model(architecture, **arguments)
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        arguments = {key: value for key, value in arguments.items() if key != "num_classes"}
        save_for_hf(model, root / name, model_args=arguments, safe_serialization=True)
        found[name] = str(root / name)
    return found


def test_a_teacher_and_its_student(cli, folders, photos, tmp_path):
    files = [str(photos / "cat" / "00.jpg"), str(photos / "coffee" / "00.jpg")]
    code, out, err = cli(
        "inspect-attention", folders["teacher"], folders["student"], "--images", *files, "--rollout",
        "--heads", "all", "--output", str(tmp_path / "out"), "--device", "cpu", "-q",
    )  # fmt: skip
    assert (code, err) == (0, "")
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"attention.html", "numbers.json", "numbers.csv", "numbers.png"} <= written
    assert not {"cka.png", "jensen-shannon.png"} & written  # nothing could be compared
    assert all(str(tmp_path / "out" / name) in out for name in written)
    assert "teacher" in out and "student" in out and "±" in out
    assert "both see the part of an image that the student is evaluated on" in out
    assert "CKA needs 4 images, and there are 2" in out and "6 pairs left out" in out  # 6×6 patches and 4×4
    numbers = json.loads((tmp_path / "out" / "numbers.json").read_text())
    assert numbers["images"] == 2
    assert [len(model["rows"]) for model in numbers["models"]] == [3 * 4, 2 * 3]
    assert numbers["jensen_shannon"] == [[None, None]] * 3
    with (tmp_path / "out" / "numbers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    assert float(rows[0]["entropy"]) == numbers["models"][0]["rows"][0]["entropy"]


def test_json_is_all_that_is_printed(cli, folders, tmp_path):
    code, out, _ = cli(
        "inspect-attention", folders["same"], folders["student"], "--data", "digits", "--num-images", "12",
        "--num-pictures", "1", "--output", str(tmp_path), "--device", "cpu", "--json", "--quiet",
    )  # fmt: skip
    assert code == 0
    found = json.loads(out)
    assert found["images"] == 12
    assert np.array(found["cka"]).shape == np.array(found["jensen_shannon"]).shape == (3, 2)
    assert 0 < found["jensen_shannon"][0][0] < math.log(2)
    for row in (row for model in found["models"] for row in model["rows"]):
        assert 0 < row["entropy"] <= math.log(17) and 0 < row["distance"] < 32
        assert 0 < row["prefix_share"] < 1 and row["entropy_se"] > 0


def test_a_dump_holds_the_maps_of_the_model(cli, folders, photos, tmp_path):
    image = photos / "cat" / "01.jpg"
    code, _, _ = cli(
        "inspect-attention", folders["cait"], "--images", str(image), "--dump", str(tmp_path / "maps"),
        "--output", str(tmp_path / "out"), "--layers", "1,-1", "--heads", "0,2", "--device", "cpu", "-q",
    )  # fmt: skip
    assert code == 0
    index = json.loads((tmp_path / "maps" / "index.json").read_text())
    [model], [entry] = index["models"], index["images"]
    assert (entry["name"], entry["size"]) == (str(image), [96, 96])
    assert model["patch_grid"] == [4, 4] and model["heads"] == "0,2"
    assert {name: layer["kind"] for name, layer in model["layers"].items()} == {
        "block.01.attention": "tokens",
        "layer.03.attention": "class",
    }
    tensors = load_file(tmp_path / "maps" / entry["files"][0])
    assert tensors.keys() == {"image", *model["layers"]}
    built = open_model(folders["cait"])
    layers = attention_layers(built)
    preprocessing = model["preprocessing"]
    view = view_of(
        {
            "input_size": (3, *preprocessing["input_size"]),
            **{key: preprocessing[key] for key in ("crop_pct", "crop_mode", "interpolation")},
        }
    )(Image.open(image))
    assert np.array_equal(tensors["image"], view.permute(1, 2, 0).numpy())
    maps = {}
    attend(
        built, layers, as_seen_by(built.spec, view[None] / 255), lambda layer, m: maps.update({layer.path: m})
    )
    for name, path in (("block.01.attention", "blocks.1.attn"), ("layer.03.attention", layers[3].path)):
        assert tensors[name].dtype == np.float32
        np.testing.assert_allclose(tensors[name], maps[path][0, [0, 2]].numpy(), atol=1e-6)


def test_windows_are_in_the_index(cli, tmp_path):
    torch.manual_seed(0)
    arguments = {"img_size": 32, "depths": (2,), "embed_dim": 24, "num_heads": (2,), "window_size": 4}
    model = timm.create_model("swin_tiny_patch4_window7_224", **arguments)
    save_for_hf(model, tmp_path / "swin", model_args=arguments, safe_serialization=True)
    code, _, _ = cli(
        "inspect-attention", str(tmp_path / "swin"), "--data", "digits", "--num-images", "1", "--dump",
        str(tmp_path / "maps"), "--output", str(tmp_path / "out"), "--device", "cpu", "-q",
    )  # fmt: skip
    assert code == 0
    index = json.loads((tmp_path / "maps" / "index.json").read_text())
    shifted = index["models"][0]["layers"]["block.01.attention"]
    assert shifted["kind"] == "windows" and np.sort(shifted["windows"], None).tolist() == list(range(64))
    map_ = load_file(tmp_path / "maps" / "0000-0.safetensors")["block.01.attention"]
    assert map_.shape == (1, 4, 16, 16)


def test_teachers_are_sorted_by_accuracy(cli, folders):
    base = (
        "inspect-attention",
        folders["student"],
        "--data",
        "digits",
        "--num-images",
        "8",
        "--device",
        "cpu",
    )
    code, out, _ = cli(*base, "--teachers", folders["same"], folders["cait"], "--json", "-q")
    assert code == 0
    found = json.loads(out)
    assert len(found) == 2 and found[0]["top1"] >= found[1]["top1"]
    for one in found:
        assert 0 < one["similarity"] < 1 and one["pairs"] == 2 and one["larger"] > 1 and one["dearer"] > 1
        assert -1 < one["cka"] <= 1
    code, out, _ = cli(*base, "--teachers", f"{folders['student']},{folders['teacher']}", "-q")
    assert code == 0
    assert "similarity and CKA describe, they do not rank" in out
    assert "1.000" in out  # the student beside itself
    assert "–" in out  # patches of another grid


def test_accuracy_is_that_of_eval(cli, folders):
    common = ("--data", "digits", "--device", "cpu", "--json", "-q")
    _, alone, _ = cli("eval", folders["same"], *common, "-j", "0")
    _, out, _ = cli(
        "inspect-attention", folders["student"], "--teachers", folders["same"], "--num-images", "4", *common
    )
    assert json.loads(out)[0]["top1"] == json.loads(alone)["top1"]


def test_several_words_behind_one_flag():
    typed = ["inspect-attention", "vit", "--images", "a", "b", "-b", "4", "--teachers", "x", "y", "--json"]
    assert respell(typed) == [
        "inspect-attention", "vit", "--images", "a", "--images", "b", "-b", "4", "--teachers", "x",
        "--teachers", "y", "--json",
    ]  # fmt: skip
    assert respell(["--images=a", "b"]) == ["--images=a", "--images", "b"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{student}", "{student}", "{student}"], "there are 3 models"),
        (["{student}", "{same}", "--teachers", "{same}"], "--teachers is for one model, their student"),
        (["{student}", "--images", "nowhere.jpg"], "there is no image or folder nowhere.jpg"),
        (["{student}", "--layers", "first"], "--layers first: neither all nor numbers"),
        (["{student}", "--layers", "0,2"], "--layers 2: {student} has 2 layers that attend"),
        (["{student}", "--heads", "0,2"], "--heads 0,2: "),
        (["{student}", "--query", "4,0"], "--query 4,0: "),
        (["{gap}", "--query", "cls"], "--query cls: {gap} has no class token"),
        (
            ["{cait}", "--rollout"],
            "--rollout: {cait}: layer 3 (blocks_token_only.0.attn) is of the kind class",
        ),
        (["efficientvit_b0", "--no-pretrained"], "efficientvit_b0 has no attention map to read"),
        (["{student}", "--img-size", "4"], "does not take 4×4 images"),
        (
            ["{student}", "--teachers", "{teacher}", "--output", "x"],
            "--teachers prints a table and writes no",
        ),
        (["{student}", "--output", "/dev/null/out"], "--output: cannot write /dev/null/out"),
        (["{student}", "--dump", "{full}"], "is not empty"),
        (["{student}", "--output", "{full}"], "is not empty"),
        (["{student}", "--device", "tpu"], "there is no device 'tpu'"),
        (["{student}", "--images", "{full}/torn.jpg"], "cannot read image"),
        (["{student}", "--images", "{full}/words.jpg"], "cannot read image"),
    ],
)
def test_mistakes(cli, folders, tmp_path, arguments, message):
    full = tmp_path / "full"
    full.mkdir()
    (full / "words.jpg").write_text("no image")
    Image.new("RGB", (64, 64)).save(full / "whole.jpg")
    (full / "torn.jpg").write_bytes((full / "whole.jpg").read_bytes()[:300])
    arguments = [argument.format(**folders, full=full) for argument in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path / "out")]
    code, out, err = cli("inspect-attention", *arguments, *output, "--num-images", "2", "-q")
    assert code in (2, 3) and out == ""
    assert message.format(**folders) in err.splitlines()[0]
    assert len(err.splitlines()) <= 2 and "Traceback" not in err
    assert not (tmp_path / "out").exists()  # a call that was refused leaves nothing


def test_a_full_folder_is_written_into_where_that_is_said(cli, folders, tmp_path):
    (tmp_path / "mine.txt").write_text("kept")
    Image.new("RGB", (5, 3), "red").save(tmp_path / "small.png")  # smaller than a patch: the view enlarges it
    arguments = (
        "inspect-attention", folders["gap"], "--images", str(tmp_path / "small.png"), "--output",
        str(tmp_path), "--num-pictures", "1", "--device", "cpu", "-q",
    )  # fmt: skip
    assert cli(*arguments)[0] == 2
    assert cli(*arguments, "--overwrite")[0] == 0
    assert (tmp_path / "mine.txt").read_text() == "kept" and (tmp_path / "attention.html").is_file()


def test_an_output_is_refused_before_any_work(cli, tmp_path):
    # There is no such model, and no network to ask for it.
    code, _, err = cli("inspect-attention", "hf-hub:nobody/nothing", "--output", "/dev/null/out")
    assert code == 2 and "--output: cannot write /dev/null/out" in err


def test_a_stream_cannot_be_chosen_from(monkeypatch):
    from vitkd_cli.data.images import Stream
    from vitkd_cli.errors import UserError
    from vitkd_cli.inspection.images import images_of
    from vitkd_cli.requests import InspectRequest

    stream = Stream([], "hfids/x")
    monkeypatch.setattr("vitkd_cli.evaluation.images.named_split", lambda *_, **options: (stream, None))
    with pytest.raises(UserError, match="hfids/x is a stream, whose images cannot be chosen"):
        images_of(InspectRequest(("deit_tiny",), data="hfids/x", num_images=4))


def test_images_of_one_name_do_not_replace_each_other(cli, folders, photos, tmp_path):
    files = [tmp_path / name for name in ("a b.jpg", "a_b.jpg", "below/a b.jpg", "0-a_b.jpg")]
    for file in files:
        file.parent.mkdir(exist_ok=True)
        shutil.copy(photos / "cat" / "00.jpg", file)
    output = ("--output", str(tmp_path / "out"), "--device", "cpu", "-q")
    assert cli("inspect-attention", folders["student"], "--images", *map(str, files), *output)[0] == 0
    assert len(list((tmp_path / "out").glob("*-layers.png"))) == 4


def test_the_lines_of_the_docs_draw_a_dump(cli, folders, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = str(photos / "cat" / "02.jpg")
    dumped = ("--images", image, "--dump", "maps", "--output", "out", "--device", "cpu", "-q")
    assert cli("inspect-attention", folders["student"], *dumped)[0] == 0
    page = (Path(__file__).parents[2] / "docs" / "attention.md").read_text()
    [lines] = [text for text in re.findall(r"```python\n(.*?)```", page, re.S) if "load_file" in text]
    assert len(lines.strip().splitlines()) <= 11
    drawn: dict[str, np.ndarray] = {}
    exec(lines, drawn)
    assert Path("class-token.png").is_file()
    built = open_model(folders["student"])
    maps = {}
    seen = as_seen_by(built.spec, torch.from_numpy(drawn["tensors"]["image"]).permute(2, 0, 1)[None] / 255)
    attend(built, attention_layers(built), seen, lambda layer, m: maps.update({layer.path: m}))
    np.testing.assert_allclose(drawn["row"], maps["blocks.1.attn"][0].mean(0)[0, 1:].numpy(), atol=1e-6)


def test_pictures_say_the_class_and_what_each_model_names(photos, folders, tmp_path):
    from vitkd_cli import inspect_attention

    models = [folders["teacher"], folders["student"]]
    seen = inspect_attention(models, data=photos, num_images=3, num_pictures=2, output=tmp_path)
    page = (tmp_path / "attention.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    [first, second] = data["images"]
    assert [first["truth"], second["truth"]] == ["astronaut", "cat"]  # in turn
    assert re.fullmatch(r"cat/\d\d\.jpg", second["name"])
    for look in first["looks"]:
        assert re.fullmatch(r".+ \(\d+%\)", look["says"])
    assert any(path.name.startswith("cat_") for path in seen.files)
    assert re.fullmatch(r"teacher models\d+/teacher", first["looks"][0]["title"])
    assert str(tmp_path.parent) not in page
