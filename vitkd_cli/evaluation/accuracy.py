"""Any number of models on one labelled dataset, in one pass over its images."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images, Split, Stream
from vitkd_cli.data.transforms import Views, view_of
from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError, expanded, writable
from vitkd_cli.evaluation.cache import cache_file, digest_of_images, read_rows, write_rows
from vitkd_cli.evaluation.cost import measure_cost
from vitkd_cli.evaluation.frozen import judge_embeddings
from vitkd_cli.evaluation.images import READ_WITH, Chosen, Provenance
from vitkd_cli.evaluation.metrics import WIDTH, Metrics, per_image
from vitkd_cli.evaluation.opening import (
    AUTOCAST,
    Progress,
    counting,
    facts_of,
    look_at,
    over_images,
    prepared_for,
    seen_by,
)
from vitkd_cli.evaluation.results import Evaluation, Evaluations, reassessed, scored_classes
from vitkd_cli.evaluation.writing import check_table
from vitkd_cli.meeting import agreed
from vitkd_cli.options import takes
from vitkd_cli.requests import EvalRequest
from vitkd_cli.vit.build import open_model, source_of
from vitkd_cli.vit.classes import Match
from vitkd_cli.vit.model import AnyModel, Model

Scored = tuple[Model, Match]  # a model, and its classes beside the data's


def evaluate(model: AnyModel, data: str | Path | None = None, **options: Any) -> Evaluation:
    """Top-1, top-5 and loss of one model; its options are :func:`evaluate_all`'s."""
    if options.get("knn") and options.get("linear"):
        raise UserError("knn and linear are two evaluations", "ask evaluate_all for both, or for one of them")
    found: Evaluations = evaluate_all([model], data, **options)
    return found.models[0]


@takes(EvalRequest)
def evaluate_all(
    request: EvalRequest,
    *,
    beside: Sequence[str] = (),
    accelerator: Any = None,
    progress: Progress = lambda stage, done, total: None,
) -> Evaluations:
    """Score timm models, run folders or weight files on a labelled split, each image once.

    The images are decoded once for all models; those that see them alike share a view. All models are in
    memory together; built ones go to the device and into eval mode. With ``output``, models that an earlier
    call has finished are not run again. With ``knn`` or ``linear`` their embeddings are judged in place of
    their heads (:func:`vitkd_cli.evaluation.frozen.judge_embeddings`).

    Args:
        request: or its settings, the models and the data first.
        beside: models that are not scored, whose training images are left out, too, and whose runs have a
            say in how pictures are decoded.
        accelerator: an ``accelerate.Accelerator`` to share the images among its processes.
        progress: told the stage, what is done, and of how much.
    """
    check_request(request)
    first, *others = request.models
    named = (request.checkpoint or source_of(first), *map(source_of, (*others, request.teacher)))
    origin = agreed(accelerator, lambda: Provenance((*named, *beside)))
    if request.knn or request.linear:
        judged = judge_embeddings(request, origin, accelerator, progress)
        return _completed(judged, request, progress) if _is_main(accelerator) else judged
    place = accelerator.device if accelerator else device_named(request.device)
    chosen, decoding, scored = agreed(accelerator, lambda: _all_opened(request, origin, place))
    images, ours = chosen.images, scored[: len(request.models)]

    files = _cache_files(scored, images, decoding, request)
    tables = [None if file is None else read_rows(file) for file in files]
    todo = [index for index, rows in enumerate(tables) if rows is None]
    notes: tuple[str, ...] = ()
    if todo:
        if request.teacher:  # how far a model is from it is measured on the spot
            todo = sorted({*todo, len(ours)})
        notes = agreed(accelerator, lambda: look_at([images], decoding, accelerator, progress))
        fresh = _rows([scored[index] for index in todo], images, request, accelerator, progress)
        for index, rows in zip(todo, fresh, strict=True):
            tables[index] = rows
            if (file := files[index]) and _is_main(accelerator):
                write_rows(file, rows)
    metrics = [
        _metrics(rows, model, chosen, request)
        for rows, (model, _) in zip(tables, scored, strict=True)
        if rows is not None
    ]
    teacher = metrics[-1] if request.teacher else None
    orders = {match.names for _, match in ours}
    found = Evaluations(
        models=tuple(
            Evaluation(*one, chosen.data, metrics[index], cached=index not in todo, teacher=teacher)
            for index, one in enumerate(ours)
        ),
        names=orders.pop() if len(orders) == 1 else tuple(chosen.names or ()),
        images=images if isinstance(images, Images) else None,
        teacher=scored[-1][0].spec.name if teacher else None,
        notes=_notes(chosen, scored, notes),
        about=chosen.about,
    )
    if accelerator:
        accelerator.wait_for_everyone()  # what follows is the first process's alone, and may take long
    return _completed(found, request, progress) if _is_main(accelerator) else found


