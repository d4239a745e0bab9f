"""The run folder: what is in it, and when a run may have it."""

import os
import platform
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import psutil
from filelock import FileLock, Timeout

from vitkd_cli.data.images import ImageData
from vitkd_cli.data.listing import differences, read_record
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.evaluation import Metrics
from vitkd_cli.evaluation.cache import read_rows
from vitkd_cli.evaluation.contrasts import Contrast, Scores, contrasts
from vitkd_cli.evaluation.statistics import MIN_SEEDS, share_interval, spread
from vitkd_cli.files import (
    damaged,
    is_leftover,
    read_sealed,
    remove,
    repair,
    saving,
    whole_folder,
    write_json,
    write_sealed,
    write_text,
)
from vitkd_cli.recipe import Recipe
from vitkd_cli.text import folder_in, html_table

Made = TypeVar("Made")

LOCK = ".lock"
# What a run can be resumed with more of.
EXTENSIONS = ("epochs", "steps", "seeds", "baseline", "against")

# Everything that a run writes into its folder.
OURS = (
    *("recipe.toml", "split.json", "data.json", "scan.json", "log.jsonl", "checkpoints", "skipped.txt"),
    *("student", "teacher", "arms", "distilled-*", "alone-*", "student-*", "answers.safetensors"),
    *("result.json", "run.json", "curves.png", "report.html"),
    "student[-.]*",  # what vitkd export left beside it
    "attention",  # of the demo, as was attention.png
    "attention.png",
    "vitkd",  # where trackers such as TensorBoard write
)


@dataclass(frozen=True)
class Result:
    """One trained model.

    Attributes:
        arm: ``distilled``, ``alone``, ``student``, ``teacher``, or the name of an arm of ``--against``.
        folder: its run folder; its student lies in ``folder/student``.
        top1, top5: percent on the validation split; None where there is none.
        agreement: percent of validation images on which it names the teacher's class.
        images_per_second: of the model alone, on the run's device, in batches of ``speed_batch``.
        images: in the validation split.
        updates: how many it was trained for.
        history: one entry per validation.
        taught_by: the title of its teacher's figures; None without a teacher, and in what earlier versions
            wrote.
        data_wait: share of the training's time that the device waited for images, since it last began.
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
    speed_batch: int | None = None
    skipped_images: int = 0
    updates: int | None = None
    history: tuple[dict[str, Any], ...] = ()
    taught_by: str | None = None
    data_wait: float | None = None

    @property
    def student(self) -> Path:
        return Path(self.folder) / "student"

    @property
    def answers(self) -> Path:
        """The file of :attr:`metrics`."""
        return Path(self.folder) / "answers.safetensors"

    @property
    def metrics(self) -> Metrics | None:
        """What it said of each validation image, read anew; None where that is not kept, or damaged."""
        rows = read_rows(self.answers)
        return None if rows is None else Metrics.from_rows(rows)

    @property
    def top1_interval(self) -> tuple[float, float] | None:
        """95 % interval of top-1 for other images like these; None without images."""
        if self.top1 is None or not self.images:
            return None
        return share_interval(round(self.top1 * self.images / 100), self.images)

    def facts(self, folder: str) -> dict[str, Any]:
        """Its figures, as JSON has them.

        Args:
            folder: its run folder, from where they are written; so that a run may be moved.
        """
        low, high = self.top1_interval or (None, None)
        return {**asdict(self), "top1_low": low, "top1_high": high, "folder": folder}

    def write(self) -> None:
        """Write ``result.json``, last of a student's files."""
        write_sealed(Path(self.folder) / "result.json", self.facts("."))

    @classmethod
    def read(cls, folder: Path, updates: int, verify: bool, warn: Callable[[str], None]) -> Self | None:
        """The result that a student's run folder holds; None if it has not come to its end."""
        content = _read(folder / "result.json", warn, lambda content: cls.of(content, folder))
        whole = content and content.updates in (None, updates) and not _wrong_with(content.student, verify)
        return content if whole else None

    @classmethod
    def of(cls, content: Mapping[str, Any], folder: Path) -> Self:
        """From JSON; its folder is where it lies now."""
        own = {key: value for key, value in content.items() if key not in ("top1_low", "top1_high")}
        return cls(**{**own, "history": tuple(content["history"]), "folder": str(folder)})


