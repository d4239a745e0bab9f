"""The arms of a run: its student trained by other formulas or with other settings, and compared.

An arm is written ``FORMULA; key=value; …``, any part of which may be missing: ``labels + kd``, ``lr=1e-3``,
``labels + kd; teacher=deit3_base; name=big``. What it does not say is as the run has it.
"""

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from vitkd_cli.errors import UserError
from vitkd_cli.objective import Formula, Summand, Weight, parse
from vitkd_cli.options import Field, declared
from vitkd_cli.recipe import PLACES, Augmentation, Loss, Models, Optimisation, Recipe, parts_of, settings
from vitkd_cli.terms import registered_terms
from vitkd_cli.text import folder_name, last_name

_NAMES_OF_OURS = ("distilled", "alone", "student", "teacher")
# Arms share the student, its start, the images, and how they are scored; else they could not be compared. And
# they share the accumulation, for which Accelerate is set up once.
_SHARED = (
    *("student", "pretrained", "initial_checkpoint", "model_kwargs", "img_size", "in_chans", "verify"),
    *("plugin", "seed", "view_seed", "validation_batch_size", "crop_pct", "interpolation", "mean", "std"),
    *("grad_accum_steps", "global_batch_size"),
)
_EXAMPLE = 'as in "labels + kd; lr=1e-3; name=kd"'


@dataclass(frozen=True)
class WrittenArm:
    """An arm as the recipe has it.

    Attributes:
        name: ``distilled``, or ``student`` where no teacher is read, for the run's own; ``alone`` for the
            baseline; of the others what they are written as, or their ``name=``.
        changes: its settings that are not the run's.
    """

    name: str
    formula: Formula
    changes: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Its folder in the run's, without the seed."""
        if self.name in _NAMES_OF_OURS:
            return self.name
        return f"arms/{folder_name(self.name)}"


def written_arms(recipe: Recipe) -> list[WrittenArm]:
    """Every arm of a recipe, the run's own first.

    Raises:
        UserError: one cannot be read, changes what arms share, or is another once more.
    """
    own = formula_of(recipe)
    arms = [WrittenArm("distilled" if own.uses_teacher else "student", own, {})]
    if recipe.baseline and own.uses_teacher:
        arms.append(WrittenArm("alone", without_teacher(own), {}))
    for text in recipe.against:
        try:
            arm = _read(text, recipe)
        except UserError as problem:
            raise UserError(f"the arm {text!r}: {problem.message}", problem.hint or _EXAMPLE) from None
        for other in arms:
            if (other.formula, other.changes) == (arm.formula, arm.changes):
                which = "the arm of --baseline" if other.name == "alone" else f"the arm {other.name!r}"
                raise UserError(f"the arm {text!r} is {which} once more", "leave one of them out")
            if other.place.lower() == arm.place.lower():
                raise UserError(f"two arms go by the name {arm.name!r}", "give one another: …; name=NAME")
        arms.append(arm)
    return arms


def checked_arms(recipe: Recipe) -> list[WrittenArm]:
    """Every arm of a recipe that is to be trained, which takes a student, and a teacher where one is read.

    Raises:
        UserError: one of them is not named, or an arm is refused (:func:`written_arms`).
    """
    if recipe.student is None:
        raise UserError("no student is named", "--student NAME, such as --student deit_tiny")
    arms = written_arms(recipe)
    for arm in arms:
        if arm.formula.uses_teacher and (recipe.teacher or arm.changes.get("teacher")) is None:
            raise UserError(
                f"the loss reads a teacher ({arm.formula}), and none is named",
                "--teacher NAME, or --loss labels to train without one",
            )
    return arms


def _read(text: str, recipe: Recipe) -> WrittenArm:
    known, given, shown = _settings(), dict[str, Any](), list[str]()
    for key, value in parts_of(text):
        if key == "loss" and (slip := re.search(r",\s*[a-z_-]+\s*=[^()]*$", value)):
            cure = f"{value[: slip.start()]}; {slip[0].lstrip(', ')}"
            raise UserError("its settings follow a semicolon, not a comma", f'"{cure}"')
        if key in given:
            raise UserError(f"it has {key} twice", "leave one of them out")
        if key not in known and key != "name":
            raise UserError(f"it cannot have {key!r}", _cure(key, known))
        given[key] = value if key == "name" else known[key].read(value)
        named = last_name(value) if key in PLACES else value
        shown.append(named if key == "loss" else f"{key}={named}")
    if not given:
        raise UserError("it is empty", _EXAMPLE)
    name = given.pop("name", "; ".join(shown))
    if given.get("teacher", recipe.teacher) != recipe.teacher:  # what belongs to the other one
        given = {"teacher_checkpoint": None, "teacher_kwargs": None, **given}
    changes = {key: value for key, value in given.items() if value != getattr(recipe, key)}
    arm = WrittenArm(name, formula_of(recipe.but(**changes)), {k: changes[k] for k in changes if k != "loss"})
    if name in _NAMES_OF_OURS or not arm.place.removeprefix("arms/"):
        raise UserError(f"an arm cannot go by the name {name!r}", "give it another: …; name=NAME")
    return arm


def _settings() -> dict[str, Field]:
    """What an arm may change."""
    parts = (Models, Loss, Augmentation, Optimisation)
    return {key: field for p in parts for key, field in declared(p).items() if key not in _SHARED}


def _cure(key: str, known: Mapping[str, Field]) -> str:
    if key in {field.name for field in settings()}:
        return "all arms of a run have it in common; give it to the run"
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]}?" if near else _EXAMPLE


# Formulas ---------------------------------------------------------------------------------------------


def formula_of(recipe: Recipe) -> Formula:
    """The recipe's objective; ``--smoothing`` is the default of the terms that smooth."""

    def smoothed(summand: Summand) -> Summand:
        if "smoothing" in summand.written:
            return summand
        options = ((k, recipe.smoothing if k == "smoothing" else v) for k, v in summand.options)
        return replace(summand, options=tuple(options))

    formula = parse(recipe.loss)
    return replace(formula, summands=tuple(map(smoothed, formula.summands)))


def without_teacher(formula: Formula) -> Formula:
    """The baseline's objective: the label terms at full weight, all the time."""
    own = [s for s in formula.summands if not registered_terms()[s.name].uses_teacher]
    if not own:
        raise UserError(
            f"--baseline: nothing of {formula} is left without a teacher", 'add labels, such as "labels + …"'
        )
    return Formula(tuple(replace(s, weight=Weight()) for s in own))
