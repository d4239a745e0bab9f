"""What a run is made of: data, models, objective, rehearsed before anything is trained."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.images import ImageData, Images, Split, Stream
from vitkd_cli.data.keyed import BatchSampler, Loader, updates_per_epoch, val_loader
from vitkd_cli.data.listing import read_split, root_of, written_down
from vitkd_cli.data.mixing import Mixing, mixing
from vitkd_cli.data.transforms import train_view, view_of
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics, measure
from vitkd_cli.evaluation.knn import knn
from vitkd_cli.evaluation.statistics import share_interval
from vitkd_cli.objective import Clock, Formula, Objective, Weight
from vitkd_cli.processes import heard
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Data, Recipe
from vitkd_cli.requests import Weights
from vitkd_cli.session import Session
from vitkd_cli.text import listed, nfc
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.training.rehearsal import Rehearsal, rehearse
from vitkd_cli.training.trainer import optimizer_of
from vitkd_cli.vit.build import build
from vitkd_cli.vit.construct import parse_kwargs
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import Resolved
from vitkd_cli.vit.spec import ViTSpec, as_seen_by, with_statistics

SPEED_SECONDS = 2.0  # for measuring images a second
FROM_SCRATCH_WANTS = 100_000  # images; below, a 300-epoch run from scratch is the wrong recipe

TUNING = "fine-tuning the teacher"


@dataclass(frozen=True)
class Cost:
    """What one model of a run takes, as far as a dry run can tell.

    Attributes:
        epoch, training, validation: seconds, without reading the images.
        disk: bytes at most while it trains.
        kept: bytes that it leaves.
    """

    title: str
    epoch: float
    training: float
    validation: float
    disk: int
    kept: int


@dataclass(frozen=True)
class Plan:
    """A rehearsed run: what ``--dry-run`` prints and the start-up says.

    Attributes:
        costs: of every model that is trained, in their order; none unless it is a dry run.
    """

    recipe: Recipe
    data: ImageData
    student: Model
    teacher: Model | None
    learner: Learner
    tapped: Teacher | None
    view: Callable[[Any], Tensor]
    rehearsal: Rehearsal
    updates_per_epoch: int
    updates: int
    costs: tuple[Cost, ...] = ()


def data_of(recipe: Recipe, formula: Formula, resumed: Path | None) -> ImageData:
    """What the recipe's data stands for; a resumed run finds the split that it made."""
    saved = resumed / "split.json" if resumed else None
    unscored = recipe.val_data or recipe.num_classes == 0  # nothing is held out that nobody will score
    data: ImageData = open_data(
        recipe.but(val_fraction=0.0) if unscored else recipe,
        seed=recipe.seed,
        split_files=read_split(saved) if saved and saved.is_file() else None,
        unlabelled=not formula.uses_labels and not recipe.finetune_teacher,
    )
    if data.train is None:
        raise UserError(
            f"{data.name} has no training images; it has{data.description.partition(':')[2]}",
            "put class folders into FOLDER/train, or name the split with --train-split",
        )
    by_neighbours = recipe.num_classes == 0 or not data.labelled
    if by_neighbours and recipe.eval_metric == "loss":
        raise UserError("eval_metric = 'loss': nearest neighbours have none", "--eval-metric top1")
    data = replace(data, by_neighbours=by_neighbours)
    if recipe.val_data is not None:
        data = _validated_on(recipe, data)
    if isinstance(data.train, Stream) and recipe.num_processes > 1:
        raise UserError(
            "a stream cannot be shared among processes image by image",
            "train in one process, or use a dataset with an index",
        )
    if by_neighbours and isinstance(data.bank, Stream):
        raise UserError(
            "nearest neighbours need images by index, not a stream", "--val-data FOLDER with class folders"
        )
    return data


def with_record(recipe: Recipe, data: ImageData) -> ImageData:
    """The data with a record of its images."""
    root, val_root = (
        root_of(place or "", recipe.data_dir) for place in (recipe.data, recipe.val_data or recipe.data)
    )
    return replace(data, record=written_down(data, root, val_root))