@dataclass(frozen=True)
class Run:
    """What a run leaves.

    Attributes:
        folder: the run folder.
        results: one per trained student, in the order of training.
        teacher: the teacher's own figures; None without a teacher, or if its classes are not the data's.
        more_teachers: those of other arms.
    """

    folder: Path
    recipe: Recipe
    results: tuple[Result, ...]
    teacher: Result | None
    more_teachers: tuple[Result, ...] = ()

    @property
    def student(self) -> Path:
        """The student's folder: ``timm.create_model(f"local-dir:{run.student}", pretrained=True)``."""
        return self.folder / "student"

    def write(self) -> None:
        """Write ``run.json``, last of all: where it is, the run is finished. Its student is the first one."""
        if (first := self.results[0].student) != self.student:
            with whole_folder(self.student) as beside:
                shutil.copytree(first, beside, dirs_exist_ok=True)

        def entry(result: Result) -> dict[str, Any]:
            return result.facts(os.path.relpath(result.folder, self.folder))

        content = {
            "results": [entry(result) for result in self.results],
            "teacher": entry(self.teacher) if self.teacher else None,
            "more_teachers": [entry(result) for result in self.more_teachers],
            "arms": [arm_facts(name, results) for name, results in self.arms.items()],
            "comparisons": [found.facts() for found in self.contrasts],
            "asked": _asked(self.recipe),
        }
        write_sealed(self.folder / "run.json", content)

    @property
    def arms(self) -> dict[str, list[Result]]:
        """The students of each arm, the run's own first."""
        arms: dict[str, list[Result]] = {}
        for result in self.results:
            arms.setdefault(result.arm, []).append(result)
        return arms

    @property
    def own(self) -> list[Result]:
        """The students of the run's own arm."""
        return next(iter(self.arms.values()), [])

    @cached_property
    def contrasts(self) -> list[Contrast]:
        """The run's own arm beside each of the others."""
        scores = {arm: scores_of(results) for arm, results in self.arms.items()}
        return contrasts(scores, self.results[0].images)

    @classmethod
    def read(cls, folder: Path, recipe: Recipe, warn: Callable[[str], None]) -> Self | None:
        """The run that a folder holds; None if it has not come to the end that the recipe asks for."""
        asked = _asked(recipe)

        found: tuple[Self, Any] | None = _read(
            folder / "run.json", warn, lambda content: (cls.of(content, folder, recipe), content["asked"])
        )
        if found is None:
            return None
        run, told = found
        for student in (run.student, *(result.student for result in run.results)):
            if wrong := _wrong_with(student, recipe.verify):
                warn(f"{student} is {wrong}: it is written anew")
                return None
        return run if told == asked else None

    @classmethod
    def of(cls, content: Mapping[str, Any], folder: Path, recipe: Recipe) -> Self:
        """From ``run.json``, whatever became of the students' folders since."""
        results, more = (
            tuple(Result.of(result, folder / result["folder"]) for result in content.get(key, ()))
            for key in ("results", "more_teachers")
        )
        teacher = Result.of(content["teacher"], folder / "teacher") if content["teacher"] else None
        return cls(folder, recipe, results, teacher, more)

    def __repr__(self) -> str:
        every = ", ".join(f"{result.arm} {_percent(result.top1)}" for result in self._lines())
        return f"Run({str(self.folder)!r}: {every})"

    def _repr_html_(self) -> str:
        titles = ["", "seed", "model", "top-1", "top-5", "parameters"]
        rows = [
            [r.arm, r.seed, r.model, _percent(r.top1), _percent(r.top5), f"{r.parameters:,}"]
            for r in self._lines()
        ]
        return html_table(titles, rows)

    def _lines(self) -> list[Result]:
        return [*([self.teacher] if self.teacher else []), *self.more_teachers, *self.results]


def student_folders(run: Path) -> list[Path]:
    """Where a run may have its students: its own folder, if it is of one, and those in it."""
    return [run, *sorted(run.glob("*-[0-9]*")), *sorted(run.glob("arms/*-[0-9]*"))]


def scores_of(results: Sequence[Result]) -> Scores:
    """The figures of an arm's students, and their answers as far as they were kept."""
    said = {result.seed: result.metrics for result in results}
    right = {seed: metrics.right.numpy() for seed, metrics in said.items() if metrics is not None}
    return Scores({r.seed: r.top1 for r in results if r.top1 is not None}, right)


def known(results: Sequence[Result], figure: str = "top1") -> list[float]:
    """A figure of the students that have it."""
    return [value for result in results if (value := getattr(result, figure)) is not None]


def arm_facts(name: str, results: list[Result]) -> dict[str, Any]:
    """An arm's mean top-1 in its 95 % interval over seeds, as JSON has it; None where there is none."""
    scores = known(results)
    facts: dict[str, Any] = {"arm": name, "seeds": len(results), "top1": None, "low": None, "high": None}
    if scores:
        [facts["top1"]], [reach] = spread([scores])
        if len(scores) >= MIN_SEEDS:
            facts |= {"low": facts["top1"] - reach, "high": facts["top1"] + reach}
    return facts


def _asked(recipe: Recipe) -> dict[str, Any]:
    """What a finished run was asked for, as JSON gives it back."""
    values = {key: getattr(recipe, key) for key in EXTENSIONS}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _read(path: Path, warn: Callable[[str], None], made: Callable[[Mapping[str, Any]], Made]) -> Made | None:
    """What is made of a file's figures; None if it is missing, or damaged."""
    if not path.is_file():
        return None
    try:
        return made(read_sealed(path))
    except (OSError, ValueError, KeyError, TypeError) as problem:
        warn(f"{path} is damaged ({problem}): it is written anew")
        return None