def check_request(request: EvalRequest) -> None:
    """Refuse what cannot be, before anything is read."""
    if request.checkpoint is not None and len(request.models) > 1:
        raise UserError(
            "--checkpoint gives weights to one model, and several are named",
            "score them one by one, or name run folders",
        )
    _check_judges(request)
    if (path := request.predictions) is not None:
        check_table(path, "--predictions", (".csv", ".parquet"), "answers.csv")
    if request.output is not None:
        writable(Path(request.output) / "results.json", "--output")


def _check_judges(request: EvalRequest) -> None:
    """Refuse what goes with heads alone beside embeddings, and the other way round."""
    if request.knn or request.linear:
        flag = "--knn" if request.knn else "--linear"
        for other in ("teacher", "real_labels", "valid_labels", "test_time_pool"):
            if getattr(request, other):
                raise UserError(
                    f"{flag} judges embeddings, and --{other.replace('_', '-')} is about heads",
                    "leave one of them out",
                )
        return
    for other in ("few_shot", "bank", "train_split"):
        if getattr(request, other):
            raise UserError(f"--{other.replace('_', '-')} is about embeddings", "add --knn, --linear or both")


def _is_main(accelerator: Any) -> bool:
    return accelerator is None or bool(accelerator.is_main_process)


def _all_opened(
    request: EvalRequest, origin: Provenance, place: torch.device
) -> tuple[Chosen, Decoding, list[Scored]]:
    """The images, how they are decoded, and every model, a teacher last."""
    read_with = {key: getattr(request, key) for key in READ_WITH}
    chosen = origin.images(
        origin.data(request.data), request.split, ground_truth=request.ground_truth, **read_with
    )
    decoding = origin.decoding(request, chosen.names)
    chosen.images.decode_by(decoding)
    ours = [_opened(model, request, chosen, place) for model in request.models]
    its_own = replace(request, checkpoint=None, use_ema=False)
    teacher = [_opened(request.teacher, its_own, chosen, place)] if request.teacher else []
    _check_classes(ours, teacher, chosen.images)
    return chosen, decoding, [*ours, *teacher]


def _opened(typed: AnyModel, request: EvalRequest, chosen: Chosen, place: torch.device) -> Scored:
    """A model on its device, for images prepared as the request says."""
    model = open_model(typed, request)
    if not model.spec.num_classes:
        raise UserError(
            f"{model.spec.name} has no classes to score: its output is an embedding or it has no head",
            "--knn or --linear judges its embedding; vitkd distill --student … --pretrained --loss labels "
            "gives it a head",
        )
    match = chosen.classes_of(model, class_map=request.class_map, valid_labels=request.valid_labels)
    return prepared_for(model, request, place), match


def _check_classes(ours: Sequence[Scored], teacher: Sequence[Scored], images: Split) -> None:
    """Refuse a teacher of other classes, and labels that a model does not have."""
    for other in teacher:
        for one in ours:
            count, theirs = scored_classes(*one), scored_classes(*other)
            if (count, one[1].names) != (theirs, other[1].names):
                raise UserError(
                    f"{one[0].spec.name} is scored on {count} classes, "
                    f"the teacher on {theirs}{' other' if count == theirs else ''}",
                    "leave --teacher out, or name one of the same classes",
                )
    if isinstance(images, Images) and len(images):
        _check_labels(torch.tensor(images.labels()), [*ours, *teacher])


def _check_labels(labels: Tensor, scored: Sequence[Scored]) -> None:
    """Refuse labels outside a model's classes, as there may be where the data names none."""
    if int(labels.min()) < 0:
        raise UserError("the data has images without a label", "see --target-key")
    fewest = min(scored, key=lambda one: scored_classes(*one))
    count, highest = scored_classes(*fewest), int(labels.max())
    if highest >= count:
        raise UserError(
            f"the data has a class {highest}, and {fewest[0].spec.name} has {count}, from 0",
            "score a model of these classes, or name the data's with --class-map",
        )


