"""A sweep's folder: what was asked, and the recipe and run of each point.

sweep.toml            what was asked; a recipe for ``vitkd sweep``, too
points/NAME.toml      a point's recipe
points/NAME/          its run folder
points/NAME.log       what the run printed
halving.json          which points stopped at which epoch
sweep.csv, sweep.png, sweep.svg
"""

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import tomli_w

from vitkd_cli.errors import UserError, expanded
from vitkd_cli.files import read_sealed, write_sealed, write_text
from vitkd_cli.recipe import SCHEMA_VERSION, SWEEP_TABLES, Recipe, compose, layers_of, recipe_of, settings
from vitkd_cli.requests import SweepRequest
from vitkd_cli.sweeps.points import Axis, Point, axes_of, points_of, vary_in_words
from vitkd_cli.terms import load_plugins
from vitkd_cli.training.arms import formula_of
from vitkd_cli.training.folder import Run
from vitkd_cli.training.models import tuned
from vitkd_cli.training.teachers import TELLS_TEACHERS_APART

ASKED = "sweep.toml"
_KEPT = ("vary", "random", "draw_seed", "halving")  # what points there are, and which stop


@dataclass(frozen=True)
class SweepFolder:
    """A sweep's points and their places.

    Attributes:
        points: the default first.
    """

    folder: Path
    asked: SweepRequest
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]

    @classmethod
    def of(cls, asked: SweepRequest, folder: Path) -> "SweepFolder":
        """What the points of a request are."""
        axes = axes_of(asked.vary, asked.recipe, bool(asked.random))
        points = points_of(asked.recipe, axes, asked.random, asked.draw_seed)
        return cls(folder, asked, axes, tuple(points))

    @property
    def recipe(self) -> Recipe:
        """What all points have in common."""
        recipe: Recipe = self.asked.recipe
        return recipe

    def run(self, point: Point) -> Path:
        return self.folder / "points" / point.place

    def beside(self, point: Point, ending: str) -> Path:
        """A file about a point."""
        return self.folder / "points" / f"{point.place}{ending}"

    @cached_property
    def teacher(self) -> Path | None:
        """The teacher that the default fine-tunes for all; None where each has its own, or none."""
        varied = {axis.name for axis in self.axes} & set(TELLS_TEACHERS_APART)
        default = self.points[0]
        if not self.recipe.finetune_teacher or varied or not formula_of(default.recipe).uses_teacher:
            return None
        return self.run(default) / "teacher"

    def recipe_for(self, point: Point) -> Recipe:
        """What the point's run is asked: the baseline and other arms are trained with the default alone."""
        recipe = point.recipe.but(output=str(self.run(point)))
        if point.default:
            return recipe
        if self.teacher and formula_of(recipe).uses_teacher:
            recipe = tuned(recipe, str(self.teacher / "student"))
        return recipe.but(baseline=False, against=())

    def write(self) -> None:
        """Write what was asked, then each point's recipe."""
        recipe = {f.name: v for f in settings() if (v := getattr(self.recipe, f.name)) is not None}
        kept = {key: v for key in _KEPT if (v := getattr(self.asked, key)) is not None}
        content = {"schema": SCHEMA_VERSION, **recipe, "sweep": kept}
        write_text(self.folder / ASKED, tomli_w.dumps(content))
        (self.folder / "points").mkdir(exist_ok=True)
        for point in self.points:
            write_text(self.beside(point, ".toml"), self.recipe_for(point).to_toml())

    def finished(self, point: Point, steps: int | None = None) -> Run | None:
        """The point's run; None if it has not come to its end.

        Args:
            steps: the end of this stage, where it is one of several.
        """
        folder = self.run(point)
        if not (folder / "run.json").is_file():
            return None
        recipe = recipe_of(folder)
        if steps is not None and recipe.steps != steps:
            return None
        return Run.read(folder, recipe, lambda _: None)

    # Successive halving

    def halved(self) -> dict[str, Any]:
        """What is known of it: updates in an epoch of each point, and what each stage decided."""
        path = self.folder / "halving.json"
        try:
            return read_sealed(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as problem:
            raise UserError(
                f"{path} is damaged: {problem}", "begin the sweep anew in another folder"
            ) from None

    def last_step(self, point: Point) -> int | None:
        """Updates of the whole run, where it is run in stages."""
        per_epoch = self.halved().get("per_epoch", {}).get(point.name)
        return per_epoch and per_epoch * (point.recipe.epochs + point.recipe.cooldown_epochs)

    def note_halving(self, content: dict[str, Any]) -> None:
        write_sealed(self.folder / "halving.json", content)


def asked_in(path: Path, given: SweepRequest, typed: Collection[str]) -> SweepRequest:
    """The request with what a recipe's file says in its tables ``[vary]`` and ``[sweep]``.

    Args:
        typed: names of what the request was given, be it the default; it goes before the file's.
    """
    values = layers_of(path)[-1][1]
    table, varied = values.get("sweep", {}), values.get("vary", {})
    for name, one in (("sweep", table), ("vary", varied)):
        if not isinstance(one, Mapping):
            raise UserError(f"{name} is no table ({path})", f"[{name}] on a line of its own")
    allowed = [*_KEPT, "jobs"]
    for key in table:
        if key.replace("-", "_") not in allowed:
            near = difflib.get_close_matches(key, allowed, 1)
            raise UserError(
                f"[sweep] has no {key} ({path})", f"did you mean {near[0]}?" if near else ", ".join(allowed)
            )
    own = {key.replace("-", "_"): value for key, value in table.items()}
    own["vary"] = _merged(own.get("vary", ()), vary_in_words(varied), given.vary)
    return replace(given, **{k: v for k, v in own.items() if k == "vary" or k not in typed})


def _merged(*layers: Sequence[str]) -> tuple[str, ...]:
    """What is varied; of two that vary the same, the later."""
    by_key = {text.partition("=")[0].strip(): text for layer in layers for text in layer}
    return tuple(by_key.values())


def stored(folder: Path, given: SweepRequest, trusted: bool) -> SweepFolder:
    """The sweep that a folder holds, wherever we are told of it from."""
    folder = expanded(folder).resolve()
    path = folder / ASKED
    if not path.is_file():
        raise UserError(f"{folder} is no sweep: it has no {ASKED}", "name the folder of a sweep")
    layers = [
        (origin, {k: v for k, v in one.items() if k not in SWEEP_TABLES}) for origin, one in layers_of(path)
    ]
    recipe, _ = compose(*layers)
    load_plugins(recipe.plugin, trusted=trusted, tell=lambda _: None)
    own = SweepRequest(resume=given.resume, jobs=given.jobs, print_commands=given.print_commands)
    asked = asked_in(path, own, ("jobs",))
    return SweepFolder.of(replace(asked, recipe=recipe), folder)
