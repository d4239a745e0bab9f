"""What models are worth on a run's validation images."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vitkd_cli.data.images import ImageData, Split
from vitkd_cli.data.keyed import ValBatch, val_loader
from vitkd_cli.data.transforms import view_of
from vitkd_cli.evaluation import Metrics, measure
from vitkd_cli.evaluation.knn import knn
from vitkd_cli.evaluation.metrics import Batches
from vitkd_cli.evaluation.statistics import share_interval
from vitkd_cli.processes import heartbeat
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.vit.model import Model


@dataclass
class Validation:
    """Scores networks like a model's on the validation images: by their logits, or by nearest neighbours."""

    model: Model
    data: ImageData
    recipe: Recipe
    session: Session

    @classmethod
    def of(cls, model: Model, data: ImageData, recipe: Recipe, session: Session) -> Self | None:
        """None where there is nothing to score."""
        spec = model.spec
        fits = spec.num_classes == data.num_classes
        if data.by_neighbours:
            fits = data.bank is not None and bool(spec.embed_dim)
        return cls(model, data, recipe, session) if data.val is not None and fits else None

    def __post_init__(self) -> None:
        self._view = view_of(self.model.preprocessing)

    def __call__(self, net: nn.Module) -> Metrics:
        model, data, session = replace(self.model, net=net), self.data, self.session
        parts = (
            [data.val] if data.bank in (None, data.val) or not data.by_neighbours else [data.bank, data.val]
        )
        self.total, self.done, training = sum(len(part) for part in parts if part), 0, net.training
        answer = model.embedding if data.by_neighbours else model.logits

        def answered(images: Tensor) -> Tensor:
            with session.accelerator.autocast():
                return answer(images.to(session.dtype))

        options: dict[str, Any] = {
            "device": session.device,
            "reduce": lambda tensor: session.accelerator.reduce(tensor, "sum"),
            "advance": self._advance,
        }
        net.eval()
        with session.reporter.bar("validation", self.total):
            gathers = answered if isinstance(net, FSDPModule) else None
            shares = [self._share(part, gathers) for part in parts if part]
            if data.by_neighbours:
                width, asked = model.spec.embed_dim, shares[1] if len(shares) > 1 else None
                metrics = knn(answered, shares[0], asked, width=width, **options)
            else:
                metrics = measure(answered, *shares[0], **options)
        net.train(training)
        return metrics

    def _share(self, images: Split, answered: Callable[[Tensor], Tensor] | None) -> tuple[Batches, int]:
        """This process's share of the images, and how many there are in all.

        Args:
            answered: where parts of weights are gathered; then all processes make as many forwards.
        """
        accelerator, spec = self.session.accelerator, self.model.spec
        size = self.recipe.validation_batch_size or self.recipe.batch
        loader = val_loader(
            images,
            self._view,
            size,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            workers=self.session.workers,
            pin_memory=self.session.device.type == "cuda",
        )

        def in_step(answered: Callable[[Tensor], Tensor]) -> Iterator[ValBatch]:
            yield from loader
            most = math.ceil(len(images) / accelerator.num_processes / size)
            for _ in range(most - len(loader)):
                answered(torch.zeros(1, len(spec.mean), *spec.input_size, device=self.session.device))

        return in_step(answered) if answered else loader, len(images)

    def _advance(self, count: int) -> None:
        heartbeat("a validation")
        self.done += count * self.session.accelerator.num_processes
        self.session.reporter.advance(min(self.done, self.total))


def doubt_about(
    teacher: Metrics, student: Model, data: ImageData, recipe: Recipe, session: Session
) -> str | None:
    """Why a teacher may have little to teach: it is at chance, or no better than the student at its start."""
    cure = "--finetune-teacher with more epochs" if recipe.finetune_teacher else "--finetune-teacher N"
    little = f"there is little to learn from it; {cure} trains it on these images"
    most = 100 * float(teacher.labels.bincount().max()) / teacher.count
    if share_interval(int(teacher.right.sum()), teacher.count)[0] <= most:
        guess = f"always saying the most common class has {most:.2f}"
        return f"the teacher is at chance: its top-1 is {teacher.top1:.2f}, {guess}: {little}"
    score = Validation.of(student, data, recipe, session)
    if score is None or not (recipe.pretrained or recipe.initial_checkpoint):
        return None
    start = score(student.net).top1
    if teacher.top1 > start:
        return None
    return f"the teacher's top-1 is {teacher.top1:.2f}, and the student begins at {start:.2f}: {little}"
