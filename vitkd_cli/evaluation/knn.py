"""How good features are without a head: weighted nearest neighbours (Wu et al. 2018, arXiv:1805.01978).

    score of class c = Σ_i exp(cos(f, f_i) / τ) [y_i = c],   i over the k nearest images of the bank

f and f_i are embeddings of the image and of labelled ones; k = 20 and τ = 0.07 as in DINO (Caron et al.
2021, arXiv:2104.14294).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.evaluation.metrics import Batches, Metrics, predict

K, TEMPERATURE = 20, 0.07
_CHUNK = 1024  # images that are compared with the bank at a time


@torch.inference_mode()
def knn(
    embed: Callable[[Tensor], Tensor],
    bank: tuple[Batches, int],
    queries: tuple[Batches, int] | None,
    *,
    width: int,
    device: torch.device,
    k: int = K,
    temperature: float = TEMPERATURE,
    **loop: Any,
) -> Metrics:
    """Top-1 and top-5 of the nearest neighbours' vote.

    Args:
        embed: images ``[B, C, H, W]`` in [0, 1] on ``device`` → ``[B, E]``.
        bank: this process's share of the labelled images, and how many there are in all.
        queries: likewise, the images to score; None scores the bank, each image by all the others.
        width: E.
        loop: further arguments of :func:`vitkd_cli.evaluation.metrics.predict`.
    """

    def answer(labels: Tensor, images: Tensor) -> Tensor:
        return torch.cat([F.normalize(embed(images).float(), dim=1), labels[:, None]], 1)

    def embedded(batches: Batches, total: int) -> tuple[Tensor, Tensor]:
        rows = predict(answer, batches, torch.zeros(total, width + 1, device=device), **loop)
        return rows[:, :-1], rows[:, -1].long()  # float32 is exact up to 16 million classes

    known, labels = embedded(*bank)
    asked, truth = embedded(*queries) if queries else (known, labels)
    count, classes = len(asked), int(labels.max()) + 1
    best = []
    for start in range(0, count, _CHUNK):
        chunk = asked[start : start + _CHUNK]
        cosines = chunk @ known.T  # [b, bank]
        if queries is None:
            cosines[torch.arange(len(chunk)), torch.arange(start, start + len(chunk))] = -torch.inf
        nearest, index = cosines.topk(min(k, len(known) - (queries is None)))
        votes = cosines.new_zeros(len(chunk), classes)
        votes.scatter_add_(1, labels[index], (nearest / temperature).exp())
        score, ranking = votes.topk(min(5, classes))
        best.append(ranking.where(score > 0, -1))  # a class that nobody voted for is no answer
    ranked = torch.cat(best)  # [count, 5]
    return Metrics(truth.cpu(), ranked.cpu())
