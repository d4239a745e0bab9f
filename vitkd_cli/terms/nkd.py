"""Normalised knowledge distillation, NKD (Yang et al. 2023, arXiv:2303.13005, section 3).

    L = − p_y log q_y  −  γ T² Σ_{k≠y} p̂_k log q̂_k

p and q are the softmax of the teacher's and the student's logits; p̂ and q̂ the same over the K − 1
classes other than y, at temperature T. The first part has no temperature. Mixed labels count as
their largest class, as in the authors' code.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import LOGITS


@term("nkd")
class NKD(Term):
    """NKD (Yang et al. 2023, arXiv:2303.13005), in nats, sum over classes, mean over images.

    γ = T = 1 is what the paper takes for vision transformers (1.5 for convolutional networks).
    Both parts are cross-entropies, so the value is not zero where student and teacher agree.

    Raises:
        UserError: for two classes, or if ``gamma`` is negative or ``temperature`` not positive.
    """

    uses_labels = True

    reads_teacher_logits = True

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        gamma: Annotated[float, "γ: weight of the classes other than the label's."] = 1.0,
        temperature: Annotated[float, "T: divides the logits of those other classes."] = 1.0,
    ) -> None:
        super().__init__()
        if gamma < 0:
            raise UserError(f"nkd: gamma is {gamma:g}, negative", "1 for vision transformers")
        if not temperature > 0:
            raise UserError(f"nkd: temperature is {temperature:g}, not positive", "1 is usual")
        self.warnings = enough_classes(student, "nkd")
        self.gamma = gamma
        self.temperature = temperature
        self.compares = [(LOGITS, LOGITS)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, K] each
        assert teacher is not None and batch.targets is not None
        y = label_of(batch.targets)  # [B, 1]

        p_y = teacher.softmax(dim=1).gather(1, y)
        log_q_y = student.log_softmax(dim=1).gather(1, y)

        p = (others(teacher, y) / self.temperature).softmax(dim=1)
        log_q = (others(student, y) / self.temperature).log_softmax(dim=1)

        target = -(p_y * log_q_y).mean()
        rest = -(p * log_q).sum(dim=1).mean()
        return target + self.gamma * self.temperature**2 * rest


def label_of(targets: Tensor) -> Tensor:
    """The class of ``[B]`` labels, or the largest one of ``[B, K]`` mixed labels, as ``[B, 1]``."""
    return (targets if targets.ndim == 1 else targets.argmax(dim=1))[:, None]


def others(logits: Tensor, y: Tensor) -> Tensor:
    """The logits ``[B, K]`` of all classes but ``y`` ``[B, 1]``, as ``[B, K - 1]``."""
    # The label's logit is left out rather than set to −∞, which would make 0 · ∞ of it.
    index = torch.arange(logits.shape[1] - 1, device=y.device)
    return logits.gather(1, index + (index >= y))


def enough_classes(student: ViTSpec, method: str) -> tuple[str, ...]:
    """The warnings of a method that compares the classes other than the label's.

    Raises:
        UserError: for two classes, where there is only one other.
    """
    classes = student.num_classes
    if 0 < classes <= 2:
        raise UserError(
            f"{method}: {student.name} has {classes} classes, which leave {method} nothing to compare "
            "beside the label",
            'use kd: --loss "labels + vitkd + kd"',
        )
    if 0 < classes < 20:
        few = f"{method} with {classes} classes: little is left to compare beside the label"
        return (f"{few}; kd may serve better",)
    return ()
