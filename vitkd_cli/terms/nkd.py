"""Normalised knowledge distillation, NKD (Yang et al. 2023, arXiv:2303.13005, section 3).

    L = − p_y log q_y  −  γ T² Σ_{k≠y} p̂_k log q̂_k

p and q are the softmax of the teacher's and the student's logits; p̂ and q̂ the same over the K − 1
classes other than y, at temperature T. The first part has no temperature. Mixed labels count as
their largest class, as in the authors' code.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from vitkd_cli.errors import UserError
from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, term
from vitkd_cli.terms.bases import LogitTerm
from vitkd_cli.vit.spec import ViTSpec


@term("nkd")
class NKD(LogitTerm):
    """NKD (Yang et al. 2023, arXiv:2303.13005), in nats, sum over classes, mean over images.

    γ = T = 1 is what the paper takes for vision transformers (1.5 for convolutional networks).
    Both parts are cross-entropies, so the value is not zero where student and teacher agree.
    """

    uses_labels = True

    gamma: Annotated[float, Option("γ: weight of the classes other than the label's.", minimum=0)] = 1.0
    temperature: Annotated[float, Option("T: divides the logits of those other classes.", above=0)] = 1.0

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        self.warnings = enough_classes(student, self.word)

    def loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        assert batch.targets is not None
        y = label_class(batch.targets)  # [B, 1]

        p_y = teacher.softmax(dim=1).gather(1, y)
        log_q_y = student.log_softmax(dim=1).gather(1, y)

        p = (without_class(teacher, y) / self.temperature).softmax(dim=1)
        log_q = (without_class(student, y) / self.temperature).log_softmax(dim=1)

        target = -(p_y * log_q_y).mean()
        rest = -(p * log_q).sum(dim=1).mean()
        return target + self.gamma * self.temperature**2 * rest


def label_class(targets: Tensor) -> Tensor:
    """The class of ``[B]`` labels, or the largest one of ``[B, K]`` mixed labels, as ``[B, 1]``."""
    return (targets if targets.ndim == 1 else targets.argmax(dim=1))[:, None]


def without_class(logits: Tensor, y: Tensor) -> Tensor:
    """The logits ``[B, K]`` of all classes but ``y`` ``[B, 1]``, as ``[B, K - 1]``."""
    # The label's logit is left out rather than set to −∞, which would make 0 · ∞ of it.
    index = torch.arange(logits.shape[1] - 1, device=y.device)
    return logits.gather(1, index + (index >= y))


def enough_classes(student: ViTSpec, method: str) -> tuple[str, ...]:
    """Refuse two classes, of which one is left beside the label; return a warning where there are few."""
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
