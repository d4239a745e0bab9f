"""A bare state dict under timm's key names, for those who have a model of their own to put it into."""

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import load_file
from timm.models._input import get_model_args
from torch import Tensor

from vitkd_cli.export.target import Outputs, Target
from vitkd_cli.export.timm_folder import save_weights


class StateDictFile(Target):
    """Checked in a new model of timm's, which takes every key and lacks none."""

    ending = ".safetensors"
    options = ("prefix",)

    def write(self, path: Path, others: Tensor | None) -> tuple[str, ...]:
        save_weights(self.model.net, path, self.facts(), self.request.prefix)
        return ()

    def load(self, path: Path) -> Outputs:
        own: Any = self.model.net
        twin = timm.create_model(own.pretrained_cfg["architecture"], **get_model_args(own))
        state = {name.removeprefix(self.request.prefix): tensor for name, tensor in load_file(path).items()}
        twin.load_state_dict(state, strict=True)
        return self.runs(twin.eval())
