"""A sweep, from what is varied to the table: every point is an ordinary run, in a process of its own."""

import shlex
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from vitkd_cli.errors import UserError
from vitkd_cli.files import is_leftover
from vitkd_cli.options import takes
from vitkd_cli.processes import is_launched
from vitkd_cli.progress import Reporter
from vitkd_cli.requests import SweepRequest
from vitkd_cli.sweeps.check import rehearse_all
from vitkd_cli.sweeps.children import StoppedBySignal, Task, places_of, run_all
from vitkd_cli.sweeps.folder import ASKED, SweepFolder, stored
from vitkd_cli.sweeps.outcome import Sweep
from vitkd_cli.sweeps.points import Point
from vitkd_cli.terms import load_plugins
from vitkd_cli.text import folder_name
from vitkd_cli.training.folder import LOCK, Run, known, sole_writer
from vitkd_cli.training.start import anchored, with_data

_AFTER_A_KILL = 60  # seconds in which the runs of a killed sweep end by themselves


@takes(SweepRequest)
def sweep(
    asked: SweepRequest,
    *,
    machine: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
    show_command: Callable[[str], None] = print,
) -> Sweep | None:
    """Train a recipe's student at every combination of what is varied, and compare each with the default.

    ``sweep(recipe, vary=["lr=5e-4,1e-3"])`` is ``sweep(SweepRequest(recipe, vary=["lr=5e-4,1e-3"]))``.

    Args:
        machine: flags of the recipe that were given; a plugin that they name is trusted.
        show_command: is handed the lines of ``print_commands``.

    Returns:
        The runs and what they prove; None for ``print_commands``. A point that failed is among the runs,
        with its last words.

    Raises:
        UserError: something is refused before any point begins, or a signal stopped the sweep.
    """
    reporter, trusted = reporter or Reporter(), asked.trust_plugin or "plugin" in (machine or {})
    if is_launched():
        raise UserError(
            "vitkd sweep starts its runs itself", "start it once; --num-processes N is for each run"
        )
    per_epoch = None
    if asked.resume is None:
        layout, per_epoch = _begun(asked, trusted, reporter)
    else:
        _only_resumed(asked, machine or {})
        layout = stored(Path(asked.resume), asked, trusted)
    with ExitStack() as held:
        folder = layout.folder
        held.enter_context(sole_writer(folder, layout.recipe.lock_timeout, reporter.warn))
        if per_epoch is not None:
            _check_folder(folder)  # another sweep may have begun there while the points were rehearsed
            if asked.halving:
                layout.note_halving({"per_epoch": per_epoch, "stages": []})
        layout.write()
        if asked.print_commands:
            _print_commands(layout, trusted, reporter, show_command)
            return None
        going = _Sweeping(layout, trusted, reporter)
        try:
            going.run()
        except StoppedBySignal as stopped:
            ends = [layout.finished(point, layout.last_step(point)) for point in layout.points]
            done = sum(end is not None for end in ends)
            raise UserError(
                f"stopped by {stopped} with {done} of {len(layout.points)} points finished",
                f"go on with: {resuming_sweep(folder)}",
                exit_code=128 + stopped.number,
            ) from None
        found = Sweep.of(layout, going.failed)
        found.write()
        return found


def read_sweep(folder: str | Path) -> Sweep:
    """What a sweep has come to so far, with its table; nothing is run."""
    return Sweep.of(stored(Path(folder), SweepRequest(), trusted=False), {})


def resuming_sweep(folder: Path) -> str:
    """The command that goes on with a sweep, as it is typed."""
    return f"vitkd sweep --resume {shlex.quote(str(folder))}"


def _only_resumed(asked: SweepRequest, given: Mapping[str, Any]) -> None:
    """A sweep that goes on is as it began."""
    own = SweepRequest(resume=asked.resume, jobs=asked.jobs)
    own = replace(own, print_commands=asked.print_commands, trust_plugin=asked.trust_plugin)
    if asked != own or given:
        raise UserError(
            "--resume takes everything from the sweep but --jobs, --print-commands and --trust-plugin",
            f"vitkd sweep --resume {asked.resume}; other points are another sweep",
        )


def _check_folder(folder: Path) -> None:
    if folder.is_file():
        raise UserError(f"--output {folder} is a file", "name a folder")
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    if any(name != LOCK and not is_leftover(name) for name in names):
        goes_on = f"{resuming_sweep(folder)} goes on" if (folder / ASKED).is_file() else "name another folder"
        raise UserError(f"{folder} is not empty", goes_on)


def _begun(asked: SweepRequest, trusted: bool, reporter: Reporter) -> tuple[SweepFolder, dict[str, int]]:
    """A new sweep, of which everything is checked that can be, and updates in an epoch of each point."""
    if asked.recipe is None:
        raise UserError("there is no recipe to vary", "give a Recipe, or a sweep's folder to resume")
    recipe = with_data(asked.recipe)
    load_plugins(recipe.plugin, trusted=trusted, tell=reporter.say)
    recipe = anchored(recipe.but(output=None))
    named = f"sweeps/{folder_name(recipe.student or 'student')}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = Path(asked.output or asked.recipe.output or named).expanduser()
    _check_folder(folder)
    layout = SweepFolder.of(replace(asked, recipe=recipe), folder.resolve())
    _check_halving(layout)
    places_of(recipe, asked.jobs)
    return layout, rehearse_all(layout.points, reporter)


