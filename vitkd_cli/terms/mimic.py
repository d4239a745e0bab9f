"""Mimicking of shallow blocks: one half of ViTKD (Yang et al. 2022, arXiv:2209.02432, eq. 2).

    L = Σ_i Σ_n Σ_d ( T_i − fc_i(S_i) )²,   mean over images

S_i and T_i are the patch tokens [N, D] after block i of the student and of the teacher; fc_i is a
linear layer of the block's own, and absent where the widths are equal. A linear hint on a block's
output is FitNets' idea (Romero et al. 2014, arXiv:1412.6550).
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.terms import (
    NORM_HELP,
    REDUCE_HELP,
    TARGET_NORM_HELP,
    Batch,
    Norm,
    Reduce,
    TargetNorm,
    Term,
    target_tokens,
    term,
    tokens_of,
)
from vitkd_cli.vit.spec import ViTSpec


@term("mimic")
class Mimic(Term):
    """Squared distance of aligned tokens (Yang et al. 2022, arXiv:2209.02432, eq. 2).

    Summed over blocks, tokens and channels, mean over images; the paper's weight for that is 3e-5.
    ``reduce="mean"`` also divides by blocks · N · D, so the paper's weight becomes 3e-5 · 2 · N · D:
    4.52 for two blocks of 196 tokens, 384 wide.

    Raises:
        UserError: if a model has no such block.
    """

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        blocks: Annotated[tuple[int, ...], "Blocks to compare, each with the same one of the teacher."] = (
            0,
            1,
        ),
        norm: Annotated[Norm, NORM_HELP] = "auto",
        reduce: Annotated[Reduce, REDUCE_HELP] = "sum",
        target_norm: Annotated[TargetNorm, TARGET_NORM_HELP] = "none",
    ) -> None:
        super().__init__()
        if not blocks:
            raise UserError("mimic: blocks is empty", "blocks=(0, 1) are the first two")
        self.reduce = reduce
        self.target_norm = target_norm
        self.compares = []
        self.grids = []
        self.align = nn.ModuleList()
        for block in blocks:
            ours = tokens_of(student, block, norm, "mimic")
            theirs = tokens_of(teacher, block, norm, "mimic")
            self.compares.append((ours.tap, theirs.tap))
            self.grids.append((ours.grid, theirs.grid))
            same_width = ours.dim == theirs.dim
            self.align.append(nn.Identity() if same_width else nn.Linear(ours.dim, theirs.dim))

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        losses = []
        for (student, teacher), align, (ours, theirs) in zip(pairs, self.align, self.grids, strict=True):
            assert teacher is not None  # [B, N, D_s], [B, N_t, D]
            target = target_tokens(teacher, theirs, ours, self.target_norm)
            squares = (align(student) - target).square()  # [B, N, D]
            losses.append(squares.mean() if self.reduce == "mean" else squares.sum() / len(squares))
        distances = torch.stack(losses)  # [blocks]
        return distances.mean() if self.reduce == "mean" else distances.sum()
