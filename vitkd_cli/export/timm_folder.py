"""The student in timm's own hub format, loadable with nothing of ours installed."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from vitkd_cli import __version__
from vitkd_cli.recipe import Recipe


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
    """Write ``model.safetensors``, ``config.json`` and a model card; a reader sees all or nothing.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` and transformers'
    ``AutoModelForImageClassification.from_pretrained(FOLDER)`` read the folder.

    Args:
        preprocessing: timm's data configuration, as the student is to be evaluated.
        formula: the objective that it was trained with.
        weights: ``raw`` or ``average``.
        selected: ``last``, ``best`` (on the validation split) or ``ema``.
    """
    from timm.models._hub import save_config_for_hf

    about = {
        "vitkd_version": __version__,
        "objective": formula,
        "teacher": teacher,
        "metrics": metrics,
        "weights": weights,
        "selected": selected,
        "class_names": list(class_names) if class_names else None,
        "preprocessing": preprocessing,
        "recipe": recipe.to_toml(),
    }
    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    model = model.cpu()
    if next(model.parameters()).dtype is torch.float64:  # a test's business; what leaves is what others load
        model = copy.deepcopy(model).float()
    state = {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}
    metadata = {"format": "pt", "vitkd": json.dumps(about)}
    save_file(state, beside / "model.safetensors", metadata=metadata)
    labels: dict[str, Any] = {"label_names": list(class_names)} if class_names else {}
    if labels and len(labels["label_names"]) != getattr(model, "num_classes", None):
        labels = {}
    config = beside / "config.json"
    save_config_for_hf(
        model,
        str(config),
        model_config={**labels, "vitkd": {k: v for k, v in about.items() if k != "class_names"}},
        data_config=preprocessing,
    )
    content = json.loads(config.read_text())
    # transformers hands num_classes over itself and fails on a second one; timm does not need it here.
    content.get("model_args", {}).pop("num_classes", None)
    config.write_text(json.dumps(content, indent=2))
    own = content["pretrained_cfg"].pop("license", None) if recipe.pretrained else None
    licence = teacher_licence or own
    (beside / "README.md").write_text(_card(content, about, licence))
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(beside, folder)
    return folder


def _card(config: dict[str, Any], about: dict[str, Any], licence: str | None) -> str:
    """A model card, as the hub expects it."""
    size = "×".join(map(str, about["preprocessing"]["input_size"][1:]))
    numbers = ", ".join(
        f"{name} {value:.2f}" for name, value in about["metrics"].items() if value is not None
    )
    teacher = f"`{about['teacher']}`" if about["teacher"] else "none"
    front = [
        "---",
        "tags:",
        f"- image-{'classification' if config['num_classes'] else 'feature-extraction'}",
        "- timm",
        "library_name: timm",
    ]
    if licence:
        front.append(f"license: {licence}")
    return "\n".join(
        [
            *front,
            "---",
            f"# {config['architecture']}, trained with vitkd",
            "",
            "| | |",
            "|---|---|",
            f"| teacher | {teacher}{f' (licence: {licence})' if about['teacher'] and licence else ''} |",
            f"| objective | `{about['objective']}` |",
            f"| classes | {config['num_classes'] or 'none: its output is an embedding'} |",
            f"| image size | {size} |",
            f"| validation | {numbers or 'none'} |",
            f"| weights | {about['weights']}, selected: {about['selected']} |",
            "",
            "```python",
            "import timm",
            "",
            'model = timm.create_model("local-dir:PATH/TO/THIS/FOLDER", pretrained=True).eval()',
            "```",
            "",
            "<details><summary>Recipe</summary>",
            "",
            "```toml",
            about["recipe"].strip(),
            "```",
            "",
            "</details>",
            "",
        ]
    )
