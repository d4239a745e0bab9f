"""The terms of an objective, one file a method: a new file here is a new method.

A term never touches a model. It sizes itself by two :class:`ViTSpec`, names the pairs of taps it
compares, and is handed the tensors.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import Tap


@dataclass(frozen=True)
class Batch:
    """What a term may know of the images beside their signals.

    Attributes:
        targets: ``[B]`` int64 classes, or ``[B, K]`` mixed labels that sum to 1, always
            unsmoothed; None where the images have no labels.
        update: optimizer updates done so far.
        rows: ``[B]`` this batch's rows of the global batch; None if it is the global batch.
        global_size: images of the global batch, over processes and accumulation.
        generator: the term's own source of randomness, on the CPU.
        mask: ``[B, N]``, 1 = masked, in place of a drawn one; for tests.
    """

    targets: Tensor | None = None
    update: int = 0
    rows: Tensor | None = None
    global_size: int = 0
    generator: torch.Generator | None = None
    mask: Tensor | None = None

    def rand(self, size: int, columns: int) -> Tensor:
        """Uniform noise ``[size, columns]`` on the CPU, for the ``size`` images at hand.

        It is drawn for the global batch and cut to our rows, so that the number of processes
        and of accumulation steps changes no mask.
        """
        if self.rows is None:
            return torch.rand(size, columns, generator=self.generator)
        return torch.rand(self.global_size, columns, generator=self.generator)[self.rows]


class Term(nn.Module):
    """One summand of the objective.

    Subclasses take ``(student, teacher, *, options with defaults)``, set ``compares`` and
    return one scalar from ``forward``. Options, their defaults and help are read off the
    constructor's signature; annotate them ``Annotated[type, "help"]``.

    Attributes:
        compares: pairs ``(student's tap, teacher's tap or None)``; a tap names its block from 0.
    """

    compares: list[tuple[Tap, Tap | None]]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        raise NotImplementedError


AnyTerm = TypeVar("AnyTerm", bound=type[Term])
_registry: dict[str, type[Term]] = {}


def term(name: str) -> Callable[[AnyTerm], AnyTerm]:
    """Register a term under the word that stands for it in a formula."""

    def register(cls: AnyTerm) -> AnyTerm:
        _registry[name] = cls
        return cls

    return register


def registered_terms() -> dict[str, type[Term]]:
    """Every term by name; each file of this package is imported once."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_registry.items()))
