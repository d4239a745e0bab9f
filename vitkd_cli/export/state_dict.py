"""A bare state dict under timm's key names, for those who have a model of their own to put it into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from timm.models._input import get_model_args
from torch import Tensor

from vitkd_cli.export.target import Outputs, Target, described, runs
from vitkd_cli.export.timm_folder import save_weights
from vitkd_cli.requests import ExportRequest
from vitkd_cli.vit.model import Model


class StateDict(Target):
    """Checked in a new model of timm's, which takes every key and lacks none."""

    ending = ".safetensors"
    options = ("prefix",)

    def write(
        self, model: Model, path: Path, request: ExportRequest, others: Tensor | None
    ) -> tuple[str, ...]:
        save_weights(model.net, path, described(model), request.prefix)
        return ()

    def load(self, path: Path, model: Model, request: ExportRequest, device: torch.device) -> Outputs:
        own: Any = model.net
        twin = timm.create_model(own.pretrained_cfg["architecture"], **get_model_args(own))
        state = {name.removeprefix(request.prefix): tensor for name, tensor in load_file(path).items()}
        twin.load_state_dict(state, strict=True)
        return runs(twin.eval(), model, device)
