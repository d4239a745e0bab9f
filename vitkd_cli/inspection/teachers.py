"""Which teacher for a student: how well each knows the data, and how it looks at it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import evaluate
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.inspection.images import batches, images_of, open_models, sources_of
from vitkd_cli.inspection.maps import attention_layers
from vitkd_cli.inspection.numbers import rough_cka, survey
from vitkd_cli.options import declared, takes
from vitkd_cli.requests import InspectRequest, Pictures
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


@dataclass(frozen=True)
class Candidates:
    """Teachers that a student might have, the most accurate first.

    Attributes:
        images: on which maps and features were compared.
        notes: what a reader of the table should know.
    """

    student: str
    images: int
    candidates: tuple[Candidate, ...]
    notes: tuple[str, ...]

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(candidate) for candidate in self.candidates]


@takes(InspectRequest)
def compare_teachers(
    request: InspectRequest, *, progress: Callable[..., None] = lambda stage, done, total: None
) -> Candidates:
    """Score the teachers on labelled data, and compare their maps and features with the student's.

    They are scored on the whole split, without the images that the student learned from.

    Args:
        request: or its settings; its one model is the student.
        progress: told the stage, images done and in all.
    """
    if len(request.models) > 1:
        raise UserError("--teachers is for one model, their student", "name the student alone")
    if request.output or request.dump:
        raise UserError(
            "--teachers prints a table and writes no files", "leave the folder out; --json > FILE"
        )
    sources, images = sources_of(request), images_of(request)
    [student] = open_models(request)
    ours = attention_layers(student)
    shared = (*declared(Pictures), "split", "batch_size", "verify", "device")
    found = []
    for name in (name for names in request.teachers for name in names.split(",")):
        scored = evaluate(
            name,
            Provenance(sources).data(request.data),
            beside=sources,
            workers=0,
            **{key: getattr(request, key) for key in shared},
            progress=progress,
        )
        teacher = scored.built
        theirs = attention_layers(teacher)
        blocks = pair_blocks("all", student.spec, teacher.spec, "inspect-attention")
        layer_of = [{layer.block: index for index, layer in enumerate(layers)} for layers in (theirs, ours)]
        _, divergences, cka = survey(
            [(teacher, theirs), (student, ours)],
            batches(images, [teacher, student], request.batch_size),
            pairs=[(layer_of[0][their], layer_of[1][our]) for our, their in blocks],
            progress=partial(progress, f"looking at {name}", total=len(images)),
        )
        assert divergences is not None and cka is not None
        values = divergences.values()
        related = values[~np.isnan(values)]
        last = float(cka.values()[-1, -1])
        found.append(
            Candidate(
                model=teacher.spec.name,
                top1=scored.metrics.top1,
                similarity=1 - float(related.mean()) / math.log(2) if related.size else None,
                pairs=int(related.size),
                cka=None if math.isnan(last) else last,
                parameters=scored.parameters,
                multiply_adds=teacher.multiply_adds,
                larger=scored.parameters / student.parameters,
                dearer=teacher.multiply_adds / student.multiply_adds,
            )
        )
    notes = (
        *(f"{student.spec.name}: {note}" for note in student.notes),
        f"similarity is 1 - JSD / ln 2 of the maps at answering blocks, over {len(images)} images",
        "similarity and CKA describe, they do not rank: one paper lost with a CaiT teacher, later ones "
        "gained with the same (docs/attention.md)",
        rough_cka(len(images), undefined=any(one.cka is None for one in found)),
        *images.notes,
    )
    ranked = sorted(found, key=lambda candidate: -candidate.top1)
    return Candidates(student.spec.name, len(images), tuple(ranked), tuple(filter(None, notes)))
