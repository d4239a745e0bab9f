"""The form in which a model leaves: how it is written, and how what was written is run again."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkd_cli import __version__
from vitkd_cli.requests import ExportRequest
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import in_unit_range

Outputs = Callable[[Tensor], list[Tensor]]  # uint8 images [B, C, H, W] -> outputs, [B, ...] each


class Target(ABC):
    """A form in which a model leaves.

    Attributes:
        ending: of the default output's name; it begins with a point for a file.
        options: that this form alone has.
        tolerance: of the check, as a share of the student's largest output. The same weights in the same
            modules give the same numbers; another order of the same float32 sums moves them by 1e-6 or so
            of that, in every family, and a hundred times as much is still no change that a person could see.
    """

    ending: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 0.0

    @abstractmethod
    def write(
        self, model: Model, path: Path, request: ExportRequest, others: Tensor | None
    ) -> tuple[str, ...]:
        """Write the model to a new file or folder.

        Args:
            others: ``[M, C, H, W]`` uint8 images to calibrate with.

        Returns:
            What a person should know of it, a line each.
        """

    @abstractmethod
    def load(self, path: Path, model: Model, request: ExportRequest, device: torch.device) -> Outputs:
        """Read it back, as its users will."""

    def expected(self, model: Model, request: ExportRequest, device: torch.device) -> Outputs:
        """What the model itself gives, where the written one is to give the same."""
        return runs(model.net, model, device)


def runs(net: nn.Module, model: Model, device: torch.device) -> Outputs:
    """A network of ``model``'s normalised images as a function of uint8 images."""
    net = net.to(device)

    def run(images: Tensor) -> list[Tensor]:
        out = net(model.normalised(in_unit_range(images, device)))
        return list(out) if isinstance(out, (list, tuple)) else [out]

    return run


def described(model: Model) -> dict[str, str]:
    """What a file without a configuration beside it has to say of its model, as JSON by key."""
    config, names = model.preprocessing, model.class_names
    facts = {
        "model": model.origin,
        "vitkd_version": __version__,
        "class_names": list(names) if names else None,
        **{key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        "input_size": list(config["input_size"]),
    }
    return {key: json.dumps(value) for key, value in facts.items()}


def any_batch() -> Any:
    """The free dimension of a trace; without a bound torch 2.6 gives up on its own largest integer."""
    return torch.export.Dim("batch", max=2**31 - 1)
