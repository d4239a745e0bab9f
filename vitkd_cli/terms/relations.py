"""Relations among tokens inside attention: MiniLMv2 (Wang et al. 2020, arXiv:2012.15828), for vision
transformers MiniViT (Zhang et al. 2022, arXiv:2204.07154).

    L = CE( softmax(R_ij of the teacher), softmax(R_ij of the student) ),   mean over i and j in {Q, K, V}
    R_ij = X_i X_jᵀ / √(C / A)

X_Q, X_K and X_V are a block's queries, keys and values [N, C], all its heads side by side; both models
split theirs into A relation heads of C / A channels each, C being a model's own. So neither widths
nor numbers of attention heads need agree, and nothing is projected. CE is the cross-entropy.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from vitkd_cli.errors import UserError
from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, Term, exactly, term
from vitkd_cli.vit.pairing import Blocks, pair_blocks
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import Tap


@term("relations")
class Relations(Term):
    """Relations of queries, keys and values (Zhang et al. 2022, arXiv:2204.07154), in nats.

    Sum over the tokens that are looked at; mean over those that look, heads, the nine relations, images
    and blocks. A cross-entropy, as in their code: it is not zero where both agree. ``heads`` is A; theirs is
    1, language models take more than they have attention heads.

    MiniViT's weight is 1, without ``labels`` for Swin, where blocks 11, 9, 7, 5, 3 and 1 of 12 learn from 23,
    21, 15, 9, 3 and 1 of 24: ``relations(blocks="11:23, 9:21, 7:15, 5:9, 3:3, 1:1")``. Beside it stand soft
    targets, and 0.1 of a distance between relations of block outputs, which is no term here. For Swin,
    timm's fused attention is switched on, which changes its logits by rounding alone.

    ``what="attention"`` is KL between attention maps, teacher ‖ student (Wang et al. 2020,
    arXiv:2002.10957; for vision transformers Wang et al. 2022, arXiv:2210.00944, who take the class
    token's rows only), averaged over heads first where their numbers differ; ``heads`` then has no
    meaning. Prefix tokens take part where both models have equally many, else they are left out on both
    sides.
    """

    blocks: Blocks = (-1,)
    what: Annotated[
        Literal["qkv", "attention"], "Relations of queries, keys and values, or attention maps."
    ] = "qkv"
    heads: Annotated[
        int, Option("A: relation heads that queries, keys and values are split into.", minimum=1)
    ] = 1

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        self.compares = []
        self.dropped: list[tuple[int, int]] = []  # prefix tokens of student and teacher to leave out
        for i, j in pair_blocks(self.blocks, student, teacher, self.word):
            ours, theirs = student.blocks[i], teacher.blocks[j]
            if ours.grid != theirs.grid:
                side = teacher.input_size[0] * ours.grid[0] // theirs.grid[0]
                raise UserError(
                    f"relations: block {i} of {student.name} has {ours.grid[0]}×{ours.grid[1]} tokens, block "
                    f"{j} of {teacher.name} {theirs.grid[0]}×{theirs.grid[1]}",
                    f"--teacher-img-size {side} gives them one grid; or a feature term: mimic, spectral",
                )
            prefixes = ours.num_prefix_tokens, theirs.num_prefix_tokens
            self.compares.append((Tap(self.what, i), Tap(self.what, j)))
            self.dropped.append((0, 0) if prefixes[0] == prefixes[1] else prefixes)

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        losses = []
        for (student, teacher), (ours, theirs) in zip(pairs, self.dropped, strict=True):
            assert teacher is not None
            if self.what == "qkv":
                q, p = self.relations(student, ours), self.relations(teacher, theirs)  # [3, 3, B, A, N, N]
            else:
                q, p = patch_rows(student, ours), patch_rows(teacher, theirs)  # [B, heads, N, N]
                if q.shape[1] != p.shape[1]:
                    q, p = q.mean(1), p.mean(1)
            if q.shape != p.shape:
                raise UserError(
                    "relations: student and teacher attend within windows of other sizes, or to fewer keys",
                    "compare features instead: mimic or spectral",
                )
            if self.what == "qkv":
                losses.append(-(p.softmax(-1) * q.log_softmax(-1)).sum(-1).mean())
            else:
                losses.append((p * (p.log() - q.log())).sum(-1).mean())
        return torch.stack(losses).mean()

    def relations(self, qkv: Tensor, dropped: int) -> Tensor:
        """R of queries, keys and values ``[3, B, heads, N, d]``, by i and j: ``[3, 3, B, A, N, N]``."""
        qkv = qkv[..., dropped:, :].transpose(2, 3).flatten(3)  # [3, B, N, C]
        width = qkv.shape[-1]
        if width % self.heads:
            raise UserError(
                f"relations: {self.heads} heads do not divide a width of {width}",
                "heads=1 fits every width",
            )
        split = qkv.unflatten(3, (self.heads, -1)).transpose(2, 3)  # [3, B, A, N, C / A]
        with exactly(split):
            return split[:, None] @ split[None].transpose(-1, -2) / split.shape[-1] ** 0.5


def patch_rows(maps: Tensor, dropped: int) -> Tensor:
    """Attention maps ``[B, heads, N, N]`` without their first tokens, rows positive with sum 1.

    What underflowed, and what CaiT mixes below zero after its softmax, is raised to the least number
    that has a logarithm; no gradient comes from there.
    """
    maps = maps[..., dropped:, dropped:].clamp_min(torch.finfo(torch.float32).tiny)
    return maps / maps.sum(-1, keepdim=True)