def _validated_on(recipe: Recipe, data: ImageData) -> ImageData:
    """The data with the images of ``--val-data`` in place of its own validation split."""
    splits = {"train_split": Data.train_split, "val_split": Data.val_split}
    own = recipe.but(**splits, data=recipe.val_data, val_fraction=0.0, num_classes=None, shots=None)
    # Without two splits of its own every image is scored by all the others.
    other: ImageData = open_data(own, seed=recipe.seed)
    val, bank = other.val or other.train, other.train or other.val
    if not data.by_neighbours and other.class_names != data.class_names:
        ours, theirs = ([nfc(name) for name in one.class_names or ()] for one in (data, other))
        if not isinstance(val, Images) or not theirs or not set(theirs) <= set(ours):
            raise UserError(
                f"{other.name} has other classes than {data.name}: {listed(theirs)}, not {listed(ours)}",
                "give both the same class folders",
            )
        val = val.relabelled(ours.index(theirs[label]) for label in val.labels())
    notes = (*data.notes, *(note for note in other.notes if note not in data.notes))
    return replace(data, val=val, bank=bank, notes=notes)


def warn_of_small_data(recipe: Recipe, data: ImageData, warn: Callable[[str], None]) -> None:
    """Say where a long run from scratch meets few images."""
    count = len(data.train) if data.train is not None else 0
    from_scratch = not (recipe.pretrained or recipe.initial_checkpoint)
    if from_scratch and recipe.epochs >= 300 and 0 < count < FROM_SCRATCH_WANTS:
        warn(
            f"{count:,} images are few for {recipe.epochs} epochs from scratch; "
            "--recipe finetune is meant for such data"
        )


def student_of(recipe: Recipe, name: Resolved, data: ImageData, seed: int) -> Model:
    """The student, from the same weights for every arm of a comparison."""

    def built(drop_path: float) -> Model:
        torch.manual_seed(seed)  # every arm of a comparison starts from the same weights
        return build(
            name,
            Weights(
                checkpoint=recipe.initial_checkpoint,
                pretrained=recipe.pretrained,
                use_ema=recipe.use_ema,
                verify=recipe.verify,
                img_size=recipe.img_size,
            ),
            num_classes=0 if recipe.num_classes == 0 else data.num_classes,
            kwargs=recipe.model_kwargs,
            file_flag="--initial-checkpoint",
            in_chans=recipe.in_chans,
            drop_path_rate=drop_path,
        )

    student = built(recipe.drop_path or 0.0)
    if recipe.drop_path is None and student.parameters >= 80e6:
        student = built(0.1)
    return replace(student, spec=with_statistics(student.spec, recipe.mean, recipe.std))


