"""Orthogonal projection onto a normalised teacher: VkD (Miles et al. 2024, arXiv:2403.06213).

    L = 1/D Σ_d smoothL1( (P s̄)_d − LayerNorm(t̄)_d ),   PᵀP = 1,   mean over images

s̄ [D_s] and t̄ [D] are the means of the student's and of the teacher's patch tokens after the last
block; P [D, D_s] is learned among the matrices with orthonormal columns, so that it keeps every angle
and distance of the student's features; LayerNorm has no weights; smoothL1(x) is x²/2 below 1 and
|x| − 1/2 above.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import orthogonal

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch, term
from vitkd_cli.terms.bases import FeatureTerm
from vitkd_cli.vit.spec import ViTSpec


@term("vkd")
class VkD(FeatureTerm):
    """Orthogonal projection onto a normalised teacher (Miles et al. 2024, arXiv:2403.06213).

    Smooth L1 with its bend at 1, mean over channels and images; the paper's weight for that is 1, beside
    ``labels`` and ``kd`` at temperature 1, each with weight 1. Its students learn ``kd`` on a distillation
    token. Each model's own last block is read, whatever its grid: the tokens are averaged.
    """

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        [(ours, theirs)] = self.sites
        if ours.dim > theirs.dim:
            raise UserError(
                f"vkd: {student.name} is {ours.dim} wide and {teacher.name} {theirs.dim}: no projection "
                "onto fewer dimensions keeps the student's angles",
                "a teacher at least as wide, or a term without that limit: mimic, features or spectral",
            )
        # Householder reflections, PyTorch's default, turn to zero under weight decay; the matrix exponential
        # is right too, and takes 25 times as long.
        self.project = orthogonal(nn.Linear(ours.dim, theirs.dim, bias=False), orthogonal_map="cayley")

    def block_pairs(self, student: ViTSpec, teacher: ViTSpec) -> list[tuple[int, int]]:
        return [(student.depth - 1, teacher.depth - 1)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, N, D_s], [B, N_t, D]
        assert teacher is not None
        student, teacher = student.mean(1), teacher.mean(1)
        return F.smooth_l1_loss(self.project(student), F.layer_norm(teacher, teacher.shape[1:]))
