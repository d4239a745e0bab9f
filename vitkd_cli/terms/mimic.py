"""Mimicking of shallow blocks: one half of ViTKD (Yang et al. 2022, arXiv:2209.02432, eq. 2).

    L = Σ_i Σ_n Σ_d ( T_i − fc_i(S_i) )²,   mean over images

S_i and T_i are the patch tokens [N, D] after block i of the student and of the teacher; fc_i is a
linear layer of the block's own, and absent where the widths are equal. A linear hint on a block's
output is FitNets' idea (Romero et al. 2014, arXiv:1412.6550).
"""

from __future__ import annotations

from itertools import starmap
from typing import Annotated, ClassVar

from torch import Tensor, nn
from torch.nn.functional import normalize as unit

from vitkd_cli.terms import (
    ALIGN_HELP,
    AT_HELP,
    NORM_HELP,
    REDUCE_HELP,
    TARGET_NORM_HELP,
    WHICH_HELP,
    At,
    Batch,
    Norm,
    Reduce,
    Site,
    TargetNorm,
    Term,
    Which,
    class_token,
    sites_of,
    summed,
    term,
)
from vitkd_cli.vit.pairing import BLOCKS_HELP, Blocks
from vitkd_cli.vit.spec import ViTSpec


@term("mimic")
class Mimic(Term):
    """Squared distance of aligned tokens (Yang et al. 2022, arXiv:2209.02432, eq. 2).

    Summed over blocks, tokens and channels, mean over images; the paper's weight for that is 3e-5.
    ``reduce="mean"`` also divides by blocks · N · D, so the paper's weight becomes 3e-5 · 2 · N · D:
    4.52 for two blocks of 196 tokens, 384 wide. ``tokens="class", normalize=true, reduce="mean"`` is
    patient distillation, PKD (Sun et al. 2019, arXiv:1908.09355): tokens of length 1 differ by little, so its
    weight is 10 to 1000, and 3e-5 would leave it without effect.

    Raises:
        UserError: if a model has no such block, or no class token there.
    """

    weight: ClassVar[float] = 3e-5

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        blocks: Annotated[Blocks, BLOCKS_HELP] = (0, 1),
        at: Annotated[At, AT_HELP] = "ffn",
        tokens: Annotated[Which, WHICH_HELP] = "patch",
        normalize: Annotated[
            bool, "Scale each token to length 1 first, the student's after its layer."
        ] = False,
        always_align: Annotated[bool, ALIGN_HELP] = False,
        norm: Annotated[Norm, NORM_HELP] = "auto",
        reduce: Annotated[Reduce, REDUCE_HELP] = "sum",
        target_norm: Annotated[TargetNorm, TARGET_NORM_HELP] = "none",
    ) -> None:
        super().__init__()
        self.sites = sites_of(student, teacher, blocks, "mimic", at=at, norm=norm, tokens=tokens)
        self.compares = [site.taps for site in self.sites]
        self.tokens = tokens
        self.normalize = normalize
        self.reduce = reduce
        self.target_norm = target_norm
        self.align = nn.ModuleList(site.align(always_align) for site in self.sites)

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        return summed(starmap(self.squares, zip(self.sites, self.align, pairs, strict=True)), self.reduce)

    def squares(self, site: Site, align: nn.Module, pair: tuple[Tensor, Tensor | None]) -> Tensor:
        """( T − fc(S) )² of a block, ``[B, N, D]``; one token where it is the class token."""
        student, teacher = pair  # [B, N, D_s], [B, N_t, D]; prefix tokens where tokens="class"
        assert teacher is not None
        if self.tokens == "class":
            student, teacher = class_token(student), class_token(teacher)
        ours, target = align(student), site.target(teacher, self.target_norm)  # [B, N, D] each
        if self.normalize:
            ours, target = unit(ours, dim=-1), unit(target, dim=-1)
        return (target - ours).square()
