"""A model in timm's own hub format, loadable with nothing of ours installed; whole, or its backbone."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from vitkd_cli import __version__
from vitkd_cli.errors import UserError
from vitkd_cli.export.source import Model, Source, runs
from vitkd_cli.export.target import Asked, Target
from vitkd_cli.files import MANIFEST, write_manifest
from vitkd_cli.recipe import Recipe

VERIFIED = ("config.json", "model.safetensors")  # a model card may be written further
FILES = (*VERIFIED, "README.md", MANIFEST)


def save_student(
    model: nn.Module,
    folder: Path,
    *,
    class_names: tuple[str, ...] | None,
    preprocessing: dict[str, Any],
    recipe: Recipe,
    formula: str,
    teacher: str | None,
    teacher_licence: str | None,
    metrics: dict[str, float | None],
    weights: str,
    selected: str,
) -> Path:
    """Write a run's student, with what the run knows of it, by :func:`save_folder`.

    Args:
        formula: the objective that it was trained with.
        weights: ``raw`` or ``average``.
        selected: ``last``, ``best`` (on the validation split) or ``ema``.
    """
    own = getattr(model, "pretrained_cfg", {}).get("license") if recipe.pretrained else None
    about = {
        "objective": formula,
        "teacher": teacher,
        "metrics": metrics,
        "weights": weights,
        "selected": selected,
        "licence": teacher_licence or own,
        "recipe": recipe.to_toml(),
    }
    return save_folder(model, folder, class_names=class_names, preprocessing=preprocessing, about=about)


def save_folder(
    model: nn.Module,
    folder: Path,
    *,
    class_names: tuple[str, ...] | None,
    preprocessing: dict[str, Any],
    about: dict[str, Any],
) -> Path:
    """Write ``model.safetensors``, ``config.json``, a model card and a manifest; a reader sees all or nothing.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and transformers'
    ``AutoModelForImageClassification.from_pretrained(FOLDER)`` read the folder.

    Args:
        preprocessing: timm's data configuration, as the model is to be evaluated.
        about: where it comes from; the card says what there is of it.
    """
    about = {**about, "vitkd_version": __version__, "preprocessing": preprocessing}
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model = model.cpu()
    if next(model.parameters()).dtype is torch.float64:  # a test's business; what leaves is what others load
        model = copy.deepcopy(model).float()
    told = {**about, "class_names": list(class_names) if class_names else None}
    save_weights(model, beside / "model.safetensors", told)
    labels: dict[str, Any] = {"label_names": list(class_names)} if class_names else {}
    if labels and len(labels["label_names"]) != getattr(model, "num_classes", None):
        labels = {}
    config = beside / "config.json"
    save_config_for_hf(model, str(config), model_config={**labels, "vitkd": about}, data_config=preprocessing)
    content = json.loads(config.read_text())
    # transformers hands num_classes over itself and fails on a second one; timm does not need it here.
    content.get("model_args", {}).pop("num_classes", None)
    content["pretrained_cfg"].pop("license", None)  # of timm's own weights
    if about.get("licence"):
        content["pretrained_cfg"]["license"] = about["licence"]
    config.write_text(json.dumps(content, indent=2))
    (beside / "README.md").write_text(_card(content, about))
    write_manifest(beside, VERIFIED)
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(beside, folder)
    return folder


def save_weights(model: nn.Module, path: Path, about: dict[str, Any], prefix: str = "") -> None:
    """The state dict under timm's key names, each behind ``prefix``, as safetensors."""
    state = {prefix + name: t.detach().cpu().contiguous().clone() for name, t in model.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", "vitkd": json.dumps(about)})


def _card(config: dict[str, Any], about: dict[str, Any]) -> str:
    """A model card, as the hub expects it."""
    licence, recipe = about.get("licence"), about.get("recipe")
    rows: list[tuple[str, str]] = []
    if recipe:
        teacher = f"`{about['teacher']}`" if about["teacher"] else "none"
        rows += [
            ("teacher", f"{teacher}{f' (licence: {licence})' if about['teacher'] and licence else ''}"),
            ("objective", f"`{about['objective']}`"),
        ]
    rows += [
        ("classes", str(config["num_classes"] or "none: its output is an embedding")),
        ("image size", "×".join(map(str, about["preprocessing"]["input_size"][1:]))),
    ]
    if recipe:
        numbers = ", ".join(
            f"{name} {value:.2f}" for name, value in about["metrics"].items() if value is not None
        )
        rows += [
            ("validation", numbers or "none"),
            ("weights", f"{about['weights']}, selected: {about['selected']}"),
        ]
    lines = [
        "---",
        "tags:",
        f"- image-{'classification' if config['num_classes'] else 'feature-extraction'}",
        "- timm",
        "library_name: timm",
        *([f"license: {licence}"] if licence else []),
        "---",
        f"# {config['architecture']}, {'trained' if recipe else 'exported'} with vitkd",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()',
        "```",
        "",
    ]
    if recipe:
        lines += [
            "<details><summary>Recipe</summary>",
            "",
            "```toml",
            recipe.strip(),
            "```",
            "",
            "</details>",
        ]
    return "\n".join([*lines, ""])


class TimmFolder(Target):
    """The whole model, for timm and transformers."""

    ending = "-timm"
    options = ("push_to_hub",)

    def write(self, source: Source, path: Path, asked: Asked, others: Tensor | None) -> tuple[str, ...]:
        names = source.built.class_names
        save_folder(
            source.built.model,
            path,
            class_names=names,
            preprocessing=source.preprocessing,
            about=source.about,
        )
        return () if source.class_names or source.gives != "logits" else ("the model names no classes",)

    def load(self, path: Path, source: Source, asked: Asked, device: torch.device) -> Model:
        return runs(timm.create_model(f"local-dir:{path}", pretrained=True).eval(), source, device)


class Backbone(Target):
    """The model without its classifier, for timm's ``features_only``: every feature map is checked."""

    ending = "-features"

    def write(self, source: Source, path: Path, asked: Asked, others: Tensor | None) -> tuple[str, ...]:
        count = len(self._maps(source))
        backbone: Any = copy.deepcopy(source.built.model)
        if source.gives != "tokens":
            backbone.reset_classifier(0)
        save_folder(backbone, path, class_names=None, preprocessing=source.preprocessing, about=source.about)
        return (f"out_indices 0 to {count - 1}",)

    def load(self, path: Path, source: Source, asked: Asked, device: torch.device) -> Model:
        every = tuple(range(len(self._maps(source))))
        backbone = timm.create_model(
            f"local-dir:{path}", pretrained=True, features_only=True, out_indices=every
        )
        run = runs(backbone.eval(), source, device)
        if getattr(backbone, "output_fmt", None) != "NHWC":
            return run
        return lambda images: [maps.permute(0, 3, 1, 2) for maps in run(images)]

    def expected(self, source: Source, asked: Asked, device: torch.device) -> Model:
        return runs(_Maps(source.built.model), source, device)

    def _maps(self, source: Source) -> list[Tensor]:
        if not hasattr(source.built.model, "forward_intermediates"):
            raise UserError(f"{source.spec.name} gives no feature maps in timm", "--to timm")
        with torch.no_grad():
            maps: list[Tensor] = _Maps(source.built.model)(
                torch.zeros(1, len(source.spec.mean), *source.spec.input_size)
            )
        return maps


class _Maps(nn.Module):
    """A model's own feature maps: the raw outputs of its blocks, or of its stages, ``[B, D, H, W]`` each."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model.forward_intermediates(images, intermediates_only=True)
