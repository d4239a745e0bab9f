"""How good features are without a head: weighted nearest neighbours (Wu et al. 2018, arXiv:1805.01978).

    score of class c = Σ_i exp(cos(f, f_i) / τ) [y_i = c],   i over the k nearest images of the bank

f and f_i are embeddings of the image and of labelled ones; k = 20 and τ = 0.07 as in DINO (Caron et al.
2021, arXiv:2104.14294). Of images equally near the first of the bank counts, and of classes with equal
scores the first.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.evaluation.metrics import TOP, Batches, Metrics, pass_over

K, TEMPERATURE = 20, 0.07
_QUERIES, _BANK = 512, 16_384  # images that are compared at a time: 64 MiB of cosines
_STEPS = 2**30  # cosines are compared to so many parts of 1, so that no order of summation decides a tie
_NOBODY = torch.iinfo(torch.int64).min


@torch.inference_mode()
def knn(
    embed: Callable[[Tensor], Tensor],
    bank: tuple[Batches, int],
    queries: tuple[Batches, int] | None,
    *,
    width: int,
    device: torch.device,
    **loop: Any,
) -> Metrics:
    """Top-1 and top-5 of the nearest neighbours' vote.

    Args:
        embed: images ``[B, C, H, W]`` in [0, 1] on ``device`` → ``[B, E]``.
        bank: this process's share of the labelled images, and how many there are in all.
        queries: likewise, the images to score; None scores the bank, each image by all the others.
        width: E.
        loop: further arguments of :func:`vitkd_cli.evaluation.metrics.pass_over`.
    """

    def answer(labels: Tensor, images: Tensor) -> Tensor:
        return torch.cat([embed(images).float(), labels[:, None]], 1)

    def embedded(batches: Batches, total: int) -> tuple[Tensor, Tensor]:
        rows = pass_over(answer, batches, torch.zeros(total, width + 1, device=device), **loop)
        return rows[:, :-1], rows[:, -1].long()  # float32 is exact up to 16 million classes

    known = embedded(*bank)
    return vote(*known, *(embedded(*queries) if queries else (None, None)))


@torch.inference_mode()
def vote(
    bank: Tensor,
    labels: Tensor,
    queries: Tensor | None = None,
    truth: Tensor | None = None,
    *,
    k: int = K,
    temperature: float = TEMPERATURE,
    advance: Callable[[int], None] = lambda images: None,
) -> Metrics:
    """What the neighbours say of a query; beside the features it takes a fixed amount: some 270 MiB.

    Args:
        bank, labels: ``[N, E]`` features and ``[N]`` classes of the labelled images.
        queries, truth: likewise, of the images to score; None scores the bank, each image by all the others.
        advance: told the number of queries after every chunk.
    """
    asked, known = bank if queries is None else queries, labels if truth is None else truth
    classes = int(labels.max()) + 1
    k = min(k, len(bank) - (queries is None))
    best = []
    for start in range(0, len(asked), _QUERIES):
        chunk = F.normalize(asked[start : start + _QUERIES].double(), dim=1)
        own = torch.arange(start, start + len(chunk)) if queries is None else None
        fine = chunk.isfinite().all(1, keepdim=True)
        cosines, index = _nearest(chunk, bank, k, own)
        votes = cosines.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, labels[index], (cosines / temperature).exp())
        score, ranking = (found[:, :TOP] for found in votes.sort(descending=True, stable=True))
        best.append(ranking.where((score > 0) & fine, -1))  # a class that nobody voted for is no answer
        advance(len(chunk))
    return Metrics(known.cpu(), torch.cat(best).cpu())


def _nearest(queries: Tensor, bank: Tensor, k: int, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cosines and indices ``[b, k]`` of the nearest images of the bank, nearest first.

    A cosine and the index are one number, whose order is total: chunks cannot change the outcome.

    Args:
        queries: ``[b, E]`` float64, of length 1.
        own: the index of each query in the bank, which does not count.
    """
    best = torch.full((len(queries), 0), _NOBODY, device=bank.device)
    for start in range(0, len(bank), _BANK):
        part = F.normalize(bank[start : start + _BANK].double(), dim=1)
        index = torch.arange(start, start + len(part), device=bank.device)
        keys = (queries @ part.T).nan_to_num_(nan=-1).mul_(_STEPS).round_().long()  # [b, bank]
        keys.mul_(2**32).sub_(index)
        if own is not None:
            inside = ((own >= start) & (own < start + len(part))).nonzero()[:, 0]
            keys[inside, own[inside] - start] = _NOBODY
        best = torch.cat([best, keys.topk(min(k, len(part))).values], 1)
        best = best.topk(min(k, best.shape[1])).values
    index = (-best) & 0xFFFFFFFF
    return ((best + index) >> 32).double() / _STEPS, index
