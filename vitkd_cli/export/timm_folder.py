"""A model in timm's own hub format, loadable with nothing of ours installed; whole, or its backbone."""

from __future__ import annotations

import copy
import json
import math
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import tomli_w
import torch
from huggingface_hub import EvalResult, ModelCardData
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from vitkd_cli import __version__
from vitkd_cli.data.listing import carried
from vitkd_cli.errors import UserError
from vitkd_cli.export.target import Outputs, Target
from vitkd_cli.files import MANIFEST, whole_file, whole_folder, write_json, write_manifest, write_text
from vitkd_cli.recipe import Recipe, public
from vitkd_cli.text import code, last_name, markdown, plain, without_places
from vitkd_cli.vit.model import Model

VERIFIED = ("config.json", "model.safetensors")  # a model card may be written further
FILES = (*VERIFIED, "README.md", MANIFEST)
_VITKD = """@article{yang2022vitkd,
  title = {ViTKD: Practical Guidelines for ViT feature knowledge distillation},
  author = {Yang, Zhendong and Li, Zhe and Zeng, Ailing and Li, Zexian and Yuan, Chun and Li, Yu},
  journal = {arXiv preprint arXiv:2209.02432},
  year = {2022},
}"""


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
        about: where it comes from; the card says what there is of it, and nothing of where it lay.
        hub: the repository that it goes to.
    """
    about = {**_public(about), "vitkd_version": __version__, "preprocessing": model.preprocessing}
    net = model.net.cpu()
    if next(net.parameters()).dtype is torch.float64:  # a test's business; what leaves is what others load
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


def card(config: dict[str, Any], about: dict[str, Any], hub: str | None = None) -> str:
    """A model card, as the Hub expects it.

    Args:
        config: ``config.json``'s content.
        about: what is known of the model, without places.
        hub: the repository that it goes to.
    """
    recipe, metrics = about.get("recipe"), _numbers(about)
    rows = [("licence", markdown(about.get("licence") or "not known"))]
    if recipe:
        teacher, origin = "none", code(about.get("origin"))
        if about.get("teacher"):
            further = f", trained further on {markdown(of)}" if (of := about.get("teacher_data")) else ""
            licence = markdown(about.get("teacher_licence") or "not known")
            teacher = f"{code(about['teacher'])}{further} (licence: {licence})"
        rows += [
            ("trained on", markdown(about.get("data"))),
            ("began as", f"random weights, {origin}" if about.get("random") else origin),
            ("teacher", teacher),
            ("objective", code(about.get("objective"))),
        ]
    rows += [
        ("classes", str(config["num_classes"] or "none: its output is an embedding")),
        ("image size", "×".join(map(str, about["preprocessing"]["input_size"][1:]))),
    ]
    if recipe:
        numbers = ", ".join(f"{markdown(name)} {value:.2f}" for name, value in metrics.items())
        rows += [
            ("validation", numbers or "none"),
            ("weights", f"{markdown(about.get('weights'))}, selected: {markdown(about.get('selected'))}"),
        ]
    address = f"hf-hub:{hub}" if hub else "local-dir:PATH/TO/THIS/FOLDER"
    lines = [
        f"---\n{_metadata(config, about, metrics).to_yaml()}\n---",
        f"# {code(config['architecture'])}, {'trained' if recipe else 'exported'} with vitkd",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f'```python\nimport timm\n\nmodel = timm.create_model("{address}", pretrained=True).eval()\n```',
        "",
    ]
    if recipe:
        cited = [f"@software{{vitkd,\n  title = {{vitkd}},\n  version = {{{__version__}}},\n}}"]
        if re.search("mimic|generate|vitkd", str(about.get("objective"))):
            cited.append(_VITKD)
        lines += [
            f"<details><summary>Recipe</summary>\n\n```toml\n{recipe.strip()}\n```\n\n</details>",
            "",
            "## Citation",
            "",
            "```bibtex",
            *cited,
            "```",
            "",
        ]
    return "\n".join(lines)


def _numbers(about: dict[str, Any]) -> dict[str, float]:
    """The run's figures on its validation split."""
    known = about.get("metrics") or {}
    return {name: value for name, value in known.items() if isinstance(value, (int, float))}


def _metadata(config: dict[str, Any], about: dict[str, Any], metrics: dict[str, float]) -> ModelCardData:
    """What the Hub reads of a card."""
    licence, data = about.get("licence"), plain(about.get("data") or "")
    known = licence and re.fullmatch(r"[a-z0-9.-]+", licence)
    task = "image-classification" if config["num_classes"] else "image-feature-extraction"
    models = filter(None, map(_on_the_hub, (about.get("origin"), about.get("teacher"))))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data.removeprefix("hfds/"),
            dataset_name=data,
            dataset_split="validation",
            metric_type="loss" if name == "loss" else "accuracy",
            metric_name=name if name == "loss" else f"{name}, percent",
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        tags=[task, "timm", "vitkd"],
        license=licence if known else "other" if licence else None,
        license_name=plain(licence) if licence and not known else None,
        base_model=list(dict.fromkeys(models)) or None,
        datasets=[data.removeprefix("hfds/")] if data else None,
        model_name=config["architecture"],
        eval_results=results if data and results else None,
    )


def _on_the_hub(name: Any) -> str | None:
    """The repository of pretrained weights: ``NAME.TAG`` of timm, or ``hf-hub:…``."""
    if not isinstance(name, str):
        return None
    if name.startswith("hf-hub:"):
        return name.removeprefix("hf-hub:").partition("@")[0]
    config = get_pretrained_cfg(name, allow_unregistered=True) if "." in name else None
    hub_id: str | None = config.hf_hub_id if config else None
    return f"{hub_id}{name}" if hub_id == "timm/" else hub_id


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
