"""The arms of a run: its student trained by other formulas or with other settings, and compared.

An arm is written ``FORMULA; key=value; …``, any part of which may be missing: ``labels + kd``, ``lr=1e-3``,
``labels + kd; teacher=deit3_base; name=big``. What it does not say is as the run has it.
"""

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from vitkd_cli.errors import UserError
from vitkd_cli.objective import Formula, Summand, Weight, parse
from vitkd_cli.options import Field, declared
from vitkd_cli.recipe import Augmentation, Loss, Models, Optimisation, Recipe, settings
from vitkd_cli.terms import registered_terms
from vitkd_cli.text import folder_name

_NAMES_OF_OURS = ("distilled", "alone", "student", "teacher")
# Arms share the student, its start, the images, and how they are scored; else they could not be compared.
_SHARED = (
    *("student", "pretrained", "initial_checkpoint", "model_kwargs", "img_size", "in_chans", "verify"),
    *("plugin", "seed", "view_seed", "validation_batch_size", "crop_pct", "interpolation", "mean", "std"),
)


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
        arm = _read(text, recipe)
        for other in arms:
            if (other.formula, other.changes) == (arm.formula, arm.changes):
                raise UserError(f"the arm {text!r} is {other.name} once more", "leave it out")
            if other.place.lower() == arm.place.lower():
                raise UserError(f"two arms go by the name {arm.name!r}", "give one another: …; name=NAME")
        arms.append(arm)
    return arms


def _read(text: str, recipe: Recipe) -> WrittenArm:
    known, name, changes = _settings(), "", dict[str, Any]()
    for key, value in parts_of(text):
        if key == "name":
            name = value
        elif key in changes:
            raise UserError(f"the arm {text!r} gives {key} twice", "leave one of them out")
        elif key not in known:
            raise UserError(f"the arm {text!r} cannot have {key}", _cure(key, known))
        else:
            changes[key] = known[key].read(value, f"the arm {text!r}: {key}")
    if "teacher" in changes:  # weights and sizes of another one
        changes = {"teacher_checkpoint": None, "teacher_kwargs": None, **changes}
    changes = {key: value for key, value in changes.items() if value != getattr(recipe, key)}
    name = name or "; ".join(value if key == "loss" else f"{key}={value}" for key, value in parts_of(text))
    if name in _NAMES_OF_OURS or not re.search(r"\w", name):
        raise UserError(f"an arm cannot go by the name {name!r}", "give it another: …; name=NAME")
    formula = formula_of(recipe.but(**changes))
    changes.pop("loss", None)
    return WrittenArm(name, formula, changes)


def parts_of(text: str) -> Iterator[tuple[str, str]]:
    """The parts of an arm: setting and value, the formula as ``loss``."""
    for part in filter(None, (part.strip() for part in text.split(";"))):
        key, equals, value = part.partition("=")
        key = key.strip().lstrip("-").replace("-", "_")
        yield (key, value.strip()) if equals and key.isidentifier() else ("loss", part)


def _settings() -> dict[str, Field]:
    """What an arm may change."""
    parts = (Models, Loss, Augmentation, Optimisation)
    return {key: field for p in parts for key, field in declared(p).items() if key not in _SHARED}


def _cure(key: str, known: Mapping[str, Field]) -> str:
    if key in {field.name for field in settings()}:
        return "all arms of a run have it in common; give it to the run"
    near = difflib.get_close_matches(key, known, 1)
    return f"did you mean {near[0]}?" if near else 'as in "labels + kd; lr=1e-3; name=kd"'


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
