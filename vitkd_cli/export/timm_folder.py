"""A model in timm's own hub format, loadable with nothing of ours installed; whole, or its backbone."""

import copy
import json
import math
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import tomli_w
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from vitkd_cli import __version__
from vitkd_cli.data.listing import carried
from vitkd_cli.errors import UserError
from vitkd_cli.export.card import card
from vitkd_cli.export.target import Outputs, Target
from vitkd_cli.files import MANIFEST, whole_file, whole_folder, write_json, write_manifest, write_text
from vitkd_cli.recipe import Recipe, public
from vitkd_cli.text import last_name, without_places
from vitkd_cli.vit.model import Model

VERIFIED = ("config.json", "model.safetensors")  # a model card may be written further
FILES = (*VERIFIED, "README.md", MANIFEST)


def save_student(
    student: Model,
    folder: Path,
    *,
    recipe: Recipe,
    formula: str,
    teacher: Model | None,
    metrics: dict[str, float | None],
    images: Mapping[str, Any] | None,
) -> Path:
    """Write a run's student, with what the run knows of it, by :func:`save_folder`.

    Args:
        student: as it was trained, with the classes of the data for labels; the rest as it began.
        formula: the objective that it was trained with.
        metrics: on the validation split.
        images: of the run (:func:`vitkd_cli.data.listing.written_down`).
    """
    named = recipe.public()
    if teacher and named.teacher != recipe.teacher:  # a folder, whose own run knows its name
        named = named.but(teacher=teacher.origin)
    if named.student != recipe.student:
        named = named.but(student=student.origin)
    averaged = recipe.select == "ema" or (recipe.select == "best" and recipe.model_ema)
    licences = (student.licence, teacher.licence if teacher else None)
    about = {
        "objective": formula,
        "origin": student.origin,
        "random": student.weights == "random",
        "data": named.data,
        "teacher": teacher.origin if teacher else None,
        "teacher_licence": teacher.licence if teacher else None,
        "teacher_data": teacher.about.get("data") if teacher else None,
        "metrics": metrics,
        "weights": "average" if averaged else "raw",
        "selected": recipe.select,
        # Both bind whoever uses it; this is how SPDX spells that.
        "licence": " AND ".join(dict.fromkeys(filter(None, licences))) or None,
        "recipe": named.to_toml(),
        "images": carried(images) if images else None,
    }
    return save_folder(student, folder, about)


def save_folder(model: Model, folder: Path, about: dict[str, Any], *, hub: str | None = None) -> Path:
    """Write weights, ``config.json``, a model card and a manifest; a reader sees all or nothing.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and transformers'
    ``AutoModelForImageClassification.from_pretrained(FOLDER)`` read the folder.

    Args:
        about: where it comes from. Paths in it are cut to their last name.
        hub: the repository that it goes to.
    """
    about = {**_public(about), "vitkd_version": __version__, "preprocessing": model.preprocessing}
    net = model.net.cpu()
    if next(net.parameters()).dtype is torch.float64:  # of a test
        net = copy.deepcopy(net).float()
    names = list(model.labels) if model.labels else None
    told: dict[str, Any] = {"vitkd": about}
    if names and len(names) == getattr(net, "num_classes", None):
        told["label_names"] = names
    with whole_folder(folder) as beside:
        save_weights(net, beside / "model.safetensors", {**about, "class_names": names})
        config = beside / "config.json"
        save_config_for_hf(net, str(config), model_config=told, data_config=model.preprocessing)
        content = json.loads(config.read_text())
        # transformers hands num_classes over itself and fails on a second one; timm does not need it here.
        content.get("model_args", {}).pop("num_classes", None)
        for key in ("license", "tag"):  # of timm's own weights
            content["pretrained_cfg"].pop(key, None)
        if about.get("licence"):
            content["pretrained_cfg"]["license"] = about["licence"]
        write_json(config, content)
        write_text(beside / "README.md", card(content, about, hub))
        write_manifest(beside, VERIFIED)
    return folder


def save_weights(model: nn.Module, path: Path, about: dict[str, Any], prefix: str = "") -> None:
    """The state dict under timm's key names, each behind ``prefix``, as safetensors."""
    state = {prefix + name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    with whole_file(path) as file:
        save_file(state, file, metadata={"format": "pt", "vitkd": json.dumps(about)})


def _public(about: dict[str, Any]) -> dict[str, Any]:
    """What is known of a model, by names: a folder of an earlier version may tell of places."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: named(inner) for key, inner in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            return None  # JSON has no such number
        return without_places(value) if isinstance(value, str) else value

    recipe = about.get("recipe")
    shown: dict[str, Any] = named({key: value for key, value in about.items() if key != "recipe"})
    if isinstance(about.get("teacher"), str):
        shown["teacher"] = last_name(about["teacher"])
    if isinstance(recipe, str):
        with suppress(tomllib.TOMLDecodeError):
            shown["recipe"] = tomli_w.dumps(public(tomllib.loads(recipe)))
    return shown


class TimmFolder(Target):
    """The whole model, for timm and transformers."""

    ending = "-timm"
    options = ("push_to_hub",)

    def write(self, path: Path, others: Tensor | None) -> tuple[str, ...]:
        model = self.model
        save_folder(model, path, model.provenance, hub=self.request.push_to_hub)
        return () if model.class_names or not self.classifies else ("the model names no classes",)

    def load(self, path: Path) -> Outputs:
        return self.runs(timm.create_model(f"local-dir:{path}", pretrained=True).eval())


class Backbone(Target):
    """The model without its classifier, for timm's ``features_only``: every feature map is checked."""

    ending = "-features"
    classifies = False

    def write(self, path: Path, others: Tensor | None) -> tuple[str, ...]:
        count = len(self._maps())
        backbone: Any = copy.deepcopy(self.model.net)
        if self.model.gives != "tokens":
            backbone.reset_classifier(0)
        save_folder(replace(self.model, net=backbone, labels=None), path, self.model.provenance)
        return (f"out_indices 0 to {count - 1}",)

    def load(self, path: Path) -> Outputs:
        every = tuple(range(len(self._maps())))
        backbone = timm.create_model(
            f"local-dir:{path}", pretrained=True, features_only=True, out_indices=every
        )
        run = self.runs(backbone.eval())
        if getattr(backbone, "output_fmt", None) != "NHWC":
            return run
        return lambda images: [maps.permute(0, 3, 1, 2) for maps in run(images)]

    def expected(self) -> Outputs:
        return self.runs(_Maps(self.model.net))

    def _maps(self) -> list[Tensor]:
        spec = self.model.spec
        if not hasattr(self.model.net, "forward_intermediates"):
            raise UserError(f"{spec.name} gives no feature maps in timm", "--to timm")
        with torch.no_grad():
            maps: list[Tensor] = _Maps(self.model.net)(torch.zeros(1, len(spec.mean), *spec.input_size))
        return maps


class _Maps(nn.Module):
    """A model's own feature maps: the raw outputs of its blocks, or of its stages, ``[B, D, H, W]`` each."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.forward_intermediates(images, intermediates_only=True)
