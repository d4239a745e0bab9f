"""Correlation in place of divergence, DIST (Huang et al. 2022, arXiv:2205.10536).

    L = T² [ β (1 − mean_b ρ(q_b·, p_b·))  +  γ (1 − mean_k ρ(q_·k, p_·k)) ]

p and q are the softmax [B, K] of the teacher's and the student's logits at temperature T; ρ is Pearson's
correlation: of an image's classes in the first part (inter-class), of a class over the images of the
global batch in the second one (intra-class). 1e-8 is added to the product of norms in ρ.
"""

from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor
from torch.linalg import vector_norm

from vitkd_cli.options import Option
from vitkd_cli.terms import Batch, term
from vitkd_cli.terms.bases import LogitTerm


@term("dist")
class DIST(LogitTerm):
    """DIST (Huang et al. 2022, arXiv:2205.10536), without unit, 0 to 2 a part, mean over images and classes.

    β = γ = T = 1 are the authors' defaults; their runs weigh both parts by 2: ``labels + 2*dist``. The
    second part compares images with each other: those of all processes, but not those of several
    accumulation steps, so that many small steps see less than one large one. For a single image it is a
    constant 1.
    """

    beta: Annotated[float, Option("β: weight of the relations between an image's classes.", minimum=0)] = 1.0
    gamma: Annotated[
        float, Option("γ: weight of the relations between images, a class at a time.", minimum=0)
    ] = 1.0
    temperature = 1.0

    def loss(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        q, p = (student / self.temperature).softmax(dim=1), (teacher / self.temperature).softmax(dim=1)
        inter = 1 - pearson(q, p).mean()
        intra = 1 - pearson_over_images(q, p, batch.gather).mean()
        return self.temperature**2 * (self.beta * inter + self.gamma * intra)


def pearson(ours: Tensor, theirs: Tensor) -> Tensor:
    """Pearson's correlation of each row of ``[M, N]`` with the same row of the other, ``[M]``."""
    ours = ours - ours.mean(dim=1, keepdim=True)
    theirs = theirs - theirs.mean(dim=1, keepdim=True)
    return (ours * theirs).sum(dim=1) / (vector_norm(ours, dim=1) * vector_norm(theirs, dim=1) + 1e-8)


def pearson_over_images(ours: Tensor, theirs: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
    """Pearson's correlation of each column of ``[B, K]`` over the images of all processes, ``[K]``.

    Only sums travel: the whole matrices, of 64 processes with 256 images of 21,841 classes, take 2.7 GiB.

    Args:
        gather: see :class:`Batch`; every process has as many images.
    """
    both = torch.stack([ours, theirs])  # [2, B, K]
    both = both - gather(both.mean(dim=1)[None]).mean(dim=0)[:, None]
    ours, theirs = both
    parts = torch.stack([(ours * theirs).sum(dim=0), *vector_norm(both, dim=1)])
    products, *norms = gather(parts[None]).unbind(dim=1)  # [processes, K] each
    one, other = (vector_norm(norm, dim=0) for norm in norms)
    return products.sum(dim=0) / (one * other + 1e-8)
