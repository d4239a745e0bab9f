"""The package from Python: its names, its figures in a notebook, and what its functions take."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import timm
import torch

import vitkd_cli as vitkd
from vitkd_cli.export import export
from vitkd_cli.training import Reporter, Result
from vitkd_cli.vit.build import open_model

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3, "num_classes": 10}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("python") / "<i>run"
    recipe = vitkd.Recipe(**tiny | {"loss": "labels", "teacher": None, "teacher_kwargs": None, "steps": 1})
    return vitkd.distill(recipe.but(output=folder), reporter=Reporter(silent=True))


def test_the_public_names_are_listed():
    assert {"Recipe", "distill", "evaluate", "inspect_attention", "Run"} <= set(dir(vitkd))
    assert all(getattr(vitkd, name) is not None for name in dir(vitkd))
    assert not [name for name in dir(vitkd) if name.startswith("_") and name != "__version__"]


@pytest.mark.parametrize(
    "as_given", [lambda run: run.student, lambda run: str(run.student), lambda run: run.folder]
)
def test_a_student_is_scored_by_its_path(run, as_given):
    found = vitkd.evaluate(as_given(run), "digits", workers=0, device="cpu")
    assert found.metrics.top1 == run.results[0].top1


def test_models_that_were_built_are_taken_as_they_are(run, photos, tmp_path):
    built = open_model(run.student)
    bare = timm.create_model(f"local-dir:{run.student}", pretrained=True)
    wanted = run.results[0].top1
    found = vitkd.evaluate_all([built, bare], "digits", workers=0, teacher=run.student, device="cpu")
    assert [one.metrics.top1 for one in found.models] == [wanted, wanted]
    assert found.models[1].metrics.agreement(found.models[1].teacher) == 100
    done = export(bare, "state-dict", output=tmp_path / "x.safetensors", data=Path("digits"), num_images=4)
    assert done.found.difference == 0 and all(p.requires_grad for p in bare.parameters())
    seen = vitkd.inspect_attention(bare, photos / "cat" / "00.jpg", output=tmp_path / "attention")
    assert seen.images == 1 and all(path.is_file() for path in seen.files)
    with pytest.raises(vitkd.UserError, match="output="):
        export(bare, "timm")


def test_folders_may_be_paths(photos, tmp_path):
    recipe = vitkd.Recipe(data=photos, output=tmp_path, teacher=Path("a"), class_map=Path("b"))
    assert (recipe.data, recipe.output, recipe.teacher) == (str(photos), str(tmp_path), "a")
    assert vitkd.resolve(Path("deit_tiny")).architecture == vitkd.resolve("deit_tiny").architecture


def test_a_run_and_an_evaluation_are_short_in_a_notebook(run):
    top1 = f"{run.results[0].top1:.2f}"
    assert repr(run) == f"Run({str(run.folder)!r}: student {top1})"
    found = vitkd.evaluate(run.student, "digits", workers=0, device="cpu")
    assert top1 in repr(found) and "'digits'" in repr(found) and len(repr(found)) < 300
    for shown in (run._repr_html_(), found._repr_html_()):
        assert shown.startswith("<table>") and top1[:-1] in shown
    hostile = vitkd.Run(run.folder, run.recipe, (Result("<b>\n", 1, ".", "<script>", 1),), None)
    assert "<script>" not in hostile._repr_html_() and "&lt;script&gt;" in hostile._repr_html_()


@pytest.mark.parametrize("make", [vitkd.Recipe, vitkd.Recipe().but])
def test_a_mistyped_field_is_told_the_nearest(make):
    with pytest.raises(vitkd.UserError, match="did you mean epochs"):
        make(epoch=3)


def test_a_recipe_is_copied_and_pickled():
    recipe = vitkd.Recipe(epochs=7)
    assert copy.deepcopy(recipe) == recipe == pickle.loads(pickle.dumps(recipe))


@torch.no_grad()
def test_an_export_of_a_built_model_answers_as_it_does(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **SMALL).eval()
    export(model, "timm", output=tmp_path / "out", num_images=4)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(
        timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()(images), model(images)
    )
