"""The one loop over labelled images, and what it says of each image; each image once."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.evaluation.statistics import Calibration, calibration
from vitkd_cli.vit.spec import in_unit_range

TOP = 5
# One row per image: its class, the five named first, four numbers; in float64, where class indices are exact.
_LABEL, _RANKED, _CONFIDENCE, _NLL, _BRIER, _DIVERGENCE = 0, slice(1, 1 + TOP), 6, 7, 8, 9
WIDTH = 10


@dataclass(frozen=True, eq=False)
class Metrics:
    """What one model said of N images, in the dataset's order.

    Attributes:
        labels: ``[N]`` the class of each image.
        ranked: ``[N, <=5]`` the classes named first, best first; -1 where there is none.
        confidence: ``[N]`` probability of the class named first. This and what follows is None for nearest
            neighbours, which have no logits.
        nll: ``[N]`` negative log-likelihood of the class (cross-entropy), nats.
        brier: ``[N]`` squared distance of the probabilities from the one-hot class (Brier 1950), 0 to 2.
        divergence: ``[N]`` KL(teacher || model) at temperature 1, nats; None without a teacher.
    """

    labels: Tensor
    ranked: Tensor
    confidence: Tensor | None = None
    nll: Tensor | None = None
    brier: Tensor | None = None
    divergence: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor, *, with_teacher: bool = False) -> Self:
        """Of ``[N, 10]`` rows, as :func:`per_image` gives them; rows of zeros are images that never came."""
        rows = rows[rows[:, _CONFIDENCE] != 0].cpu()  # the largest of K probabilities is at least 1/K
        labels, ranked = rows[:, _LABEL].long(), rows[:, _RANKED].long()
        if len(rows) and bool((rows[:, _CONFIDENCE] < 0).all()):  # of nearest neighbours
            return cls(labels, ranked)
        return cls(
            labels=labels,
            ranked=ranked,
            confidence=rows[:, _CONFIDENCE],
            nll=rows[:, _NLL],
            brier=rows[:, _BRIER],
            divergence=rows[:, _DIVERGENCE] if with_teacher else None,
        )

    @property
    def rows(self) -> Tensor:
        """``[N, 10]``, of which :meth:`from_rows` makes the same metrics."""
        rows = torch.full((self.count, WIDTH), -1.0, dtype=torch.float64)
        rows[:, _LABEL] = self.labels.double()
        rows[:, 1 : 1 + self.ranked.shape[1]] = self.ranked.double()
        numbers = (self.confidence, self.nll, self.brier, self.divergence)
        for column, values in zip((_CONFIDENCE, _NLL, _BRIER, _DIVERGENCE), numbers, strict=True):
            if values is not None:
                rows[:, column] = values.double()
        return rows

    @property
    def count(self) -> int:
        """Images that were counted."""
        return len(self.labels)

    @property
    def predictions(self) -> Tensor:
        """``[N]`` the class named first."""
        return self.ranked[:, 0]

    @property
    def right(self) -> Tensor:
        """``[N]`` bool: the class named first is the image's."""
        return self.predictions == self.labels

    @property
    def top1(self) -> float:
        """Percent."""
        return 100 * _mean(self.right)

    @property
    def top5(self) -> float:
        """Percent of images whose class is among the five named first."""
        return 100 * _mean((self.ranked == self.labels[:, None]).any(1))

    @property
    def loss(self) -> float | None:
        """Mean cross-entropy, nats."""
        return None if self.nll is None else _mean(self.nll)

    @property
    def figures(self) -> dict[str, Any]:
        return {"top1": self.top1, "top5": self.top5, "loss": self.loss}

    @cached_property
    def calibration(self) -> Calibration:
        """Of the classes named first; it takes seconds."""
        assert self.confidence is not None
        return calibration(self.confidence.numpy(), self.right.numpy())

    def agreement(self, other: Self) -> float:
        """Share of images, in percent, on which two models name the same class."""
        return 100 * _mean(self.predictions == other.predictions)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def per_image(scores: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """The statistics of each image.

    Args:
        scores: ``[B, K]`` logits.
        labels: ``[B]``.
        teacher: ``[B, K]`` the teacher's logits.

    Returns:
        ``[B, 10]`` float64, which does not depend on how the images were batched.
    """
    scores = scores.double()
    rows = scores.new_full((len(scores), WIDTH), -1)
    log_p = F.log_softmax(scores, 1)
    p = log_p.exp()
    best = scores.topk(min(TOP, scores.shape[1])).indices  # [B, <=5]
    nll = -log_p.gather(1, labels[:, None])[:, 0]
    rows[:, _LABEL] = labels.double()
    rows[:, 1 : 1 + best.shape[1]] = best.double()
    rows[:, _CONFIDENCE] = p.amax(1)
    rows[:, _NLL] = nll
    rows[:, _BRIER] = p.square().sum(1) + 1 - 2 * (-nll).exp()
    if teacher is not None:
        log_q = F.log_softmax(teacher.double(), 1)
        rows[:, _DIVERGENCE] = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(1)
    return rows


Batches = Iterable[tuple[Any, Tensor, Tensor]]


@torch.inference_mode()
def pass_over(
    answer: Callable[..., Tensor],
    batches: Batches,
    table: Tensor,
    *,
    reduce: Callable[[Tensor], Tensor] = lambda table: table,
    advance: Callable[[int], None] = lambda images: None,
) -> Tensor:
    """Run models over a labelled dataset: the one loop of validation, scoring and nearest neighbours.

    Args:
        answer: labels ``[B]`` and the images of each view ``[B, C, H, W]`` in [0, 1], on the table's device
            → ``[B, ...]``, one row per image.
        batches: this process's share: uint8 images, or several views of them; labels; positions in the
            dataset.
        table: ``[N, ...]`` zeros, to be filled in the dataset's order.
        reduce: sums a tensor over the processes.
        advance: told the number of images after every batch.

    Returns:
        The table; longer where a stream is longer than it said, with zeros for images that never came.
    """
    for images, labels, positions in batches:
        views = (images,) if isinstance(images, Tensor) else images
        rows = answer(labels.to(table.device), *(in_unit_range(view, table.device) for view in views))
        if (more := int(positions.max()) + 1 - len(table)) > 0:
            table = torch.cat([table, table.new_zeros(more, *table.shape[1:])])
        table[positions.to(table.device)] = rows
        advance(len(labels))
    return reduce(table)


def measure(
    logits: Callable[[Tensor], Tensor], batches: Batches, total: int, *, device: torch.device, **loop: Any
) -> Metrics:
    """The metrics of one model on a dataset of ``total`` images.

    Args:
        logits: images ``[B, C, H, W]`` in [0, 1] on ``device`` → ``[B, K]``.
        loop: further arguments of :func:`pass_over`.
    """
    table = torch.zeros(total, WIDTH, dtype=torch.float64, device=device)
    rows = pass_over(lambda labels, images: per_image(logits(images), labels), batches, table, **loop)
    return Metrics.from_rows(rows)
