"""Correlation of the patch tokens with each other (Yang et al. 2022, arXiv:2209.02432, eq. 3-4).

    L = Σ_i Σ_n Σ_m ( M(T_i) − M(S_i) )²_nm,   mean over images
    M(F) = F Fᵀ / √D

S_i and T_i are the patch tokens [N, D] after block i of the student and of the teacher, each with its
own width D, so that no layer need align them; M is [N, N].
"""

from typing import Annotated, Literal

from torch import Tensor

from vitkd_cli.terms import exactly, term
from vitkd_cli.terms.bases import FeatureTerm


@term("correlation")
class Correlation(FeatureTerm):
    """Squared distance of the tokens' correlations (Yang et al. 2022, arXiv:2209.02432, eq. 3-4).

    Summed over blocks and pairs of tokens, mean over images; the paper names no weight for it.
    ``reduce="mean"`` also divides by blocks · N². A teacher with another grid is resampled to the
    student's first. Memory grows with N²: 9.8 million numbers an image and block for 56 × 56 tokens.
    """

    blocks = (0, 1)
    at = "ffn"
    norm = "auto"
    reduce: Annotated[
        Literal["sum", "mean"], "Sum over pairs of tokens, mean over images (sum); or a plain mean (mean)."
    ] = "sum"
    target_norm = "none"

    def squares(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """( M(T) − M(S) )² of a pair of blocks, ``[B, N, N]``."""
        target = self.sites[index].target(teacher, self.target_norm)  # [B, N, D_t]
        return (correlations(target) - correlations(student)).square()


def correlations(tokens: Tensor) -> Tensor:
    """F Fᵀ / √D: ``[B, N, D] -> [B, N, N]``."""
    with exactly(tokens):
        return tokens @ tokens.mT / tokens.shape[-1] ** 0.5
