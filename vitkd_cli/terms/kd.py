"""Soft targets (Hinton et al. 2015, arXiv:1503.02531, section 2).

    L = T² KL( softmax(t / T) ‖ softmax(s / T) )

s and t are the student's and the teacher's logits; T² keeps the gradient's size when T changes.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import LOGITS


@term("kd")
class KD(Term):
    """Soft targets (Hinton et al. 2015, arXiv:1503.02531), in nats, sum over classes, mean over images.

    ``soft_ce`` adds the teacher's entropy, T² H(softmax(t / T)): another value, the same gradient.
    Divided by the number of classes K it is a mean over classes too, which some codebases take.

    Raises:
        UserError: if ``temperature`` is not positive.
    """

    reads_teacher_logits = True

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        temperature: Annotated[float, "T: both sets of logits are divided by it."] = 1.0,
        soft_ce: Annotated[bool, "Cross-entropy in place of KL: the gradient is the same."] = False,
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise UserError(f"kd: temperature is {temperature:g}, not positive", "1 and 4 are usual")
        self.temperature = temperature
        self.soft_ce = soft_ce
        self.compares = [(LOGITS, LOGITS)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, K] each
        assert teacher is not None
        student, teacher = student / self.temperature, teacher / self.temperature
        if self.soft_ce:
            return self.temperature**2 * F.cross_entropy(student, teacher.softmax(dim=1))
        log_q, log_p = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
        return self.temperature**2 * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
