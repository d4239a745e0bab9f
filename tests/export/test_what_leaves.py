"""What an export tells of its owner, of its model, and to those who read hostile text."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from timm.models._hub import save_for_hf

from vitkd_cli import Recipe, distill
from vitkd_cli.export import TARGETS, export
from vitkd_cli.export.card import card
from vitkd_cli.export.timm_folder import save_student
from vitkd_cli.progress import Reporter
from vitkd_cli.text import code, last_name, markdown, plain, without_places
from vitkd_cli.vit.build import open_model

PLUGIN = """
from vitkd_cli.terms import Term, term
from vitkd_cli.vit.taps import LOGITS

@term("zero")
class Zero(Term):
    \"\"\"Nothing.\"\"\"
    uses_teacher = False

    def __init__(self, student, teacher):
        super().__init__()
        self.compares = [(LOGITS, None)]

    def forward(self, pairs, batch):
        return 0 * pairs[0][0].sum()
"""
VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
HOSTILE = 'a"\n---\n# Owned\n<script>alert(1)</script>| `x` [l](http://e)\x1b[2J'


@pytest.fixture(scope="module")
def home(photos, tmp_path_factory):
    """The run of somebody whose name stands in every path: data, teacher, plugin and output."""
    from vitkd_cli import terms

    terms.registered_terms()
    before = dict(terms._registry)
    home = tmp_path_factory.mktemp("o'brien home")
    for name in photos.iterdir():
        shutil.copytree(name, home / "flowers" / name.name)
    (home / "zero.py").write_text(PLUGIN)
    torch.manual_seed(0)
    model = timm.create_model(VIT, num_classes=5, **SMALL)
    save_for_hf(model, str(home / "downloaded"), model_args=SMALL, safe_serialization=True)
    recipe = Recipe(
        data=str(home / "flowers"), teacher=str(home / "downloaded"), finetune_teacher=1,
        student="vit_tiny", model_kwargs="img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3",
        plugin=str(home / "zero.py"), loss="labels + vitkd + zero", epochs=1, steps=1, batch_size=12,
        workers=0, device="cpu", output=str(home / "run"),
    )  # fmt: skip
    distill(recipe, trust_plugin=True, reporter=Reporter(silent=True))
    terms._registry.clear()
    terms._registry.update(before)
    return home


def bytes_of(path: Path) -> bytes:
    """All that a file or folder says, unpacked."""
    if path.is_dir():
        return b"".join(map(bytes_of, path.iterdir()))
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            return b"".join(map(packed.read, packed.namelist())) + "\n".join(packed.namelist()).encode()
    return path.read_bytes()


@pytest.mark.parametrize("to", [None, *TARGETS])
def test_nothing_that_leaves_names_a_place(home, to, tmp_path):
    path = home / "run" / "student"
    if to:
        path = export(str(home / "run"), to, output=tmp_path / "out", num_images=4).output
    said = bytes_of(path)
    repository = str(Path(__file__).parents[2])
    for secret in (str(home), home.name, "brien", str(tmp_path), repository, timm.__path__[0]):
        assert secret.encode() not in said, secret
        assert json.dumps(secret).strip('"').encode() not in said


def test_an_older_students_places_stay_behind(home, tmp_path):
    folder = shutil.copytree(home / "run" / "student", tmp_path / "old")
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    recipe = (
        f'schema = 1\nteacher = "{home}/downloaded"\ndata = "{home}/flowers"\nfuture = "{tmp_path}/x y"\n'
    )
    config["vitkd"] |= {"recipe": recipe, "teacher": f"{home}/downloaded", "data": None}
    (folder / "config.json").write_text(json.dumps(config))
    said = bytes_of(export(str(folder), "timm", output=tmp_path / "out", check_forward=False).output)
    assert b"brien" not in said and str(tmp_path).encode() not in said
    assert b'data = "flowers"' in said


def test_a_fine_tuned_teacher_keeps_its_name_and_licence(home):
    card = ModelCard.load(home / "run/student/README.md")
    config = json.loads((home / "run/student/config.json").read_text())
    about = config["vitkd"]
    assert (about["teacher"], about["teacher_licence"]) == (VIT, "apache-2.0")
    assert (about["data"], about["teacher_data"]) == ("flowers", "flowers")
    assert f"`{VIT}`, trained further on flowers (licence: apache-2.0)" in card.text
    assert card.data.license == "apache-2.0" and card.data.base_model == [f"timm/{VIT}"]
    again = Recipe.from_toml(home / "run/recipe.toml").public()
    assert (again.data, again.teacher, again.output) == ("flowers", "downloaded", None)
    assert f'teacher = "{VIT}"' in about["recipe"]
    assert "tag" not in config["pretrained_cfg"]  # this student began from nothing
    assert "| began as | random weights, `vit_tiny_patch16_224` |" in card.text


def test_the_card_is_what_the_hub_reads(home):
    data = ModelCard.load(home / "run/student/README.md").data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("timm", "image-classification")
    assert data["datasets"] == ["flowers"]
    [index] = data["model-index"]
    top1 = json.loads((home / "run/result.json").read_text())["top1"]
    [results] = index["results"]
    assert results["dataset"] == {"name": "flowers", "type": "flowers", "split": "validation"}
    assert results["metrics"][0] == {"type": "accuracy", "name": "top1, percent", "value": top1}
    assert "yang2022vitkd" in ModelCard.load(home / "run/student/README.md").text


def test_two_licences_bind(home, tmp_path):
    built = open_model(str(home / "run/student"))
    other = open_model(str(home / "downloaded"))
    folder = save_student(
        replace(built, licence="cc-by-nc-4.0"), tmp_path / "s", teacher=other, metrics={"loss": float("nan")},
        recipe=Recipe(teacher="x", student="y", pretrained=True, data="digits"), formula="kd", images={},
    )  # fmt: skip
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.license_name) == ("other", "cc-by-nc-4.0 AND apache-2.0")


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
@pytest.mark.parametrize("to", ["timm", "features", "state-dict"])
def test_others_may_read_what_the_umask_lets_them(model, tmp_path, to):
    before = os.umask(0o027)
    try:
        path = export(str(model), to, output=tmp_path / "out", check_forward=False).output
    finally:
        os.umask(before)
    for file in path.iterdir() if path.is_dir() else [path]:
        assert file.stat().st_mode & 0o777 == 0o640, file


# --- hostile text -------------------------------------------------------------------------------------------


def test_a_hostile_name_stays_text_in_the_card():
    config = {"architecture": HOSTILE, "num_classes": 2}
    about = {
        **dict.fromkeys(("licence", "data", "origin", "teacher", "teacher_licence", "teacher_data"), HOSTILE),
        **dict.fromkeys(("objective", "weights", "selected"), HOSTILE),
        "recipe": 'data = "x"',
        "metrics": {"top1": 1.0, HOSTILE: 2.0, "x": HOSTILE},
        "preprocessing": {"input_size": [3, 32, 32]},
    }
    text = card(config, about)
    assert "\x1b" not in text
    parsed = ModelCard(text)
    assert parsed.data.license == "other"
    assert parsed.data.license_name == HOSTILE.replace("\n", r"\n").replace("\x1b", r"\x1b")
    tokens = MarkdownIt("commonmark").enable("table").parse(parsed.text)
    inline = [child for token in tokens for child in token.children or []]
    assert [token.tag for token in tokens if token.type == "heading_open"] == ["h1", "h2"]
    assert {token.type for token in inline} <= {"text", "code_inline"}
    assert [token.content.split(">")[0] for token in tokens if token.type == "html_block"] == [
        "<details",
        "</details",
    ]
    rows = sum(token.type == "tr_open" for token in tokens)
    assert sum(token.type == "td_open" for token in tokens) == 2 * (rows - 1)


@pytest.mark.parametrize(
    "text", ["a|b", "`", "``a`", "*_x_*", "<b>", "[a](b)", r"\|", "#", "a\nb", "&lt;", "~~x~~"]
)
def test_markdown_shows_the_text_itself(text):
    for write in (markdown, code):
        page = f"| a |\n|---|\n| {write(text)} |\n"
        [_, cell] = [t for t in MarkdownIt("commonmark").enable("table").parse(page) if t.type == "inline"]
        assert "".join(child.content for child in cell.children) == plain(text), cell


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("/home/me/flowers", "flowers"), ("~/imagenet/", "imagenet"), ("~me/x/y", "y"),
        ("C:\\Users\\me\\x", "x"), ("Local_Dir:/home/me/x", "x"),
        ("local-dir:/home/me/a b", "a b"), ("../me/x", "x"), ("/home/o'brien/da,ta", "da,ta"),
        ("hfds/timm/imagenet-1k", "hfds/timm/imagenet-1k"), ("hf-hub:me/x@1", "hf-hub:me/x@1"),
        ("deit3_small_patch16_224.fb_in1k", "deit3_small_patch16_224.fb_in1k"), ("/", "/"), ("", ""),
    ],
)  # fmt: skip
def test_a_place_is_cut_to_its_last_name(said, kept):
    assert last_name(said) == kept


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("depth=4,file=/home/me/a b/c.pth", "depth=4,file=c.pth"),
        ('labels + x(file="/home/me/y.json")', 'labels + x(file="y.json")'),
        ("a.py,/home/me/b.py", "a.py,b.py"),
        ("timm/vit, and/or https://a.b/c", "timm/vit, and/or https://a.b/c"),
    ],
)
def test_places_within_a_text_are_cut(said, kept):
    assert without_places(said) == kept
