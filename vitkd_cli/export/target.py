"""The form in which a model leaves: how it is written, and how what was written is run again."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkd_cli import __version__
from vitkd_cli.requests import ExportRequest
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import in_unit_range

Outputs = Callable[[Tensor], list[Tensor]]  # uint8 images [B, C, H, W] -> outputs, [B, ...] each


@dataclass(frozen=True)
class Target(ABC):
    """A model and the form in which it leaves.

    Attributes:
        device: of the check.
        ending: of the default output's name; it begins with a point for a file.
        options: settings of the request that only forms which list them take.
        packages: which it needs; the extra of the form's name brings them.
        tolerance: of the check, as a share of the model's largest output. The same weights in the same
            modules give the same numbers; another order of the same float32 sums moves them by 1e-6 or so
            of that, in every family, and a hundred times as much is still no change that a person could see.
    """

    model: Model
    request: ExportRequest
    device: torch.device

    ending: ClassVar[str]
    options: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    tolerance: ClassVar[float] = 0.0

    @abstractmethod
    def write(self, path: Path, others: Tensor | None) -> tuple[str, ...]:
        """Write the model to a new file or folder.

        Args:
            path: a temporary place beside the result; some writers append an ending unless they are handed
                an open file.
            others: ``[M, C, H, W]`` uint8 images to calibrate with, where the request asks for it.

        Returns:
            Notes for the user, one per line.
        """

    @abstractmethod
    def load(self, path: Path) -> Outputs:
        """Read it back as its users will; as a function of uint8 images."""

    def expected(self) -> Outputs:
        """What the written form has to give."""
        return self.runs(self.model.net)

    @property
    def classifies(self) -> bool:
        """Its first output is of classes."""
        return self.model.gives == "logits"

    @property
    def allowed(self) -> float | None:
        """The tolerance of this request; None asks for finite numbers only."""
        return self.tolerance

    def runs(self, net: nn.Module) -> Outputs:
        """A network that takes the model's normalised images as a function of uint8 images."""
        net = net.to(self.device)

        def run(images: Tensor) -> list[Tensor]:
            out = net(self.model.normalised(in_unit_range(images, self.device)))
            return list(out) if isinstance(out, (list, tuple)) else [out]

        return run

    def facts(self) -> dict[str, str]:
        """What a file without a configuration beside it says of its model, as JSON by key."""
        config, names = self.model.preprocessing, self.model.class_names
        facts = {
            "model": self.model.origin,
            "vitkd_version": __version__,
            "class_names": list(names) if names else None,
            **{key: config[key] for key in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
            "input_size": list(config["input_size"]),
        }
        return {key: json.dumps(value) for key, value in facts.items()}


def any_batch() -> Any:
    """The free dimension of a trace; without a bound torch 2.6 gives up on its own largest integer."""
    return torch.export.Dim("batch", max=2**31 - 1)
