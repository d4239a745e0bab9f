"""What terms share: a base for those that compare logits, and one for those that compare tokens of blocks.

The bases declare options. A term has those that it gives a default in its own body.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, Term
from vitkd_cli.vit.layout import resample
from vitkd_cli.vit.pairing import Blocks, block_index, pair_blocks
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import FINAL, FINAL_PREFIX, LOGITS, Tap, features

At = Annotated[
    Literal["ffn", "mha"],
    "Read a block's output (ffn), or the residual stream after its attention (mha).",
]
Norm = Annotated[
    Literal["auto", "raw", "final"],
    "Read the last block after the final norm (auto), never (raw), or nothing else (final).",
]
Reduce = Annotated[
    Literal["sum", "mean"], "Sum over tokens and channels, mean over images (sum); or a plain mean (mean)."
]
TargetNorm = Annotated[
    Literal["none", "layer"],
    "Leave the teacher's tokens as they are (none) or standardise each one (layer).",
]


class LogitTerm(Term):
    """A term that compares the student's logits with the teacher's."""

    reads_teacher_logits = True
    compares: Sequence[tuple[Tap, Tap | None]] = ((LOGITS, LOGITS),)

    temperature: Annotated[float, Option("T: both sets of logits are divided by it.", above=0)]

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs
        assert teacher is not None
        return self.loss(student, teacher, batch)

    def loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """The loss of logits ``[B, K]`` each."""
        raise NotImplementedError


class TokenTap(NamedTuple):
    """Where a feature term reads one model: tokens ``[B, rows * columns, dim]``; a class token is 1 × 1."""

    tap: Tap
    dim: int
    grid: tuple[int, int]


class Site(NamedTuple):
    """A pair of places that a feature term compares."""

    student: TokenTap
    teacher: TokenTap

    @property
    def taps(self) -> tuple[Tap, Tap]:
        return self.student.tap, self.teacher.tap

    def align(self, always: bool = False) -> nn.Module:
        """A linear layer between both widths; nothing where they are equal, unless asked."""
        ours, theirs = self.student.dim, self.teacher.dim
        return nn.Linear(ours, theirs) if always or ours != theirs else nn.Identity()

    def target(self, teacher: Tensor, norm: TargetNorm = "none") -> Tensor:
        """The teacher's tokens ``[B, N_t, D]`` on the student's grid ``[B, N, D]``, standardised if asked."""
        teacher = resample(teacher, self.teacher.grid, self.student.grid)
        # 1e-6 is what the norms of timm's vision transformers use
        return nn.functional.layer_norm(teacher, teacher.shape[-1:], eps=1e-6) if norm == "layer" else teacher


class FeatureTerm(Term):
    """A term that compares tokens of pairs of blocks: the sum, or the mean, of :meth:`squares` of each pair.

    Attributes:
        sites: where each pair of blocks is read.
    """

    at: At = "ffn"
    norm: Norm = "auto"
    blocks: Blocks
    always_align: Annotated[
        bool, "A linear layer where the widths are equal too, as the paper's text has it."
    ]
    reduce: Reduce
    target_norm: TargetNorm

    def __init__(self, student: ViTSpec, teacher: ViTSpec, **options: Any) -> None:
        super().__init__(student, teacher, **options)
        self.sites = [
            Site(self.read(student, ours), self.read(teacher, theirs))
            for ours, theirs in self.block_pairs(student, teacher)
        ]
        self.compares = [site.taps for site in self.sites]

    def block_pairs(self, student: ViTSpec, teacher: ViTSpec) -> list[tuple[int, int]]:
        """The blocks to compare, the student's and the teacher's."""
        return pair_blocks(self.blocks, student, teacher, self.word)

    def read(self, vit: ViTSpec, block: int) -> TokenTap:
        """Where to read a block of a model."""
        return tokens_of(vit, block, self.word, at=self.at, norm=self.norm)

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        losses = []
        for index, (student, teacher) in enumerate(pairs):
            assert teacher is not None
            squares = self.squares(index, student, teacher)  # [B, ...]
            losses.append(squares.mean() if self.reduce == "mean" else squares.sum() / len(squares))
        return torch.stack(losses).mean() if self.reduce == "mean" else torch.stack(losses).sum()

    def squares(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Squared differences ``[B, ...]`` of tokens ``[B, N, D_s]`` and ``[B, N_t, D]`` at a site."""
        raise NotImplementedError


def tokens_of(
    vit: ViTSpec,
    block: int,
    method: str,
    *,
    at: At = "ffn",
    norm: Norm = "auto",
    tokens: Literal["patch", "class"] = "patch",
) -> TokenTap:
    """The tokens of a block, counted from 0 or, if negative, from this model's end.

    One rule for every feature term: the last block is read after the final norm and every other one raw,
    unless ``norm`` says otherwise; an attention output is always raw.
    """
    block = block_index(block, vit, method)
    ends_here = vit.num_prefix_tokens if tokens == "class" else vit.final_grid != (0, 0)
    normed = bool(ends_here) and block == vit.depth - 1 and norm != "raw" and at == "ffn"
    if norm == "final" and not normed:
        raise UserError(
            f'{method}: norm="final" is defined for the last block\'s output only, and block {block} of '
            f"{vit.name} is not its last ({vit.depth - 1})",
            'norm="auto" reads the last block after the final norm and every other block raw',
        )
    spec = vit.blocks[block]
    if tokens == "class":
        if at == "mha":
            raise UserError(
                f'{method}: at="mha" reads patch tokens, not the class token', 'tokens="patch", or at="ffn"'
            )
        if not vit.class_token or not (normed or spec.num_prefix_tokens):
            raise UserError(f"{method}: block {block} of {vit.name} carries no class token", 'tokens="patch"')
        tap, dim = (FINAL_PREFIX, vit.final_dim) if normed else (Tap("prefix", block), spec.dim)
        return TokenTap(tap, dim, (1, 1))
    if normed:
        return TokenTap(FINAL, vit.final_dim, vit.final_grid)
    if at == "mha":
        return TokenTap(Tap("attention_output", block), spec.attention_dim, spec.grid)
    return TokenTap(features(block), spec.dim, spec.grid)


def class_token(tokens: Tensor) -> Tensor:
    """The class token ``[B, 1, D]`` of prefix tokens ``[B, P, D]``."""
    return tokens[:, :1]
