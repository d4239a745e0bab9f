"""Small random models in timm's folder format, and a run of seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf

CLASSES = ["2", "10", "x"]  # timm's natural order; a lexical one would begin with "10"
FLAT: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": FLAT,
    "deit_tiny_distilled_patch16_224": FLAT,
    "beit_base_patch16_224": FLAT,
    "swin_tiny_patch4_window7_224": {
        "img_size": 32,
        "window_size": 4,
        "embed_dim": 12,
        "depths": (1, 1),
        "num_heads": (1, 2),
    },
    "hiera_tiny_224": {
        "img_size": 64,
        "embed_dim": 12,
        "stages": (1, 1),
        "num_heads": 1,
        "q_pool": 1,
        "mask_unit_size": (4, 4),
    },
}
VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder in timm's format with a random model of three named classes, or of none."""

    def save(name: str = VIT, num_classes: int = len(CLASSES), **changes: Any) -> Path:
        torch.manual_seed(1)
        model = timm.create_model(name, num_classes=num_classes, **{**SMALL[name], **changes})
        for parameter in model.parameters():  # what starts at zero would hide a mistake
            torch.nn.init.normal_(parameter, std=0.2)
        folder = tmp_path_factory.mktemp("models") / "model"
        config = {"label_names": CLASSES} if num_classes == len(CLASSES) else {}
        save_for_hf(model, str(folder), model_config=config, safe_serialization=True)
        return folder

    return save


@pytest.fixture(scope="session")
def model(saved: Callable[..., Path]) -> Path:
    """The folder of a small ViT; nobody writes into it."""
    return saved()


@pytest.fixture(scope="session")
def run(tiny: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the digits, with a teacher and with terms that have weights of their own."""
    from vitkd_cli import Recipe, distill
    from vitkd_cli.progress import Reporter

    folder = tmp_path_factory.mktemp("runs") / "run"
    recipe = Recipe(**tiny, loss="labels + vitkd", mean=(0.4, 0.4, 0.4), crop_pct=0.9, output=str(folder))
    distill(recipe, reporter=Reporter(silent=True))
    return folder