def _wrong_with(student: Path, verify: bool) -> str:
    """What keeps a student's folder from being used; empty if nothing does."""
    if not (student / "model.safetensors").is_file():
        return "gone"
    return "damaged" if verify and damaged(student) else ""


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.2f}"


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
    for key, value in recipe.places:
        _, place = folder_in(value)
        path = expanded(place)
        if place and path.exists() and path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"--output {folder} holds what this run reads ({key})", "name another folder")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    held = [name for name in names if name != LOCK and not is_leftover(name)]
    if not held:
        return
    strangers = [name for name in held if not any(fnmatch(name, pattern) for pattern in OURS)]
    ours = not strangers and is_run(folder)
    if ours and not any(folder.rglob("*.safetensors")):
        return  # a run that never came to anything
    if not overwrite:
        more = f", --resume {folder} goes on" if ours else ""
        raise UserError(f"{folder} is not empty", f"--overwrite replaces a run{more}")
    if not ours:
        named = f" ({strangers[0]})" if strangers else ""
        raise UserError(f"{folder} holds something that is no run{named}; it was not touched", "name another")


def is_run(folder: Path) -> bool:
    """Did a run begin in this folder?"""
    recipe = folder / "recipe.toml"
    # A person's recipe.toml carries no schema number, and is not ours to replace.
    return recipe.is_file() and recipe.read_bytes().startswith(b"schema = ")


@contextmanager
def sole_writer(folder: Path, wait: float, say: Callable[[str], None]) -> Iterator[None]:
    """Nobody else writes into a run folder, which is made if need be, while the block runs.

    The system lets go of a lock when its process ends, however it ends.

    Args:
        wait: seconds to wait for another writer.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"cannot make {folder}: {problem.strerror}", "--output FOLDER") from None
    path = folder / LOCK
    lock = FileLock(path)
    ours = f"process {os.getpid()} on {platform.node()}"
    try:
        with saving(path):
            lock.acquire(timeout=0)
    except Timeout:
        owner = path.read_text(errors="replace").strip() or "another process"
        say(f"{folder} is in use by {owner}")
        try:
            # Loader workers, which hold what their killed parent held, end within seconds.
            lock.acquire(timeout=max(wait, 10 if _is_dead(owner) else 0))
        except Timeout:
            raise UserError(
                f"{folder} is in use by {owner}", "wait for it or end it; --lock-timeout SECONDS waits"
            ) from None
    try:
        with saving(path):
            path.write_text(f"{ours}\n")
        yield
    finally:
        lock.release()


def _is_dead(owner: str) -> bool:
    word, _, rest = owner.partition(" ")
    number, _, host = rest.partition(" on ")
    ours = word == "process" and host == platform.node() and number.isdecimal()
    return ours and not psutil.pid_exists(int(number))


def open_folder(folder: Path, recipe: Recipe, data: ImageData, resume: bool) -> None:
    """Write recipe and split into the folder; a new run first deletes what :func:`check_folder` let pass."""
    repair(folder)
    if not resume:
        # A crash in between leaves a run that is finished, or one that can be resumed or replaced.
        order = {"run.json": 0, "result.json": 1, "recipe.toml": 3}
        for path in sorted(folder.iterdir(), key=lambda path: order.get(path.name, 2)):
            if path.name != LOCK:
                remove(path)
    # An absolute place tells a moved run where the rest of what was moved with it lies.
    write_text(folder / "recipe.toml", recipe.but(output=str(folder.resolve())).to_toml())
    if data.split_files:
        write_json(folder / "split.json", data.split_files)
    write_json(folder / "data.json", data.record)


def check_data(folder: Path, data: ImageData, accept: bool, moved: bool) -> str | None:
    """Refuse to go on with other data than a run began with.

    Args:
        accept: go on where the classes are the same.
        moved: the data is read from another place.

    Returns:
        What was accepted.
    """
    then = read_record(folder / "data.json")
    if then is None:
        if moved and not accept:
            raise UserError(
                f"{folder} has no record of its images, so nobody knows whether these are the same",
                "--accept-changed-data if you do",
            )
        return None
    changed = differences(then, data.record or {})
    if not changed:
        return None
    what = f"the data of {folder} changed: {'; '.join(changed)}"
    if changed[0].startswith("classes"):
        raise UserError(what, "restore the class folders, or start a new run")
    if not accept:
        raise UserError(what, "restore it, or --accept-changed-data goes on with what there is")
    return what


def without_optimizer(place: Path, hint: str) -> UserError:
    """Why a finished training cannot be extended."""
    return UserError(
        f"{place} was finished without --keep-checkpoints: its optimizer's state is gone, "
        "so training cannot go on from it",
        hint,
    )


def anew(run: Path, weights: Path, flags: str = "") -> str:
    """The command that starts a new run from the weights of this one."""
    command = ["vitkd", "distill", "--recipe", str(run), "--initial-checkpoint", str(weights)]
    parts = (shlex.join(command), flags, shlex.join(["--output", f"{run}-2"]))
    return f"a new run from here: {' '.join(filter(None, parts))}"
