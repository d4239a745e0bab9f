"""Which teacher for a student: how well each knows the data, and how it looks at it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from vitkd_cli.data.images import Images
from vitkd_cli.evaluation import evaluate
from vitkd_cli.inspection.images import batches
from vitkd_cli.inspection.maps import attention_layers
from vitkd_cli.inspection.numbers import survey
from vitkd_cli.options import declared
from vitkd_cli.requests import InspectRequest, Pictures
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.pairing import pair_blocks


@dataclass(frozen=True)
class Candidate:
    """A teacher that a student might have.

    Attributes:
        top1: percent on the labelled data.
        similarity: 1 - JSD / ln 2 of the maps at answering blocks, mean over the pairs that relate the same
            patches; None where none does.
        pairs: how many of the student's blocks that is a mean over.
        cka: of the last blocks' features; None with fewer than four images, or where they are all the same.
        parameters, multiply_adds: its own.
        larger, dearer: the same, over the student's.
    """

    model: str
    top1: float
    similarity: float | None
    pairs: int
    cka: float | None
    parameters: int
    multiply_adds: int
    larger: float
    dearer: float


def compare_teachers(
    student: Model,
    teachers: Sequence[str],
    images: Images,
    data: str,
    request: InspectRequest,
    *,
    beside: Sequence[str] = (),
    each: Callable[..., None] = lambda what, done, total: None,
) -> list[Candidate]:
    """Score every teacher on labelled data and lay its maps and features beside the student's.

    Args:
        student: on its device.
        images: on which maps and features are compared.
        data: on which teachers are scored, whole; without what those named in ``beside`` learned from.
        request: how its pictures are read, and how models are run.
        each: told what goes on, images done and in all.

    Returns:
        The most accurate first.
    """
    ours = attention_layers(student)
    parameters, adds = student.parameters, student.multiply_adds
    shared = (*declared(Pictures), "split", "batch_size", "verify", "device")
    found = []
    for name in teachers:
        scored = evaluate(
            name,
            data,
            beside=beside,
            workers=0,
            **{key: getattr(request, key) for key in shared},
            progress=each,
        )
        teacher = scored.built
        theirs = attention_layers(teacher)
        blocks = pair_blocks("all", student.spec, teacher.spec, "inspect-attention")
        layer_of = [{layer.block: index for index, layer in enumerate(layers)} for layers in (theirs, ours)]
        pairs = [(layer_of[0][their], layer_of[1][our]) for our, their in blocks]
        _, divergences, cka = survey(
            [(teacher, theirs), (student, ours)],
            batches(images, [teacher, student], request.batch_size),
            pairs=pairs,
            each=partial(each, f"looking at {name}", total=len(images)),
        )
        assert divergences is not None and cka is not None
        values = divergences.values()
        related = values[~np.isnan(values)]
        last = float(cka.values()[-1, -1])
        own_adds = teacher.multiply_adds
        found.append(
            Candidate(
                model=teacher.spec.name,
                top1=scored.metrics.top1,
                similarity=1 - float(related.mean()) / math.log(2) if related.size else None,
                pairs=int(related.size),
                cka=None if math.isnan(last) else last,
                parameters=scored.parameters,
                multiply_adds=own_adds,
                larger=scored.parameters / parameters,
                dearer=own_adds / adds,
            )
        )
    return sorted(found, key=lambda candidate: -candidate.top1)