def _check_halving(layout: SweepFolder) -> None:
    epochs = layout.asked.halving or ()
    if list(epochs) != sorted(set(epochs)):
        raise UserError("--halving wants epochs in their order", "such as --halving 5,10")
    shortest = min(point.recipe.epochs for point in layout.points)
    if epochs and epochs[-1] >= shortest:
        raise UserError(f"--halving {epochs[-1]:g} is no epoch before the last of {shortest}", "smaller ones")


def _arguments(layout: SweepFolder, point: Point, trusted: bool) -> list[str]:
    trust = ["--trust-plugin"] if trusted and layout.recipe.plugin else []
    recipe = str(layout.beside(point, ".toml"))
    return ["distill", "--recipe", recipe, "--resume", "auto", "--no-report", *trust]


def _print_commands(
    layout: SweepFolder, trusted: bool, reporter: Reporter, show_command: Callable[[str], None]
) -> None:
    missing = [point for point in layout.points if layout.finished(point) is None]
    for point in missing:
        show_command(shlex.join(["vitkd", *_arguments(layout, point, trusted)]))
    if layout.teacher and missing and missing[0].default:
        reporter.warn("the first command comes first: the others learn from the teacher that it fine-tunes")
    reporter.warn(f"the table of all: {resuming_sweep(layout.folder)}")


class _Sweeping:
    """A sweep that goes on.

    Attributes:
        failed: last words by the point's name.
    """

    def __init__(self, layout: SweepFolder, trusted: bool, reporter: Reporter) -> None:
        self.layout, self.trusted, self.reporter = layout, trusted, reporter
        self.places = places_of(layout.recipe, layout.asked.jobs)
        self.failed: dict[str, str] = {}

    def run(self) -> None:
        """Run every point that is not finished, to its end or to where it is stopped.

        Where one fails before a stage is ranked, the others wait for it there.
        """
        layout, halved = self.layout, self.layout.halved()
        points = list(layout.points)
        for number, epoch in enumerate(layout.asked.halving or ()):
            steps = {p.name: max(1, round(epoch * halved["per_epoch"][p.name])) for p in points}
            if number == len(halved["stages"]):
                self._run(points, steps, keep=True)
                if self.failed:  # they are tried again, and ranked with the others
                    return
                halved["stages"].append(self._ranked(points, steps, epoch))
                layout.note_halving(halved)
            gone = halved["stages"][number]["gone"]
            points = [point for point in points if point.name not in gone]
        self._run(points, {p.name: end for p in points if (end := layout.last_step(p)) is not None})

    def _run(self, points: list[Point], steps: Mapping[str, int], keep: bool = False) -> None:
        layout, by_name = self.layout, {point.name: point for point in points}
        missing = [p for p in points if layout.finished(p, steps.get(p.name)) is None]
        if not missing:
            return
        tasks = [self._task(point, steps.get(point.name), keep) for point in missing]
        done = len(points) - len(missing)
        with self.reporter.bar("sweep", len(points), done) as bar:

            def ended(task: Task, words: str) -> None:
                nonlocal done
                done += 1
                point = by_name[task.name]
                run = layout.finished(point, steps.get(point.name))
                if run is None:
                    self.failed[point.name] = words or "it ended before its time"
                    self.reporter.warn(f"{point.name} failed: {self.failed[point.name]}")
                else:
                    self.failed.pop(point.name, None)
                    self.reporter.say(f"{point.name}: {_score(run)}")

            run_all(tasks, self.places, ended, lambda names: bar.advance(done, f"{'; '.join(names)};"))

    def _task(self, point: Point, steps: int | None, keep: bool) -> Task:
        layout, more = self.layout, []
        if steps is not None:
            more = ["--steps", str(steps), "--keep-checkpoints" if keep else "--no-keep-checkpoints"]
        if layout.asked.resume:
            more += ["--lock-timeout", str(max(layout.recipe.lock_timeout, _AFTER_A_KILL))]
        command = [sys.executable, "-m", "vitkd_cli", *_arguments(layout, point, self.trusted), *more]
        log = layout.beside(point, ".log")
        if layout.teacher is None or point.default:
            return Task(point.name, command, log)
        ready = (layout.teacher / "result.json").is_file
        return Task(point.name, command, log, ready, "not begun: the default, which comes first, failed")

    def _ranked(self, points: list[Point], steps: Mapping[str, int], epoch: float) -> dict[str, Any]:
        """Which half goes on from an epoch (Jamieson and Talwalkar 2016); the default always does."""
        scores: dict[str, float] = {}
        for point in points:
            run = self.layout.finished(point, steps[point.name])
            assert run is not None  # else it has failed
            if not (values := known(run.own)):
                raise UserError("there is no accuracy to rank the points by", "a sweep without --halving")
            if not point.default:
                scores[point.name] = fmean(values)
        order = sorted(scores, key=lambda name: -scores[name])  # of equal ones, the first in the grid
        kept = order[: (len(order) + 1) // 2]
        ranks = {name: rank for rank, name in enumerate(order, 1)}
        gone = [p.name for p in points if not p.default and p.name not in kept]
        return {"epoch": epoch, "scores": scores, "ranks": ranks, "gone": gone}


def _score(run: Run) -> str:
    return f"top-1 {fmean(scores):.2f}" if (scores := known(run.own)) else "no accuracy"
