"""The models of a run, opened again: what they cost, and teacher and student to look at."""

from dataclasses import dataclass
from pathlib import Path

from vitkd_cli.data.images import ImageData
from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.cost import latency
from vitkd_cli.report.found import FoundRun, attempted
from vitkd_cli.training import Result
from vitkd_cli.training.arms import written_arms
from vitkd_cli.training.models import teacher_of
from vitkd_cli.training.teachers import Teachers
from vitkd_cli.vit.build import open_model, weights_at_hand
from vitkd_cli.vit.model import Model


@dataclass(frozen=True)
class OpenedModel:
    """A model of a run and what it costs.

    Attributes:
        multiply_adds: of one image.
        weights: bytes of its file; None where it has none of its own.
        latency: milliseconds from one image to its answer, the median, on this machine.
    """

    model: Model
    multiply_adds: int
    weights: int | None
    latency: float


@dataclass(frozen=True)
class Opened:
    """Teacher and student of a run, and why one is missing; the student stands for all arms."""

    teacher: OpenedModel | None = None
    student: OpenedModel | None = None
    notes: tuple[str, ...] = ()


def opened(found: FoundRun, data: ImageData | None) -> Opened:
    """Open the student of the first arm, and the run's teacher if its weights are at hand."""
    first = next(iter(found.run.results), None)
    student, why = attempted("The student was not opened", lambda: _student(found, first))
    if found.recipe.teacher is None:
        teacher, why_not = None, ""
    else:
        teacher, why_not = attempted("The teacher was not opened", lambda: _teacher(found, student, data))
    return Opened(teacher, student, tuple(filter(None, (why, why_not))))


def _student(found: FoundRun, first: Result | None) -> OpenedModel:
    if first is None:
        raise UserError("none is trained yet")
    return _measured(open_model(f"local-dir:{first.student}"), first.student)


def _teacher(found: FoundRun, student: OpenedModel | None, data: ImageData | None) -> OpenedModel | None:
    """The fine-tuned teacher, or the one that the recipe names; None for a run that reads none."""
    tuned = found.folder / "teacher" / "student"
    if (tuned / "config.json").is_file():
        return _measured(open_model(f"local-dir:{tuned}"), tuned)
    written = written_arms(found.recipe)
    if not any(arm.formula.uses_teacher for arm in written):
        return None
    if found.recipe.finetune_teacher:
        raise UserError("it is not fine-tuned yet, or its folder is gone")
    if student is None or data is None:
        raise UserError("its size follows from the student and the images, and one of them is not there")
    one = next(iter(Teachers(found.recipe, written, found.folder, data.num_classes if data.labelled else 0)))
    of_its_name = one.recipe.teacher_pretrained and one.recipe.teacher_checkpoint is None
    if of_its_name and not weights_at_hand(one.name):
        raise UserError("its weights are not in the Hub's cache, and a report downloads nothing")
    return _measured(teacher_of(one.recipe, max(one.uses), one.name, student.model, data), None)


def _measured(model: Model, folder: Path | None) -> OpenedModel:
    model = model.to(device_named(None))
    model.net.eval()
    weights = None if folder is None else (folder / "model.safetensors").stat().st_size
    median, _ = latency(model)
    return OpenedModel(model, model.multiply_adds, weights, median)
