"""Decoupled knowledge distillation, DKD (Zhao et al. 2022, arXiv:2203.08679, section 3).

    L = α T² KL( (p_y, 1 − p_y) ‖ (q_y, 1 − q_y) )  +  β T² KL( p̂ ‖ q̂ )

p and q are the softmax of the teacher's and the student's logits at temperature T, y the label; p̂ and
q̂ the same over the K − 1 classes other than y. Plain soft targets are α = 1, β = 1 − p_y. Mixed labels,
which the paper does not define, count as their largest class.
"""

from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, term
from vitkd_cli.terms.bases import LogitTerm
from vitkd_cli.terms.kd import kl_divergence, standardized
from vitkd_cli.terms.nkd import enough_classes, label_class, without_class
from vitkd_cli.vit.spec import ViTSpec


@term("dkd")
class DKD(LogitTerm):
    """DKD (Zhao et al. 2022, arXiv:2203.08679), in nats, sum over classes, mean over images.

    α = 1, β = 8, T = 4 are the paper's for small images; for vision transformers on ImageNet the
    ViTKD authors' code takes β = 0.5, T = 1. The paper lets the weight grow over the first 20 epochs.
    """

    uses_labels = True

    alpha: Annotated[
        float, Option("α: weight of the label against all other classes together.", minimum=0)
    ] = 1.0
    beta: Annotated[float, Option("β: weight of the classes other than the label's.", minimum=0)] = 8.0
    temperature = 4.0
    standardize: Annotated[bool, "Give each image's logits mean 0 and deviation 1 first, as kd."] = False

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        self.warnings = enough_classes(student, self.word)

    def loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        assert batch.targets is not None
        if self.standardize:
            student, teacher = standardized(student), standardized(teacher)
        y = label_class(batch.targets)
        student, teacher = student / self.temperature, teacher / self.temperature
        log_q, log_p = against_the_rest(student, y), against_the_rest(teacher, y)
        target = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        rest = kl_divergence(without_class(student, y), without_class(teacher, y))
        return self.temperature**2 * (self.alpha * target + self.beta * rest)


def against_the_rest(logits: Tensor, y: Tensor) -> Tensor:
    """log (p_y, 1 − p_y), ``[B, 2]``, of logits ``[B, K]``."""
    # A softmax of the two would round 1 − p_y to float32's step at 1, far more than p_y among many classes.
    odds = logits.gather(1, y) - without_class(logits, y).logsumexp(dim=1, keepdim=True)
    return F.logsigmoid(torch.cat([odds, -odds], dim=1))
