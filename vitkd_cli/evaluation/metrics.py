"""What models say of each image of a dataset, in one pass over it; each image once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.evaluation.statistics import Calibration, calibration
from vitkd_cli.vit.spec import in_unit_range

TOP = 5
# A row an image: its class, the five named first, four numbers; in float64, where class indices are exact.
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
    def from_rows(cls, rows: Tensor, *, taught: bool = False) -> Metrics:
        """Of ``[N, 10]`` rows, as :func:`answers` gives them."""
        rows = rows.cpu()
        return cls(
            labels=rows[:, _LABEL].long(),
            ranked=rows[:, _RANKED].long(),
            confidence=rows[:, _CONFIDENCE],
            nll=rows[:, _NLL],
            brier=rows[:, _BRIER],
            divergence=rows[:, _DIVERGENCE] if taught else None,
        )

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

    @cached_property
    def calibration(self) -> Calibration:
        """Of the classes named first; it takes seconds."""
        assert self.confidence is not None
        return calibration(self.confidence.numpy(), self.right.numpy())

    def agreement(self, other: Metrics) -> float:
        """Share of images, in percent, on which two models name the same class."""
        return 100 * _mean(self.predictions == other.predictions)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())


def answers(scores: Tensor, labels: Tensor, teacher: Tensor | None = None) -> Tensor:
    """What logits say of each image.

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


class Tables:
    """The rows of several models over one dataset, filled as the images come.

    Attributes:
        rows: ``[models, N, 10]`` float64.
        seen: ``[N]`` which images have been answered, 1 or 0.
    """

    def __init__(self, models: int, images: int, device: torch.device | None = None) -> None:
        self.rows = torch.zeros(models, images, WIDTH, dtype=torch.float64, device=device)
        self.seen = torch.zeros(images, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, rows: Tensor, seen: Tensor) -> Tables:
        tables = cls(0, 0)
        tables.rows, tables.seen = rows, seen
        return tables

    @classmethod
    def together(cls, tables: Sequence[Tables]) -> Tables:
        """Several models' as one; what not all of them have answered counts as unanswered."""
        seen = torch.stack([table.seen for table in tables]).amin(0)
        return cls.of(torch.cat([table.rows for table in tables]) * seen[:, None], seen)

    def apart(self) -> list[Tables]:
        """One model's each."""
        return [Tables.of(rows[None], self.seen) for rows in self.rows]

    def to(self, device: torch.device) -> Tables:
        return Tables.of(self.rows.to(device), self.seen.to(device))

    @property
    def complete(self) -> bool:
        return bool(self.seen.all())

    def put(self, positions: Tensor, rows: Sequence[Tensor]) -> None:
        """Answers of every model, ``[B, 10]`` each, to the images at these positions."""
        positions = positions.to(self.seen.device)
        if (more := int(positions.max()) + 1 - len(self.seen)) > 0:  # a stream that is longer than it said
            self.rows = F.pad(self.rows, (0, 0, 0, more))
            self.seen = F.pad(self.seen, (0, more))
        self.rows[:, positions] = torch.stack([*rows])
        self.seen[positions] = 1

    def metrics(self, *, taught: bool = False) -> Metrics:
        """Of the only model, over the images that were answered."""
        [rows] = self.rows
        return Metrics.from_rows(rows[self.seen > 0], taught=taught)


@torch.inference_mode()
def measure(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    total: int,
    *,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    each: Callable[[int], None] = lambda images: None,
) -> Metrics:
    """Run a model over this process's share of a dataset and put the shares together.

    Args:
        logits: images ``[B, C, H, W]`` in [0, 1] on ``device`` → ``[B, K]``.
        batches: uint8 images, labels and positions in the dataset.
        total: images of the whole dataset.
        reduce: sums a tensor over the processes.
        each: told the number of images after every batch.
    """
    tables = Tables(1, total, device)
    for images, labels, positions in batches:
        scores = logits(in_unit_range(images, device))
        tables.put(positions, [answers(scores, labels.to(device))])
        each(len(labels))
    tables.rows, tables.seen = reduce(tables.rows), reduce(tables.seen)
    return tables.metrics()
