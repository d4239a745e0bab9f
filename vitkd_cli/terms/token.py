"""Distillation through a token of its own (Touvron et al. 2021, arXiv:2012.12877, section 4).

    hard:  L = CE( argmax t, softmax(d) )
    soft:  L = T² KL( softmax(t / T) ‖ softmax(d / T) )

d are the logits of the student's distillation head, which reads the distillation token; t the teacher's.
"""

from typing import Annotated, Any, Literal

from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, term
from vitkd_cli.terms.bases import LogitTerm
from vitkd_cli.terms.kd import kl_divergence
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import DISTILL_LOGITS, LOGITS


@term("token")
class Token(LogitTerm):
    """DeiT's distillation head (Touvron et al. 2021, arXiv:2012.12877), in nats, mean over images.

    The paper's loss is ``0.5*labels + 0.5*token``. Beside this term every other one reads the class head
    alone; the finished student averages both heads. The soft loss is a sum over classes, as that of
    ``kd``; DeiT's code divides by the number of classes K too, so that its weight w is w / K here.
    """

    compares = ((DISTILL_LOGITS, LOGITS),)

    kind: Annotated[Literal["hard", "soft"], "The teacher's best class, or all its classes."] = "hard"
    temperature: Annotated[float, Option("T: soft only; both sets of logits are divided by it.", above=0)] = (
        1.0
    )

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        if not student.distilled:
            raise UserError(
                f"token: {student.name} has no distillation head",
                "a student with one, such as --student deit_tiny_distilled; or kd in place of token",
            )
        if self.kind == "hard" and self.temperature != 1:
            raise UserError("token: hard targets have no temperature", 'token(kind="soft", temperature=…)')

    def loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        return self.temperature**2 * kl_divergence(student / self.temperature, teacher / self.temperature)