def _cache_files(
    scored: Sequence[Scored], images: Split, decoding: Decoding, request: EvalRequest
) -> Sequence[Path | None]:
    """Where the answers of each model are kept, under all that they depend on."""
    if request.output is None or isinstance(images, Stream):  # a stream may give others
        return [None] * len(scored)
    about = [digest_of_images(images, decoding), request.mixed_precision]
    facts = [[*facts_of(model), match.indices] for model, match in scored]
    teacher = facts[-1] if request.teacher else None
    folder = expanded(request.output) / "answers"
    return [
        cache_file(folder, model.spec.name, about, own, teacher)
        for (model, _), own in zip(scored, facts, strict=True)
    ]


def _rows(
    scored: Sequence[Scored], images: Split, request: EvalRequest, accelerator: Any, progress: Progress
) -> Sequence[Tensor]:
    """The ``[N, 10]`` rows of every model, a teacher last; each image is decoded once."""
    total = len(images)
    views: list[dict[str, Any]] = []
    sees = []  # which of the views each model does
    for view in (seen_by(model) for model, _ in scored):
        if view not in views:
            views.append(view)
        sees.append(views.index(view))
    title = scored[0][0].spec.name if len(scored) == 1 else f"{len(scored)} models"
    advance = counting(partial(progress, f"scoring {title}"), total)

    def answer(labels: Tensor, *seen: Tensor) -> Tensor:
        if isinstance(images, Stream):
            _check_labels(labels, scored)
        logits = [
            match.taken(model.logits(seen[index])) for (model, match), index in zip(scored, sees, strict=True)
        ]
        teacher = logits[-1] if request.teacher else None
        return torch.stack([per_image(scores, labels, teacher) for scores in logits], 1)  # [B, models, 10]

    table = torch.zeros(total, len(scored), WIDTH, dtype=torch.float64, device=scored[0][0].device)
    seen = Views([view_of(view) for view in views])
    rows = over_images(answer, images, seen, table, request, accelerator=accelerator, advance=advance)
    return rows.cpu().unbind(1)


def _metrics(rows: Tensor, model: Model, chosen: Chosen, request: EvalRequest) -> Metrics:
    metrics = Metrics.from_rows(rows, with_teacher=bool(request.teacher))
    if not metrics.count:
        raise UserError(
            f"{chosen.data}: the {request.split} split is empty", "check --data and the split names"
        )
    assert metrics.confidence is not None
    if bad := int(metrics.confidence.isnan().sum()):
        raise UserError(
            f"the logits of {model.spec.name} are not numbers on {bad} of {metrics.count} images",
            "--mixed-precision no, or weights of a training that did not diverge",
            exit_code=3,
        )
    return metrics


def _notes(chosen: Chosen, scored: Sequence[Scored], more: Sequence[str]) -> tuple[str, ...]:
    of_models = (f"{model.spec.name}: {note}" for model, _ in scored for note in model.notes)
    of_classes = (match.note for _, match in scored if match.note)
    return tuple(dict.fromkeys((*chosen.notes, *of_models, *more, *of_classes)))


def _completed(found: Evaluations, request: EvalRequest, progress: Progress) -> Evaluations:
    """What is measured and written after the pass, where it was asked for."""
    if request.real_labels is not None:
        real = reassessed(found, request.real_labels)
        models = (replace(one, real=scores) for one, scores in zip(found.models, real, strict=True))
        found = replace(found, models=tuple(models))
    if request.throughput:
        dtype, built = AUTOCAST[request.mixed_precision], {id(one.built): one.built for one in found.models}
        costs = {}
        for index, (key, model) in enumerate(built.items()):

            def tell(stage: str, done: int, total: int, index: int = index) -> None:
                progress(stage, index * total + done, len(built) * total)

            costs[key] = measure_cost(model, dtype, tell)
        found = replace(found, models=tuple(replace(one, cost=costs[id(one.built)]) for one in found.models))
    if request.predictions is not None:
        found.write_predictions(expanded(request.predictions))
    return found