def teacher_of(recipe: Recipe, formula: Formula, name: Resolved, student: Model, data: ImageData) -> Model:
    """The teacher at the size at which it is used.

    Its own size where its logits are read; for features alone the size at which its grid is the
    student's, so that no feature is resampled.
    """

    random = not (recipe.teacher_pretrained or recipe.teacher_checkpoint)
    # Weights keep their own classes, unless they are tuned to the data's first.
    renew = recipe.finetune_teacher or (random and "num_classes" not in parse_kwargs(recipe.teacher_kwargs))

    def built(img_size: int | tuple[int, int] | None) -> Model:
        torch.manual_seed(recipe.seed)
        return build(
            name,
            Weights(
                checkpoint=recipe.teacher_checkpoint,
                pretrained=recipe.teacher_pretrained,
                use_ema=recipe.use_ema,
                verify=recipe.verify,
            ),
            num_classes=data.num_classes or None if renew else None,
            kwargs=recipe.teacher_kwargs,
            file_flag="--teacher-checkpoint",
            img_size=img_size,
            in_chans=recipe.in_chans,
        )

    teacher = built(recipe.teacher_img_size)
    if random and not recipe.finetune_teacher:
        teacher = replace(teacher, notes=(*teacher.notes, "the teacher's weights are random, as asked"))
    sized = recipe.teacher_img_size is not None or "img_size" in parse_kwargs(recipe.teacher_kwargs)
    if not sized and not formula.reads_teacher_logits and _another_grid(student.spec, teacher.spec):
        sides = zip(teacher.spec.input_size, teacher.spec.final_grid, student.spec.final_grid, strict=True)
        rows, columns = (size // grid * target for size, grid, target in sides)
        with contextlib.suppress(UserError):  # it takes no other size: its features are resampled
            resized = built((rows, columns))
            if resized.spec.final_grid == student.spec.final_grid:
                teacher = resized
    if len(teacher.spec.mean) != len(student.spec.mean):
        raise UserError(
            f"the teacher takes {len(teacher.spec.mean)} image channels, the student "
            f"{len(student.spec.mean)}",
            "--in-chans sets both",
        )
    return teacher


def _another_grid(student: ViTSpec, teacher: ViTSpec) -> bool:
    """Could another image size give the teacher the student's grid? Stages pair by stride as they are."""
    same_kind = student.hierarchical == teacher.hierarchical
    return (
        same_kind
        and (0, 0) not in (student.final_grid, teacher.final_grid)
        and (student.final_grid != teacher.final_grid)
    )


def without_teacher(formula: Formula) -> Formula:
    """The baseline's objective: the label terms at full weight, all the time."""
    from vitkd_cli.terms import registered_terms

    own = [s for s in formula.summands if not registered_terms()[s.name].uses_teacher]
    if not own:
        raise UserError(
            f"--baseline: nothing of {formula} is left without a teacher", 'add labels, such as "labels + …"'
        )
    return Formula(tuple(replace(s, weight=Weight()) for s in own))


def rehearsed(
    recipe: Recipe,
    formula: Formula,
    data: ImageData,
    student: Model,
    teacher: Model | None,
    session: Session,
    timed: bool = False,
) -> Plan:
    """Build objective and learner, prove them on a batch of noise, and count what the run will take."""
    count = len(data.train) if data.train is not None else 0
    per_epoch, updates = length_of(recipe, data.train)
    # Too few images for one batch, or an odd batch that cannot be mixed, is refused before the training.
    BatchSampler(
        count,
        recipe.batch,
        seed=0,
        accum=recipe.grad_accum_steps,
        world=recipe.num_processes,
        mirrored=mixing_of(recipe, data) is not None,
    )
    torch.manual_seed(recipe.seed)
    # As for the learning rate, --steps stops a schedule and does not shorten it.
    clock = Clock(per_epoch * (recipe.epochs + recipe.cooldown_epochs), per_epoch)
    objective = Objective(formula, student.spec, teacher.spec if teacher else None, clock)
    learner = Learner(student.net, objective, student.spec).to(session.device, session.dtype)
    if recipe.channels_last:
        learner = learner.to(memory_format=torch.channels_last)
    tapped = None
    if teacher:
        tapped = Teacher(teacher, objective.teacher_taps, compiled=recipe.torchcompile)
        tapped.to(session.device, session.dtype)
    size = _crop(student, teacher)
    images = 2 if not timed else min(recipe.batch, 8)
    rehearsal = rehearse(
        learner, tapped, size=size, device=session.device, dtype=session.dtype, images=images
    )
    # The names and options of optimizer, scheduler and validation view are checked here, too.
    optimizer_of(recipe, learner, per_epoch)
    if validation_of(recipe, student, data, session) is None and recipe.select == "best":
        raise UserError("select = 'best' needs a validation split", "--val-fraction 0.1, or --select last")
    costs: tuple[Cost, ...] = ()
    if timed:
        seconds = _least_seconds(
            lambda: rehearse(
                learner, tapped, size=size, device=session.device, dtype=session.dtype, images=images
            )
        )
        epoch = seconds / images * recipe.device_batch * per_epoch
        weights, own = _bytes(learner), _bytes(student.net)
        checkpoint = weights * (4 if recipe.model_ema else 3)  # AdamW's two moments, and the average
        left = own + (own if data.val is not None else 0)  # the student, and the best on validation
        costs = (
            Cost(
                "",
                epoch,
                epoch * updates / per_epoch,
                scoring_seconds(student, data, session)
                * (math.ceil(updates / per_epoch / recipe.val_interval) + 1),
                left + checkpoint * (recipe.checkpoint_hist + 1),
                left + (checkpoint * recipe.checkpoint_hist if recipe.keep_checkpoints else weights),
            ),
        )
    return Plan(
        recipe,
        data,
        student,
        teacher,
        learner,
        tapped,
        train_view_of(recipe, student, teacher),
        rehearsal,
        per_epoch,
        updates,
        costs,
    )


def scoring_seconds(built: Model, data: ImageData, session: Session) -> float:
    """Seconds that a model takes for the validation split, without reading the images."""
    if data.val is None:
        return 0.0
    count = len(data.val) + (len(data.bank) if data.bank is not None and data.bank is not data.val else 0)
    noise = torch.rand(8, len(built.spec.mean), *built.spec.input_size).to(session.device, session.dtype)
    model = built.net.to(session.device, session.dtype)
    training = model.training
    model.eval()
    with torch.inference_mode():
        seconds = _least_seconds(lambda: model(noise))
    model.train(training)
    return seconds / len(noise) * count / session.accelerator.num_processes


def _least_seconds(act: Callable[[], Any]) -> float:
    """The shortest of three times."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def length_of(recipe: Recipe, images: Split | None) -> tuple[int, int]:
    """Updates of an epoch, and of the run."""
    per_epoch = updates_per_epoch(len(images) if images is not None else 0, recipe.global_batch)
    updates = per_epoch * (recipe.epochs + recipe.cooldown_epochs)
    return per_epoch, min(updates, recipe.steps or updates)


def _crop(student: Model, teacher: Model | None) -> tuple[int, int]:
    """Crops are made at the larger of both sizes and shrunk for the other."""
    sizes = [student.spec.input_size] + ([teacher.spec.input_size] if teacher else [])
    return max(s[0] for s in sizes), max(s[1] for s in sizes)


def train_view_of(recipe: Recipe, student: Model, teacher: Model | None) -> Callable[[Any], Tensor]:
    """Random views of the training images, for both models."""
    return train_view(_crop(student, teacher), recipe, student.spec.mean, student.spec.std)


def mixing_of(recipe: Recipe, data: ImageData) -> Mixing | None:
    """Mixup and cutmix, if the recipe has any."""
    return mixing(recipe, data.num_classes)


def preprocessing_for(recipe: Recipe, built: Model) -> dict[str, Any]:
    """timm's evaluation preprocessing of a model, as the recipe changes it."""
    spec = built.spec
    return built.prepared(
        input_size=(len(spec.mean), *spec.input_size),
        crop_pct=recipe.crop_pct,
        interpolation=recipe.interpolation,
        mean=spec.mean,
        std=spec.std,
    ).preprocessing


def validation_of(
    recipe: Recipe, built: Model, data: ImageData, session: Session
) -> Callable[[nn.Module, Reporter], Metrics] | None:
    """A function that scores a model of this architecture on the validation split."""
    spec, bank = built.spec, data.bank
    fits = bank is not None and spec.embed_dim if data.by_neighbours else spec.num_classes == data.num_classes
    if data.val is None or not fits:
        return None
    images = data.val
    view = view_of(preprocessing_for(recipe, built))
    accelerator = session.accelerator

    def score(model: nn.Module, reporter: Reporter) -> Metrics:
        def share(images: Split) -> tuple[Loader, int]:
            """This process's share of the images, and how many there are in all."""
            loader = val_loader(
                images,
                view,
                recipe.validation_batch_size or recipe.batch,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                workers=min(recipe.workers, os.cpu_count() or 1),
                pin_memory=session.device.type == "cuda",
            )
            return loader, len(images)

        training = model.training
        model.eval()
        done = 0

        def each(count: int) -> None:
            nonlocal done
            heard("a validation")
            done += count * accelerator.num_processes
            reporter.advance(min(done, total))

        def logits(batch: Tensor) -> Tensor:
            with accelerator.autocast():
                return model(as_seen_by(spec, batch.to(session.dtype)))

        def embedding(batch: Tensor) -> Tensor:
            with accelerator.autocast():
                final = model.forward_features(as_seen_by(spec, batch.to(session.dtype)))  # type: ignore[operator]
                return model.forward_head(final, pre_logits=True)  # type: ignore[operator]

        common: dict[str, Any] = {
            "device": session.device,
            "reduce": lambda tensor: accelerator.reduce(tensor, "sum"),
            "each": each,
        }
        queries = None if bank is images else images
        total = len(images) + (len(bank) if bank is not None and data.by_neighbours and queries else 0)
        with reporter.bar("validation", total):
            if data.by_neighbours and bank is not None:
                metrics = knn(
                    embedding,
                    share(bank),
                    share(queries) if queries else None,
                    width=spec.embed_dim,
                    **common,
                )
            else:
                metrics = measure(logits, *share(images), **common)
        model.train(training)
        return metrics

    return score


def doubt_about(
    teacher: Metrics, recipe: Recipe, student: Model, data: ImageData, session: Session
) -> str | None:
    """Why a teacher may have little to teach: it is at chance, or no better than the student at its start."""
    cure = "--finetune-teacher with more epochs" if recipe.finetune_teacher else "--finetune-teacher N"
    little = f"there is little to learn from it; {cure} trains it on these images"
    most = 100 * float(teacher.labels.bincount().max()) / teacher.count
    if share_interval(int(teacher.right.sum()), teacher.count)[0] <= most:
        guess = f"always saying the most common class has {most:.2f}"
        return f"the teacher is at chance: its top-1 is {teacher.top1:.2f}, {guess}: {little}"
    score = validation_of(recipe, student, data, session)
    if score is None or not (recipe.pretrained or recipe.initial_checkpoint):
        return None
    start = score(student.net, session.reporter).top1
    if teacher.top1 > start:
        return None
    return f"the teacher's top-1 is {teacher.top1:.2f}, and the student begins at {start:.2f}: {little}"


@torch.inference_mode()
def images_per_second(model: nn.Module, built: Model, session: Session) -> tuple[float, int]:
    """Speed of a model alone on noise, and the batch that it was measured with: the best of two seconds.

    All models of an architecture have the first one's; ``vitkd eval --throughput`` is precise.
    """
    spec = built.spec
    architecture = (type(model), spec.depth, spec.input_size, sum(p.numel() for p in model.parameters()))
    if architecture in session.speeds:
        return session.speeds[architecture]
    training, end = model.training, time.perf_counter() + SPEED_SECONDS
    model.eval()

    def seconds(batch: int) -> float:
        noise = torch.rand(batch, len(spec.mean), *spec.input_size).to(session.device, session.dtype)
        start = time.perf_counter()
        model(noise)
        if session.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def left() -> float:
        return end - time.perf_counter()

    one = seconds(1)  # the first call sets things up; it counts where there is no time for a second
    if one < left():
        one = seconds(1)
    batch = 1
    while batch < 32 and 4 * 2 * batch * one < left():
        batch *= 2
    best, passes = (one, 1) if batch == 1 else (seconds(batch), 1)
    while passes < 6 and best < left():
        best, passes = min(best, seconds(batch)), passes + 1
    model.train(training)
    session.speeds[architecture] = batch / best, batch
    return session.speeds[architecture]
