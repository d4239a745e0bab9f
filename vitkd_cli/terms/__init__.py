"""The terms of an objective, one file a method: a new file here is a new method.

A term never touches a model. It sizes itself by two :class:`ViTSpec`, names the pairs of taps it
compares, and is handed the tensors.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.vit.spec import ViTSpec, resample
from vitkd_cli.vit.taps import FINAL, Tap, features


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
        uses_labels, uses_teacher, reads_teacher_logits: what a formula with this term needs, known
            before any model is.
        warnings: what a user should know of these options with these models; usually nothing.
    """

    uses_labels: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = True
    reads_teacher_logits: ClassVar[bool] = False
    compares: list[tuple[Tap, Tap | None]]
    warnings: tuple[str, ...] = ()

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


class Option(NamedTuple):
    """One option of a term or a macro, as its signature declares it."""

    name: str
    type: Any
    default: Any
    help: str


def options_of(method: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only parameters of a term's constructor or of a macro, in their order.

    Each is declared ``name: Annotated[type, "help"] = default``.
    """
    function: Any = vars(method)["__init__"] if isinstance(method, type) else method
    hints = get_type_hints(function, include_extras=True)
    return {
        parameter.name: Option(
            parameter.name,
            hints[parameter.name].__origin__,
            parameter.default,
            hints[parameter.name].__metadata__[0],
        )
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }


# The choices that every feature term offers, declared once.
Norm = Literal["auto", "raw", "final"]
Reduce = Literal["sum", "mean"]
TargetNorm = Literal["none", "layer"]
NORM_HELP = "Read the last block after the final norm (auto), never (raw), or nothing else (final)."
REDUCE_HELP = "Sum over tokens and channels, mean over images (sum); or a plain mean (mean)."
TARGET_NORM_HELP = "Leave the teacher's tokens as they are (none) or standardise each one (layer)."


class Tokens(NamedTuple):
    """Where a feature term reads one model: patch tokens ``[B, rows * columns, dim]``."""

    tap: Tap
    dim: int
    grid: tuple[int, int]


def tokens_of(vit: ViTSpec, block: int, norm: Norm, method: str) -> Tokens:
    """The patch tokens of a block, counted from 0 or, if negative, from this model's end.

    Raises:
        UserError: if there is no such block, or ``norm="final"`` is asked of one but the last.
    """
    if not -vit.depth <= block < vit.depth:
        raise UserError(
            f"{method}: {vit.name} has no block {block}, its depth is {vit.depth}",
            f"blocks are 0 to {vit.depth - 1}, or -1 to {-vit.depth} from the end",
        )
    block %= vit.depth
    is_last = block == vit.depth - 1
    if norm == "final" and not is_last:
        raise UserError(
            f'{method}: norm="final" is defined for the last block only, and block {block} of {vit.name} '
            f"is not its last ({vit.depth - 1})",
            'norm="auto" reads the last block after the final norm and every other block raw',
        )
    if is_last and norm != "raw":
        return Tokens(FINAL, vit.final_dim, vit.final_grid)
    return Tokens(features(block), vit.blocks[block].dim, vit.blocks[block].grid)


def target_tokens(teacher: Tensor, grid: tuple[int, int], to: tuple[int, int], norm: TargetNorm) -> Tensor:
    """The teacher's tokens ``[B, N_t, D]`` on the student's grid, ``[B, N, D]``, standardised if asked."""
    teacher = resample(teacher, grid, to)
    if norm == "layer":
        # 1e-6 is what the norms of timm's vision transformers use
        return nn.functional.layer_norm(teacher, teacher.shape[-1:], eps=1e-6)
    return teacher
