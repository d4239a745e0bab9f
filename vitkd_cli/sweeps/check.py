"""Every point, rehearsed on the CPU with random weights before the first one trains."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitkd_cli.data.images import ImageData
from vitkd_cli.data.keyed import updates_per_epoch
from vitkd_cli.errors import UserError
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.sweeps.points import Point
from vitkd_cli.training.arms import checked_arms
from vitkd_cli.training.data import data_of
from vitkd_cli.training.models import student_of, teacher_of
from vitkd_cli.training.plan import Arm, rehearsed
from vitkd_cli.training.teachers import Teachers
from vitkd_cli.vit.names import resolve

_ON_THE_CPU: dict[str, Any] = {
    "device": "cpu",
    "mixed_precision": "no",
    "torchcompile": False,
    "num_processes": 1,
    "log_with": None,
    "output": None,
    "pretrained": False,
    "initial_checkpoint": None,
    "teacher_pretrained": False,
    "teacher_checkpoint": None,
    "use_ema": False,
}


def rehearse_all(points: Sequence[Point], reporter: Reporter) -> dict[str, int]:
    """Prove every point's models, formula, optimiser and batches on a batch of noise.

    What only its own weights or images could show is left to the run itself.

    Returns:
        Updates in an epoch, by the point's name.

    Raises:
        UserError: one is refused, or there is nothing to compare points by; names the point.
    """
    images: dict[tuple[Any, ...], ImageData] = {}
    per_epoch = {}
    with reporter.bar("rehearsing", len(points)) as bar:
        for done, point in enumerate(points):
            bar.advance(done, point.name)
            try:
                per_epoch[point.name] = _rehearse(point.recipe, images)
            except UserError as problem:
                raise UserError(f"{problem.message} (the point {point.name})", problem.hint) from None
    return per_epoch


def _rehearse(recipe: Recipe, images: dict[tuple[Any, ...], ImageData]) -> int:
    arms = checked_arms(recipe)
    labelled = any(arm.formula.uses_labels for arm in arms) or bool(recipe.finetune_teacher)
    read = recipe.train_split, recipe.shots, labelled
    if read not in images:
        images[read] = data_of(recipe, labelled, None)
    data = images[read]
    assert data.train is not None
    if data.val is None:
        raise UserError(
            "the data has no validation split, so nothing tells one point from another",
            "--val-fraction 0.1, or --val-data FOLDER",
        )
    fitted, _ = recipe.fitted(len(data.train))
    own = fitted.but(**_ON_THE_CPU)
    name, session = resolve(recipe.student or "", role="student"), Session(own, None)
    teachers = Teachers(own, arms, Path(), data.num_classes)
    for arm in (arm for arm in arms if arm.name != "alone"):  # whose terms are among the first one's
        changed = own.but(**{**arm.changes, **_ON_THE_CPU})
        student, teacher = student_of(changed, name, data), None
        if taught := teachers.of(arm):
            asked = taught.recipe.but(**_ON_THE_CPU)
            teacher = teacher_of(asked, arm.formula.reads_teacher_logits, taught.name, student, data)
        rehearsed(Arm(arm, name, changed, Path(), data.train), student, teacher, data, session)
    return updates_per_epoch(len(data.train), fitted.global_batch)
