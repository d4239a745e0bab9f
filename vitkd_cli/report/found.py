"""What a run folder holds for a report, whether the run is finished or not."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from vitkd_cli.errors import UserError, expanded
from vitkd_cli.files import read_sealed
from vitkd_cli.recipe import Recipe, recipe_of
from vitkd_cli.text import listed, plain, without_places
from vitkd_cli.training import Result, Run
from vitkd_cli.training.arms import WrittenArm, written_arms
from vitkd_cli.training.folder import student_folders

Made = TypeVar("Made")


@dataclass(frozen=True)
class FoundArm:
    """An arm of a run.

    Attributes:
        number: its place among all arms of the page, which is its colour.
        title: as the page calls it: with the run's name, where there are several runs.
        results: of the students that are trained.
        folders: of those whose training began.
    """

    number: int
    title: str
    results: Sequence[Result]
    folders: Sequence[Path]


@dataclass(frozen=True)
class FoundRun:
    """A run as a report tells of it.

    Attributes:
        run: with the students that are trained; its folder is absolute, of which no message tells a part.
        place: the folder as it was named.
        state: in a sentence, what is missing of it; empty if it is finished.
        notes: what could not be read, one line each, without places.
    """

    name: str
    run: Run
    arms: Sequence[FoundArm]
    place: Path
    state: str = ""
    notes: Sequence[str] = ()

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe


def found_runs(places: Sequence[Any]) -> list[FoundRun]:
    """The runs that these folders are, or hold as a sweep or several do, in order."""
    folders = list(dict.fromkeys(folder for place in places for folder in _folders(expanded(place))))
    found: list[FoundRun] = []
    for folder in folders:
        first = sum(len(one.arms) for one in found)
        found.append(_found(folder, first, several=len(folders) > 1))
    return found


def _folders(place: Path) -> list[Path]:
    if (place / "recipe.toml").is_file():
        return [place]
    above = (place, place / "points", *sorted(place.glob("*/points")))  # of a sweep, and of several
    inside = sorted(path.parent for folder in above for path in folder.glob("*/recipe.toml"))
    if not inside:
        raise UserError(
            f"{place} is no run folder: it has no recipe.toml, and no folder in it has one",
            "name the folder of a run, or of several",
        )
    return inside


def _found(place: Path, first: int, several: bool) -> FoundRun:
    folder = place.resolve()
    name = plain(folder.name)
    before = f"{name}: " if several else ""
    recipe, notes = recipe_of(folder), list[str]()
    run, state = _finished(folder, recipe, notes), ""
    if run is None:
        run, state = _so_far(folder, recipe, notes)
    places = _by_arm(folder, recipe, run)
    arms = [
        FoundArm(first + number, before + without_places(arm), run.arms.get(arm, []), some)
        for number, (arm, some) in enumerate(places.items())
    ]
    for result in (*run.results, *(one for one in (run.teacher, *run.more_teachers) if one)):
        if result.answers.is_file() and result.metrics is None:
            notes.append(f"the answers of {without_places(result.arm)} (seed {result.seed}) are damaged")
    return FoundRun(name, run, arms, place, state, tuple(notes))


def _finished(folder: Path, recipe: Recipe, notes: list[str]) -> Run | None:
    """As ``run.json`` has it, whatever became of the students' folders since."""
    run = _read(folder / "run.json", lambda content: Run.of(content, folder, recipe), notes)
    return run if run and run.results else None


def _so_far(folder: Path, recipe: Recipe, notes: list[str]) -> tuple[Run, str]:
    """The students that are trained, of a run that has not come to its end."""
    order = [arm.name for arm in _written(recipe)]
    results = [result for place in _begun(folder) if (result := _result(place, notes))]
    results.sort(key=lambda one: (one.seed, order.index(one.arm) if one.arm in order else len(order)))
    wanted = recipe.seeds * max(1, len(order))
    state = f"This run is not finished: {len(results)} of {wanted} students are trained."
    # A fine-tuned teacher, whose figures the run did not come to writing down.
    tuned = _result(folder / "teacher", notes)
    return Run(folder, recipe, tuple(results), tuned and replace(tuned, arm="teacher")), state


def _result(place: Path, notes: list[str]) -> Result | None:
    return _read(place / "result.json", lambda content: Result.of(content, place), notes, f" of {place.name}")


def _read(path: Path, made: Callable[[Any], Made], notes: list[str], of: str = "") -> Made | None:
    """What a file holds; None where there is none, or where it is damaged, which is noted."""
    try:
        return made(read_sealed(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as problem:
        notes.append(f"{path.name}{of} is damaged ({without_places(problem)})")
        return None


def _begun(folder: Path) -> list[Path]:
    """The folders of all students whose training began; one student's is the run's own."""
    return [place for place in student_folders(folder) if (place / "log.jsonl").is_file()]


def _written(recipe: Recipe) -> list[WrittenArm]:
    """The recipe's arms; none where a formula has words of a plugin that is not loaded."""
    try:
        return written_arms(recipe)
    except UserError:
        return []


def _by_arm(folder: Path, recipe: Recipe, run: Run) -> dict[str, list[Path]]:
    """The folders of each arm's students, the run's own arm first."""
    told = {Path(result.folder).resolve(): result.arm for result in run.results}
    names = {arm.place: arm.name for arm in _written(recipe)}
    arms: dict[str, list[Path]] = {name: [] for name in (*names.values(), *run.arms)}
    for place in _begun(folder):
        short = str(place.relative_to(folder)).rpartition("-")[0]
        own = next(iter(names.values()), "student") if place == folder else names.get(short, short)
        arms.setdefault(told.get(place.resolve(), own), []).append(place)
    return {name: places for name, places in arms.items() if places or name in run.arms}


def attempted(what: str, act: Callable[[], Any]) -> tuple[Any, str]:
    """What ``act`` gives, or None and a sentence why it gave nothing: a report tells of what there is."""
    try:
        return act(), ""
    except UserError as problem:
        return None, f"{what}: {without_places(problem.message)}."
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as problem:
        return None, f"{what}: {without_places(plain(listed(str(problem).splitlines()[:1])))}."
