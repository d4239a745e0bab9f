"""Correlation of the patch tokens with each other (Yang et al. 2022, arXiv:2209.02432, eq. 3-4).

    L = Σ_i Σ_n Σ_m ( M(T_i) − M(S_i) )²_nm,   mean over images
    M(F) = F Fᵀ / √D

S_i and T_i are the patch tokens [N, D] after block i of the student and of the teacher, each with its
own width D, so that no layer need align them; M is [N, N].
"""

from __future__ import annotations

from itertools import starmap
from typing import Annotated

from torch import Tensor

from vitkd_cli.terms import (
    AT_HELP,
    NORM_HELP,
    TARGET_NORM_HELP,
    At,
    Batch,
    Norm,
    Reduce,
    Site,
    TargetNorm,
    Term,
    sites_of,
    summed,
    term,
)
from vitkd_cli.vit.pairing import BLOCKS_HELP, Blocks
from vitkd_cli.vit.spec import ViTSpec


@term("correlation")
class Correlation(Term):
    """Squared distance of the tokens' correlations (Yang et al. 2022, arXiv:2209.02432, eq. 3-4).

    Summed over blocks and pairs of tokens, mean over images; the paper names no weight for it.
    ``reduce="mean"`` also divides by blocks · N². A teacher with another grid is resampled to the
    student's first. Memory grows with N²: 9.8 million numbers an image and block for 56 × 56 tokens.

    Raises:
        UserError: if a model has no such block.
    """

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        blocks: Annotated[Blocks, BLOCKS_HELP] = (0, 1),
        at: Annotated[At, AT_HELP] = "ffn",
        norm: Annotated[Norm, NORM_HELP] = "auto",
        reduce: Annotated[
            Reduce, "Sum over pairs of tokens, mean over images (sum); or a plain mean (mean)."
        ] = "sum",
        target_norm: Annotated[TargetNorm, TARGET_NORM_HELP] = "none",
    ) -> None:
        super().__init__()
        self.sites = sites_of(student, teacher, blocks, "correlation", at=at, norm=norm)
        self.compares = [site.taps for site in self.sites]
        self.reduce = reduce
        self.target_norm = target_norm

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        return summed(starmap(self.squares, zip(self.sites, pairs, strict=True)), self.reduce)

    def squares(self, site: Site, pair: tuple[Tensor, Tensor | None]) -> Tensor:
        """( M(T) − M(S) )² of a block, ``[B, N, N]``."""
        student, teacher = pair  # [B, N, D_s], [B, N_t, D_t]
        assert teacher is not None
        return (correlations(site.target(teacher, self.target_norm)) - correlations(student)).square()


def correlations(tokens: Tensor) -> Tensor:
    """F Fᵀ / √D: ``[B, N, D] -> [B, N, N]``."""
    return tokens @ tokens.mT / tokens.shape[-1] ** 0.5
