"""What embeddings are worth without a head: a vote of nearest neighbours, a linear classifier, few images."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitkd_cli.data.census import in_training
from vitkd_cli.data.datasets import draw_by_class
from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images
from vitkd_cli.data.scan import by_main
from vitkd_cli.data.transforms import view_of
from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.evaluation.cache import cache_file, digest_of_images, read_rows, write_rows
from vitkd_cli.evaluation.images import Chosen, Provenance
from vitkd_cli.evaluation.knn import vote
from vitkd_cli.evaluation.linear import fit_linear
from vitkd_cli.evaluation.metrics import Metrics
from vitkd_cli.evaluation.opening import (
    Progress,
    counting,
    facts_of,
    look_at,
    over_images,
    prepared_for,
    seen_by,
)
from vitkd_cli.evaluation.results import Evaluation, Evaluations, Judge
from vitkd_cli.meeting import agreed
from vitkd_cli.requests import EvalRequest
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.classes import Match
from vitkd_cli.vit.model import Model

DRAWS = 5
Labelled = tuple[Tensor, Tensor]  # [N, E] features, [N] classes
Tell = Callable[[int, int], None]


def judge_embeddings(
    request: EvalRequest, origin: Provenance, accelerator: Any, progress: Progress
) -> Evaluations:
    """Judge models by their embeddings of a split, whose classes come from those of training images.

    Models are run one after another, each once over either split, so that the features of one are in memory
    at a time; with ``output`` they are kept there. Draws of few images are the same for all models.
    """
    place = accelerator.device if accelerator else device_named(request.device)

    def opened() -> tuple[Chosen, Chosen, Decoding, list[Model]]:
        asked, bank = origin.beside_a_bank(request)
        models = [prepared_for(_with_embedding(typed, request), request, place) for typed in request.models]
        return asked, bank, origin.decoding(request, asked.names), models

    asked, bank, decoding, models = agreed(accelerator, opened)
    assert isinstance(asked.images, Images) and isinstance(bank.images, Images)
    parts = bank.images, asked.images
    for images in parts:
        images.decode_by(decoding)
    notes = [*asked.notes, *bank.notes, *_few(bank, request)]
    notes += [f"{model.spec.name}: {note}" for model in models for note in model.notes]
    notes += agreed(accelerator, lambda: look_at(parts, decoding, accelerator, progress))
    notes.append(
        by_main(
            lambda each: in_training(*parts, each),
            lambda done, total: progress("comparing the splits", done, total),
            accelerator,
        )
    )
    judged: list[Evaluation] = []
    for model in models:
        split: list[Labelled] = []
        cached = True
        for images in parts:
            features, kept = _embedded(model, images, request, accelerator, progress)
            split.append((features, torch.tensor(images.labels(), device=place)))
            cached &= kept

        def judge(each: Tell, split: list[Labelled] = split) -> list[tuple[Judge, Metrics, str]]:
            return [*_judgements(split[0], split[1], request, each)]

        for by, metrics, note in by_main(judge, partial(progress, f"judging {model.spec.name}"), accelerator):
            match = Match(None, tuple(asked.names or ()))
            judged.append(Evaluation(model, match, asked.data, metrics, cached=cached, judge=by))
            notes += [f"{model.spec.name}: {note}"] if note else []
    return Evaluations(
        models=tuple(judged),
        names=tuple(asked.names or ()),
        images=asked.images,
        notes=tuple(dict.fromkeys(filter(None, notes))),
        about=f"{asked.about}, judged by {len(bank.images):,} of {bank.about}",
    )


def _with_embedding(typed: Any, request: EvalRequest) -> Model:
    model = open_model(typed, request)
    if not model.spec.embed_dim:
        raise UserError(
            f"{model.spec.name} gives no embedding of an image: it is an encoder that returns tokens",
            "leave it out",
        )
    return model


def _few(bank: Chosen, request: EvalRequest) -> Iterator[str]:
    """Say which classes have fewer images than are to be drawn."""
    counts = torch.tensor(bank.images.labels() if isinstance(bank.images, Images) else []).bincount()
    counts = counts[counts > 0]
    for shots in request.few_shot:
        short = int((counts < shots).sum())
        if short == len(counts):
            most = f"at most {int(counts.max())}" if len(counts) else "none"
            raise UserError(f"--few-shot {shots}: no class has so many training images ({most})", "fewer")
        if short:
            yield (
                f"{short} of {len(counts)} classes have fewer than {shots} training images: "
                "all of theirs are in every draw"
            )


def _embedded(
    model: Model, images: Images, request: EvalRequest, accelerator: Any, progress: Progress
) -> tuple[Tensor, bool]:
    """Features ``[N, E]`` in float32 on the model's device; whether an earlier call had kept them."""
    file, place, name = None, model.device, model.spec.name
    if request.output is not None:
        about = [digest_of_images(images, images.decoding), request.mixed_precision]
        file = cache_file(expanded(request.output) / "embeddings", name, about, facts_of(model))
        if (known := read_rows(file)) is not None:
            return known.to(place), True
    advance = counting(partial(progress, f"embedding {name}"), len(images))

    def answer(labels: Tensor, seen: Tensor) -> Tensor:
        return model.embedding(seen).float()

    table = torch.zeros(len(images), model.spec.embed_dim, device=place)
    view = view_of(seen_by(model))
    features = over_images(answer, images, view, table, request, accelerator=accelerator, advance=advance)
    if bad := int((~features.isfinite().all(1)).sum()):
        raise UserError(
            f"the embeddings of {name} are not numbers on {bad} of {len(images)} images",
            "--mixed-precision no, or weights of a training that did not diverge",
            exit_code=3,
        )
    if file is not None and (accelerator is None or accelerator.is_main_process):
        write_rows(file, features)
    return features, False


def _judgements(
    bank: Labelled, queries: Labelled, request: EvalRequest, each: Tell
) -> Iterator[tuple[Judge, Metrics, str]]:
    """What every judge says, of all training images and of few; and a note."""
    shots = sorted({*request.few_shot})
    judges = [
        (name, judge)
        for name, judge, wanted in (("k-NN", _by_vote, request.knn), ("linear", _by_fit, request.linear))
        if wanted
    ]
    total, done = len(judges) * (1 + DRAWS * len(shots)), 0
    labels = bank[1].tolist()

    def tell(part: int, whole: int) -> None:
        each(100 * done + 100 * part // max(1, whole), 100 * total)

    for name, judge in judges:
        metrics, c, note = judge(bank, queries, tell)
        done += 1
        found: dict[int, list[float]] = {}
        for count in shots:
            for seed in range(DRAWS):
                drawn = draw_by_class(labels, partial(min, count), seed)
                some = bank[0][drawn], bank[1][drawn]
                found.setdefault(count, []).append(judge(some, queries, tell)[0].top1)
                done += 1
        each(100 * done, 100 * total)
        yield Judge(name, len(labels), len({*labels}), c, found), metrics, note


def _by_vote(bank: Labelled, queries: Labelled, tell: Tell) -> tuple[Metrics, float | None, str]:
    return vote(*bank, *queries, advance=counting(tell, len(queries[0]))), None, ""


def _by_fit(bank: Labelled, queries: Labelled, tell: Tell) -> tuple[Metrics, float | None, str]:
    model = fit_linear(*bank, tell=tell)
    note = "" if model.converged else f"the linear classifier had not converged, at C = {model.c:.3g}"
    return model.judge(*queries), model.c, note
