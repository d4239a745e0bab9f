"""The form in which a model leaves: how it is written, and how what was written is run again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkd_cli.export.source import Model, Source, runs


@dataclass(frozen=True)
class Asked:
    """What a person asked of the form itself.

    Attributes:
        batch_size: images of the trace; any number may be fed later.
        opset: of ONNX; None for the exporter's own.
        half: weights in float16; inputs and outputs stay float32.
        int8: products with weights, and convolutions, in eight bits.
        preprocess: uint8 images ``[B, H, W, C]`` in, probabilities out.
        prefix: before every key of a state dict.
        push_to_hub: the repository that the folder goes to.
    """

    batch_size: int = 2
    opset: int | None = None
    half: bool = False
    int8: bool = False
    preprocess: bool = False
    prefix: str = ""
    push_to_hub: str | None = None


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
    def write(self, source: Source, path: Path, asked: Asked, others: Tensor | None) -> tuple[str, ...]:
        """Write the model to a new file or folder.

        Args:
            others: ``[M, C, H, W]`` uint8 images to calibrate with.

        Returns:
            What a person should know of it, a line each.
        """

    @abstractmethod
    def load(self, path: Path, source: Source, asked: Asked, device: torch.device) -> Model:
        """Read it back, as its users will."""

    def expected(self, source: Source, asked: Asked, device: torch.device) -> Model:
        """What the model itself gives, where the written one is to give the same."""
        return runs(source.built.model, source, device)


def any_batch() -> Any:
    """The free dimension of a trace; without a bound torch 2.6 gives up on its own largest integer."""
    return torch.export.Dim("batch", max=2**31 - 1)
