"""Decoupled knowledge distillation, DKD (Zhao et al. 2022, arXiv:2203.08679, section 3).

    L = α T² KL( (p_y, 1 − p_y) ‖ (q_y, 1 − q_y) )  +  β T² KL( p̂ ‖ q̂ )

p and q are the softmax of the teacher's and the student's logits at temperature T, y the label; p̂ and
q̂ the same over the K − 1 classes other than y. Plain soft targets are α = 1, β = 1 − p_y. Mixed labels,
which the paper does not define, count as their largest class.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.terms.kd import divergence, standardized
from vitkd_cli.terms.nkd import enough_classes, label_of, others
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import LOGITS


@term("dkd")
class DKD(Term):
    """DKD (Zhao et al. 2022, arXiv:2203.08679), in nats, sum over classes, mean over images.

    α = 1, β = 8, T = 4 are the paper's for small images; for vision transformers on ImageNet the
    ViTKD authors' code takes β = 0.5, T = 1. The paper lets the weight grow over the first 20 epochs.

    Raises:
        UserError: for two classes, or if ``alpha`` or ``beta`` is negative or ``temperature`` not positive.
    """

    uses_labels = True
    reads_teacher_logits = True

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        alpha: Annotated[float, "α: weight of the label against all other classes together."] = 1.0,
        beta: Annotated[float, "β: weight of the classes other than the label's."] = 8.0,
        temperature: Annotated[float, "T: both sets of logits are divided by it."] = 4.0,
        standardize: Annotated[bool, "Give each image's logits mean 0 and deviation 1 first, as kd."] = False,
    ) -> None:
        super().__init__()
        for option, value in (("alpha", alpha), ("beta", beta)):
            if value < 0:
                raise UserError(f"dkd: {option} is {value:g}, negative", "alpha=1, beta=8 in the paper")
        if not temperature > 0:
            raise UserError(f"dkd: temperature is {temperature:g}, not positive", "1 and 4 are usual")
        self.warnings = enough_classes(student, "dkd")
        self.alpha, self.beta = alpha, beta
        self.temperature = temperature
        self.standardize = standardize
        self.compares = [(LOGITS, LOGITS)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, K] each
        assert teacher is not None and batch.targets is not None
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        y = label_of(batch.targets)
        student, teacher = student / self.temperature, teacher / self.temperature
        log_q, log_p = against_the_rest(student, y), against_the_rest(teacher, y)
        target = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        rest = divergence(others(student, y), others(teacher, y))
        return self.temperature**2 * (self.alpha * target + self.beta * rest)


def against_the_rest(logits: Tensor, y: Tensor) -> Tensor:
    """log (p_y, 1 − p_y), ``[B, 2]``, of logits ``[B, K]``."""
    # A softmax of the two would round 1 − p_y to float32's step at 1, far more than p_y among many classes.
    odds = logits.gather(1, y) - others(logits, y).logsumexp(dim=1, keepdim=True)
    return F.logsigmoid(torch.cat([odds, -odds], dim=1))
