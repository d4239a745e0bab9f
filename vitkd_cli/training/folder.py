"""The run folder: what is in it, and when a run may have it."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from vitkd_cli.data import ImageData
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Recipe

# Everything that a run writes into its folder.
OURS = (
    "recipe.toml",
    "split.json",
    "log.jsonl",
    "checkpoints",
    "student",
    "student[-.]*",  # what vitkd export left beside it
    "teacher",
    "skipped.txt",
    "result.json",
    "run.json",
    "curves.png",
    "attention",  # of the demo, as was attention.png
    "attention.png",
    "vitkd",  # where trackers such as TensorBoard write
    "distilled-*",
    "alone-*",
    "student-*",
    ".student",  # half written when it was killed
)


@dataclass(frozen=True)
class Result:
    """One trained model.

    Attributes:
        arm: ``distilled``, ``alone`` or ``teacher``.
        folder: its run folder; its student lies in ``folder/student``.
        top1, top5: percent on the validation split; None where there is none.
        agreement: percent of validation images on which it names the teacher's class.
        images_per_second: of the model alone, on the run's device.
        images: in the validation split.
        history: one entry a validation.
    """

    arm: str
    seed: int
    folder: str
    model: str
    parameters: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    agreement: float | None = None
    images_per_second: float | None = None
    images: int | None = None
    skipped_images: int = 0
    history: tuple[dict[str, Any], ...] = ()

    @property
    def student(self) -> Path:
        return Path(self.folder) / "student"


@dataclass(frozen=True)
class Run:
    """What a run leaves.

    Attributes:
        folder: the run folder.
        results: one a trained student, in the order of training.
        teacher: the teacher's own figures; None without a teacher, or if its classes are not the data's.
    """

    folder: Path
    recipe: Recipe
    results: tuple[Result, ...]
    teacher: Result | None

    @property
    def student(self) -> Path:
        """The student's folder: ``timm.create_model(f"local-dir:{run.student}", pretrained=True)``."""
        return self.folder / "student"


def new_folder(recipe: Recipe) -> str:
    """A name that no run has yet: runs/TEACHER-STUDENT-TIME."""

    def short(name: str | None) -> str:
        return Path((name or "alone").rpartition(":")[2]).name.partition(".")[0]

    return f"runs/{short(recipe.teacher)}-{short(recipe.student)}-{time.strftime('%Y%m%d-%H%M%S')}"


def check_folder(folder: Path, overwrite: bool, recipe: Recipe) -> None:
    """Refuse a folder that holds what a new run would destroy.

    ``--overwrite`` gives away a run, and nothing beside it.
    """
    if folder.is_file():
        raise UserError(f"--output {folder} is a file", "name a folder")
    for key in (
        "data",
        "val_data",
        "data_dir",
        "teacher",
        "student",
        "teacher_checkpoint",
        "initial_checkpoint",
    ):
        value = str(getattr(recipe, key) or "").removeprefix("local-dir:")
        path = Path(value).expanduser()
        if value and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--output {folder} holds what this run reads ({key})", "name another folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if not held:
        return
    strangers = [name for name in held if not any(fnmatch(name, ours) for ours in OURS)]
    is_run = not strangers and _is_written_by_us(folder / "recipe.toml")
    if is_run and not any(folder.rglob("*.safetensors")):
        return  # a run that never came to anything
    if not overwrite:
        more = f", --resume {folder} goes on" if is_run else ""
        raise UserError(f"{folder} is not empty", f"--overwrite replaces a run{more}")
    if not is_run:
        named = f" ({strangers[0]})" if strangers else ""
        raise UserError(f"{folder} holds something that is no run{named}; it was not touched", "name another")


def _is_written_by_us(recipe: Path) -> bool:
    # A person's recipe.toml carries no schema number, and is not ours to replace.
    return recipe.is_file() and recipe.read_text().startswith("schema = ")


def open_folder(folder: Path, recipe: Recipe, data: ImageData, resume: bool) -> None:
    """Make the run folder, with the recipe and the split in it."""
    try:
        if folder.is_dir() and not resume:
            shutil.rmtree(folder)  # what check_folder let pass
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot make {folder}: {problem.strerror}", "--output FOLDER") from None
    if data.split_files:
        write_json(folder / "split.json", data.split_files)
    beside = folder / ".recipe.toml"
    beside.write_text(recipe.to_toml())
    os.replace(beside, folder / "recipe.toml")


def copy_student(source: Path, target: Path) -> None:
    """Copy a student's folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)


def write_json(path: Path, content: Any) -> None:
    """Write beside and rename: a reader sees the old content or the new."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(content, indent=1))
    os.replace(beside, path)


def write_run(run: Run) -> None:
    """``run.json`` is written last: where it is, the run is finished."""
    content = {
        # Relative, so that a run may be moved.
        "results": [
            {**asdict(result), "folder": os.path.relpath(result.folder, run.folder)} for result in run.results
        ],
        "teacher": asdict(run.teacher) if run.teacher else None,
    }
    write_json(run.folder / "run.json", content)


def finished_run(folder: Path, recipe: Recipe) -> Run | None:
    """The run that a folder holds; None if it has not come to its end."""
    if not (folder / "run.json").is_file():
        return None
    content = json.loads((folder / "run.json").read_text())
    results = tuple(read_result(result, folder / result["folder"]) for result in content["results"])
    teacher = read_result(content["teacher"], folder / "teacher") if content["teacher"] else None
    return Run(folder, recipe, results, teacher)


def read_result(content: dict[str, Any], folder: Path) -> Result:
    """A result as it was written; its folder is where it lies now."""
    return Result(**{**content, "history": tuple(content["history"]), "folder": str(folder)})
