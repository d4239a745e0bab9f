"""The models of a run: their weights, sizes and classes."""

import contextlib
import re
from dataclasses import replace
from typing import Any

import torch

from vitkd_cli.data.images import ImageData
from vitkd_cli.errors import UserError
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.requests import Weights
from vitkd_cli.vit.build import build
from vitkd_cli.vit.classes import match_classes
from vitkd_cli.vit.construct import parse_kwargs
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import Resolved
from vitkd_cli.vit.spec import ViTSpec


def student_of(recipe: Recipe, name: Resolved, data: ImageData) -> Model:
    """The student, which starts from the same weights in every arm of a seed."""

    def built(drop_path: float) -> Model:
        return _built(
            recipe,
            name,
            recipe.initial_checkpoint,
            recipe.pretrained,
            num_classes=0 if recipe.num_classes == 0 else data.num_classes,
            kwargs=recipe.model_kwargs,
            file_flag="--initial-checkpoint",
            img_size=recipe.img_size,
            drop_path_rate=drop_path,
        )

    student = built(recipe.drop_path or 0.0)
    if recipe.drop_path is None and student.parameters >= 80e6:
        student = built(0.1)
    spec = student.spec
    return student.prepared(
        input_size=(len(spec.mean), *spec.input_size),
        crop_pct=recipe.crop_pct,
        interpolation=recipe.interpolation,
        mean=recipe.mean or spec.mean,
        std=recipe.std or spec.std,
    )


def teacher_of(recipe: Recipe, reads_logits: bool, name: Resolved, student: Model, data: ImageData) -> Model:
    """The teacher at the size at which it is used.

    Its own size where its logits are read; for features alone the size at which its grid is the
    student's, so that no feature is resampled.
    """
    random = not (recipe.teacher_pretrained or recipe.teacher_checkpoint)
    # Weights keep their own classes, unless they are tuned to the data's first.
    renew = recipe.finetune_teacher or (random and "num_classes" not in parse_kwargs(recipe.teacher_kwargs))

    def built(img_size: int | tuple[int, int] | None) -> Model:
        return _built(
            recipe,
            name,
            recipe.teacher_checkpoint,
            recipe.teacher_pretrained,
            num_classes=data.num_classes or None if renew else None,
            kwargs=recipe.teacher_kwargs,
            file_flag="--teacher-checkpoint",
            img_size=img_size,
        )

    teacher = built(recipe.teacher_img_size)
    if random and not recipe.finetune_teacher:
        teacher = replace(teacher, notes=(*teacher.notes, "the teacher's weights are random, as asked"))
    sized = recipe.teacher_img_size is not None or "img_size" in parse_kwargs(recipe.teacher_kwargs)
    if not sized and not reads_logits and _another_grid(student.spec, teacher.spec):
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


def _built(recipe: Recipe, name: Resolved, checkpoint: str | None, pretrained: bool, **options: Any) -> Model:
    """A model with its weights; what is random in it hangs on the recipe's seed alone."""
    torch.manual_seed(recipe.seed)
    weights = Weights(
        checkpoint=checkpoint, pretrained=pretrained, use_ema=recipe.use_ema, verify=recipe.verify
    )
    return build(name, weights, in_chans=recipe.in_chans, **options)


def _another_grid(student: ViTSpec, teacher: ViTSpec) -> bool:
    """Could another image size give the teacher the student's grid? Stages pair by stride as they are."""
    grids = {student.final_grid, teacher.final_grid}
    return student.hierarchical == teacher.hierarchical and len(grids) == 2 and (0, 0) not in grids


def tuning_of(recipe: Recipe, images: int, tuned_on: int) -> Recipe:
    """The recipe by which a teacher is fine-tuned.

    Args:
        images: that the students train on.
        tuned_on: images that the teacher trains on.
    """
    weights = recipe.teacher_checkpoint
    return recipe.refitted(images, tuned_on).but(
        student=recipe.teacher,
        pretrained=recipe.teacher_pretrained and weights is None,
        initial_checkpoint=weights,
        use_ema=recipe.use_ema and weights is not None,
        model_kwargs=recipe.teacher_kwargs,
        img_size=recipe.teacher_img_size,
        epochs=recipe.finetune_teacher,
        cached_epochs=None,
        steps=None,
        loss="labels",
        warmup_epochs=None,
        mixup_off_epoch=0,
        # What is pretrained should move least where it is most general (Clark et al. 2020).
        layer_decay=0.75 if recipe.teacher_pretrained or weights else None,
        model_ema=False,
        select="last",
        drop_path=None,
        mean=None,
        std=None,
    )


def tuned(recipe: Recipe, folder: str) -> Recipe:
    """The recipe with its teacher fine-tuned, in ``folder``."""
    return recipe.but(
        teacher=folder,
        teacher_kwargs=None,
        teacher_checkpoint=None,
        teacher_pretrained=True,
        use_ema=False,
        finetune_teacher=0,
    )


def classes_of_teacher(recipe: Recipe, name: Resolved) -> int:
    """How many classes a student has that learns a teacher's logits from unlabelled images."""
    own = recipe.teacher_pretrained and recipe.teacher_checkpoint is None
    classes = parse_kwargs(recipe.teacher_kwargs).get("num_classes", name.num_classes if own else None)
    if not classes:
        raise UserError(
            "the images have no labels, so the teacher's classes decide, and they are not known beforehand",
            "--num-classes N, as many as the teacher has",
        )
    return int(classes)


def with_classes_of(data: ImageData, teacher: Model, reporter: Reporter) -> Model:
    """The teacher with the data's classes alone and in their order, where it knows them by name."""
    ours, count = data.class_names, teacher.spec.num_classes
    if not ours or not count:
        return teacher
    match = match_classes(
        teacher,
        ours,
        data.name,
        cure='--finetune-teacher N, or --loss "labels + vitkd", or --class-map FILE without those classes',
    )
    if match.indices is None:
        if match.note:
            reporter.warn(match.note)
        return teacher
    by = "synset" if re.fullmatch(r"n\d{8}", ours[0]) else "name"
    change = "put into the data's order" if len(ours) == count else f"narrowed to the data's {len(ours)}"
    reporter.say(f"teacher  its {count} classes {change} by {by}")
    return teacher.with_classes(match.indices[: len(ours)], ours)


def origin(name: Resolved, pretrained: bool, checkpoint: str | None) -> str:
    """What was typed → what it is, and where its weights come from."""
    if pretrained and checkpoint is None:
        return name.line()
    chosen = name.architecture or name.name
    arrow = "" if name.typed == chosen else f"{name.typed} → "
    return f"{arrow}{chosen} ({f'weights of {checkpoint}' if checkpoint else 'from scratch'})"
