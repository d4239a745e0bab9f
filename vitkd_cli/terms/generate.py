"""Generation of the deep block: the other half of ViTKD (Yang et al. 2022, arXiv:2209.02432, eq. 5-8).

    L = 1/λ Σ_{n masked} Σ_d ( T − G(Ŝ) )²,   mean over images
    Ŝ = fc(S), a share λ of its tokens replaced by one learned vector
    G = conv3×3, ReLU, conv3×3 over the grid of tokens

S and T are patch tokens [N, D] of the student and of the teacher. 1/λ, the exact number of masked
tokens and the absent fc where the widths are equal are the authors' code, not their text.

The convolutions are computed where they count and nowhere else. The first one sees nothing but the
kept tokens, beside constants: each token is carried straight to its nine neighbours by the product
of convolution and fc, and fc's bias and the mask token arrive through a count of who is around. The
second is computed at the masked tokens, where the loss is. Value and gradients are those of the
dense form; the arithmetic is about half.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitkd_cli.errors import UserError
from vitkd_cli.terms import (
    AT_HELP,
    NORM_HELP,
    REDUCE_HELP,
    TARGET_NORM_HELP,
    At,
    Batch,
    Norm,
    Reduce,
    TargetNorm,
    Term,
    sites_of,
    term,
)
from vitkd_cli.vit.spec import ViTSpec


@term("generate")
class Generate(Term):
    """Squared distance of the generated tokens (Yang et al. 2022, arXiv:2209.02432, eq. 8).

    Summed over masked tokens and channels, divided by λ, mean over images; the paper's weight for
    that is 3e-6. ``reduce="mean"`` is a plain mean over masked tokens and channels, so the paper's
    weight becomes 3e-6 · masked tokens · D / λ: 0.226 for 98 of 196 tokens, 384 wide.

    Raises:
        UserError: if a model has no such block, or ``mask`` is not between 0 and 1.
    """

    weight: ClassVar[float] = 3e-6
    neighbours: Tensor  # [N, 9]

    def __init__(
        self,
        student: ViTSpec,
        teacher: ViTSpec,
        *,
        block: Annotated[int, "Block to compare with the same one of the teacher; -1 is the last."] = -1,
        mask: Annotated[float, "λ: share of the student's tokens that are masked."] = 0.5,
        at: Annotated[At, AT_HELP] = "ffn",
        norm: Annotated[Norm, NORM_HELP] = "auto",
        reduce: Annotated[Reduce, REDUCE_HELP] = "sum",
        target_norm: Annotated[TargetNorm, TARGET_NORM_HELP] = "none",
    ) -> None:
        super().__init__()
        if not 0 < mask < 1:
            raise UserError(f"generate: mask is {mask:g}, not between 0 and 1", "the paper's is 0.5")
        [self.site] = sites_of(student, teacher, block, "generate", at=at, norm=norm)
        ours, theirs = self.site
        self.compares = [self.site.taps]
        self.mask = mask
        self.reduce = reduce
        self.target_norm = target_norm
        self.align = nn.Identity() if ours.dim == theirs.dim else nn.Linear(ours.dim, theirs.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, theirs.dim))
        self.conv1 = nn.Conv2d(theirs.dim, theirs.dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(theirs.dim, theirs.dim, kernel_size=3, padding=1)
        self.register_buffer("neighbours", neighbours_of(*ours.grid), persistent=False)

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        [(student, teacher)] = pairs  # [B, N, D_s], [B, N_t, D]
        assert teacher is not None
        images, tokens = student.shape[:2]
        kept, masked = self.draw(images, tokens, batch)  # [B, kept], [B, masked] token indices
        kept, masked = kept.to(student.device), masked.to(student.device)
        generated = self.generate(student, kept, masked)  # [B, masked, D]
        target = self.site.target(teacher, self.target_norm)
        squares = (generated - pick(target, masked)).square()
        # By the share asked for, not by the one that rounding leaves: it is the authors' 1/λ.
        return squares.mean() if self.reduce == "mean" else squares.sum() / (images * self.mask)

    def draw(self, images: int, tokens: int, batch: Batch) -> tuple[Tensor, Tensor]:
        """Indices of the kept and of the masked tokens, ``[B, kept]`` and ``[B, masked]``."""
        if batch.mask is None:
            order = batch.rand(images, tokens).argsort(dim=1)
            kept = int(tokens * (1 - self.mask))
        else:
            order = batch.mask.argsort(dim=1, stable=True)
            masked = batch.mask.sum(dim=1)  # [B]
            if (masked != masked[0]).any():
                raise ValueError(
                    f"a mask must cover equally many tokens of each image, not {masked.tolist()}"
                )
            kept = tokens - int(masked[0])
        return order[:, :kept], order[:, kept:]

    def generate(self, student: Tensor, kept: Tensor, masked: Tensor) -> Tensor:
        """G(Ŝ) at the masked tokens: ``[B, N, D_s] -> [B, masked, D]``."""
        images, tokens, _ = student.shape
        width = self.mask_token.shape[-1]
        # A row more than tokens: what leaves the grid goes there, and what enters comes from there.
        rows = torch.arange(images, device=student.device)[:, None, None] * (tokens + 1)

        # What a neighbour adds that is no image's own: fc's bias if it is kept, the token if masked.
        visible = pick(student, kept)  # [B, kept, D_s]
        weight, constants = self.conv1.weight, self.mask_token[0]  # [D, D, 3, 3], [1, D]
        is_masked = student.new_zeros(images, tokens + 1, 1)
        around = is_masked.scatter(1, masked[..., None], 1.0)
        if isinstance(self.align, nn.Linear):
            weight = torch.einsum("oihw,id->odhw", weight, self.align.weight)  # [D, D_s, 3, 3]
            constants = torch.cat([constants, self.align.bias[None]])
            around = torch.cat([around, is_masked.scatter(1, kept[..., None], 1.0)], dim=2)
        constants = torch.einsum("oihw,ci->ohwc", self.conv1.weight, constants).flatten(1)
        counts = around[:, self.neighbours].flatten(2)  # [B, N, 9 * constants]
        hidden = F.linear(counts, constants, self.conv1.bias)  # [B, N, D]

        # conv1, from each kept token to its neighbours; seen from there the kernel is turned round.
        kernel = weight.permute(1, 2, 3, 0).flip(1, 2).flatten(1)  # [D_s, 9 * D]
        carried = (visible @ kernel).view(-1, width)  # [B * kept * 9, D]
        to = (rows + self.neighbours[kept]).flatten()
        arrived = carried.new_zeros(images * (tokens + 1), width).index_add_(0, to, carried)
        hidden = hidden + arrived.view(images, tokens + 1, width)[:, :-1]

        # conv2, gathered around each masked token.
        hidden = F.pad(hidden.relu(), (0, 0, 0, 1)).flatten(0, 1)  # [B * (N + 1), D]
        near = hidden.index_select(0, (rows + self.neighbours[masked]).flatten()).view(images, -1, 9 * width)
        kernel = self.conv2.weight.permute(0, 2, 3, 1).flatten(1)  # [D, 9 * D]
        return F.linear(near, kernel, self.conv2.bias)


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """Tokens ``[B, N, D]`` at indices ``[B, M]``: ``[B, M, D]``."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def neighbours_of(rows: int, columns: int) -> Tensor:
    """``[N, 9]``: the tokens around each token and itself, row by row; N where the grid ends."""
    grid = torch.arange(rows * columns).view(rows, columns)
    framed = F.pad(grid, (1, 1, 1, 1), value=rows * columns)
    return framed.unfold(0, 3, 1).unfold(1, 3, 1).reshape(rows * columns, 9)
