"""Distillation through a token of its own (Touvron et al. 2021, arXiv:2012.12877, section 4).

    hard:  L = CE( argmax t, softmax(d) )
    soft:  L = T² KL( softmax(t / T) ‖ softmax(d / T) )

d are the logits of the student's distillation head, which reads the distillation token; t the teacher's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.terms.kd import divergence
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import DISTILL_LOGITS, LOGITS


@term("token")
class Token(Term):
    """DeiT's distillation head (Touvron et al. 2021, arXiv:2012.12877), in nats, mean over images.

    The paper's loss is ``0.5*labels + 0.5*token``. Beside this term every other one reads the class head
    alone; the finished student averages both heads. The soft loss is a sum over classes, as that of
    ``kd``; DeiT's code divides by the number of classes K too, so that its weight w is w / K here.

    Raises:
        UserError: if the student has no distillation head, ``temperature`` is not positive, or is given
            to hard targets, which have none.
    """

    reads_teacher_logits = True

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        kind: Annotated[Literal["hard", "soft"], "The teacher's best class, or all its classes."] = "hard",
        temperature: Annotated[float, "T: soft only; both sets of logits are divided by it."] = 1.0,
    ) -> None:
        super().__init__()
        if not student.distilled:
            raise UserError(
                f"token: {student.name} has no distillation head",
                "a student with one, such as --student deit_tiny_distilled; or kd in place of token",
            )
        if not temperature > 0:
            raise UserError(f"token: temperature is {temperature:g}, not positive", "1 and 3 are usual")
        if kind == "hard" and temperature != 1:
            raise UserError("token: hard targets have no temperature", 'token(kind="soft", temperature=…)')
        self.kind = kind
        self.temperature = temperature
        self.compares = [(DISTILL_LOGITS, LOGITS)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, K] each
        assert teacher is not None
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        return self.temperature**2 * divergence(student / self.temperature, teacher / self.temperature)
