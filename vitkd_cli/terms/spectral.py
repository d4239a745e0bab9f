"""Alignment of feature maps by frequency: SpectralKD (Tian et al. 2024, arXiv:2412.19055).

    L = mean over blocks, images, channels and frequencies of ½ | rFFT2(S_i) − rFFT2(pool(T_i)) |²

S_i and T_i are the patch tokens after block i as maps [D, H, W]; rFFT2 is the unitary transform over
rows and columns, of which a real map needs the half spectrum; pool averages neighbouring channels of
the teacher until there are as many as the student's; ½ is the mean over real and imaginary part.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkd_cli.terms import term
from vitkd_cli.terms.bases import FeatureTerm
from vitkd_cli.vit.pairing import Blocks, pair_blocks
from vitkd_cli.vit.spec import ViTSpec

AUTHORS = (0, 1, -6, -5, -4, -3, -2, -1)


@term("spectral")
class Spectral(FeatureTerm):
    """Mean squared distance of spectra (Tian et al. 2024, arXiv:2412.19055), without parameters.

    A plain mean over blocks, images, channels, frequencies, and real and imaginary parts; the authors'
    formula is ``0.1*labels + 0.9*kd + 0.2*spectral``, without stochastic depth, and 0.05 for Swin. The
    transform is unitary, as in their code, so that the weight does not depend on the grid. By Parseval's
    theorem the loss is about half the mean squared error of the maps, or all of it for what does not vary
    along rows: the half spectrum drops the twins of all other frequencies.

    The last block is read before the final norm, as theirs is. Where a model has fewer than 8
    blocks, the default keeps the first two and as many of the last as are left, so that no block has two
    targets.
    """

    blocks: Blocks = AUTHORS
    at = "ffn"
    norm = "raw"
    reduce: Literal["mean"] = "mean"  # no option

    def block_pairs(self, student: ViTSpec, teacher: ViTSpec) -> list[tuple[int, int]]:
        blocks = self.blocks
        if blocks == AUTHORS:
            depth = min(student.depth, teacher.depth)
            blocks = tuple(b for b in AUTHORS if (0 <= b < depth) or (b < 0 and depth + b > 1))
        return pair_blocks(blocks, student, teacher, self.word)

    def squares(self, index: int, student: Tensor, teacher: Tensor) -> Tensor:
        """Of the real and the imaginary part, ``[B, H, W // 2 + 1, D, 2]``."""
        site = self.sites[index]
        target = site.target(F.adaptive_avg_pool1d(teacher, site.student.dim))  # [B, N, D]
        # The transform is linear: one of the difference is the difference of two.
        difference = (student - target).unflatten(1, site.student.grid)  # [B, H, W, D]
        spectrum = torch.fft.rfft2(difference, dim=(1, 2), norm="ortho")
        return torch.view_as_real(spectrum).square()
