"""A bare state dict under timm's key names, for those who have a model of their own to put it into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models._input import get_model_args
from torch import Tensor

from vitkd_cli.export.source import Model, Source, runs
from vitkd_cli.export.target import Asked, Target
from vitkd_cli.export.timm_folder import save_weights


class StateDict(Target):
    """Checked in a new model of timm's, which takes every key and lacks none."""

    ending = ".safetensors"
    options = ("prefix",)

    def write(self, source: Source, path: Path, asked: Asked, others: Tensor | None) -> tuple[str, ...]:
        save_weights(source.built.model, path, source.described(), asked.prefix)
        return ()

    def load(self, path: Path, source: Source, asked: Asked, device: torch.device) -> Model:
        model: Any = source.built.model
        twin = timm.create_model(model.pretrained_cfg["architecture"], **get_model_args(model))
        state = {name.removeprefix(asked.prefix): tensor for name, tensor in load_file(path).items()}
        twin.load_state_dict(state, strict=True)
        return runs(twin.eval(), source, device)
