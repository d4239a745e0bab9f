"""Correlation in place of divergence, DIST (Huang et al. 2022, arXiv:2205.10536).

    L = T² [ β (1 − mean_b ρ(q_b·, p_b·))  +  γ (1 − mean_k ρ(q_·k, p_·k)) ]

p and q are the softmax [B, K] of the teacher's and the student's logits at temperature T; ρ is Pearson's
correlation: of an image's classes in the first part (inter-class), of a class over the images of the
global batch in the second one (intra-class). 1e-8 is added to the product of norms in ρ.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.linalg import vector_norm

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch, Term, term
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import LOGITS


@term("dist")
class DIST(Term):
    """DIST (Huang et al. 2022, arXiv:2205.10536), without unit, 0 to 2 a part, mean over images and classes.

    β = γ = T = 1 are the authors' defaults; their runs weigh both parts by 2: ``labels + 2*dist``. The
    second part compares images with each other: those of all processes, but not those of several
    accumulation steps, so that many small steps see less than one large one. For a single image it is a
    constant 1.

    Raises:
        UserError: if ``beta`` or ``gamma`` is negative or ``temperature`` not positive.
    """

    reads_teacher_logits = True

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        beta: Annotated[float, "β: weight of the relations between an image's classes."] = 1.0,
        gamma: Annotated[float, "γ: weight of the relations between images, a class at a time."] = 1.0,
        temperature: Annotated[float, "T: both sets of logits are divided by it."] = 1.0,
    ) -> None:
        super().__init__()
        for option, value in (("beta", beta), ("gamma", gamma)):
            if value < 0:
                raise UserError(f"dist: {option} is {value:g}, negative", "1 is usual")
        if not temperature > 0:
            raise UserError(f"dist: temperature is {temperature:g}, not positive", "1 and 4 are usual")
        self.beta, self.gamma = beta, gamma
        self.temperature = temperature
        self.compares = [(LOGITS, LOGITS)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, K] each
        assert teacher is not None
        q, p = (student / self.temperature).softmax(dim=1), (teacher / self.temperature).softmax(dim=1)
        inter = 1 - correlation(q, p).mean()
        intra = 1 - correlation(batch.gather(q).T, batch.gather(p).T).mean()
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)


def correlation(ours: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's correlation of each row of ``[M, N]`` with the same row of the other, ``[M]``."""
    ours = ours - ours.mean(dim=1, keepdim=True)
    theirs = theirs - theirs.mean(dim=1, keepdim=True)
    return (ours * theirs).sum(dim=1) / (vector_norm(ours, dim=1) * vector_norm(theirs, dim=1) + 1e-8)
