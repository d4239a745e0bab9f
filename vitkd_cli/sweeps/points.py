"""The points of a sweep: what is varied, by which values, and the recipe of each."""

import difflib
import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vitkd_cli.errors import UserError
from vitkd_cli.options import Field, declared, literal
from vitkd_cli.recipe import Data, Recipe, settings
from vitkd_cli.sweeps.places import PLACE, default_formula, default_of
from vitkd_cli.text import folder_name
from vitkd_cli.training.arms import formula_of

DEFAULT = "default"
# What all points have in common: who is compared, on which images, and where a run lies.
_FIXED = (
    *(name for name in declared(Data) if name not in ("train_split", "shots")),
    *("seed", "seeds", "baseline", "against", "steps", "output", "eval_metric", "plugin", "lock_timeout"),
)
# A model of another name has weights and sizes of its own.
_GOES_WITH = {
    "teacher": ("teacher_checkpoint", "teacher_kwargs"),
    "student": ("initial_checkpoint", "model_kwargs"),
}
_NUMBER = r"[+-]?[\d.]*\d\.?(?:[eE][+-]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})")
_DECADE = 10  # a range as long as this is drawn by its logarithm


@dataclass(frozen=True)
class Axis:
    """One thing that is varied.

    Attributes:
        field: of the recipe; None for a ``{name}`` of the formula.
        values: in the field's type, or as the formula writes them.
        span: least and greatest value, in place of values.
    """

    name: str
    field: Field | None
    values: tuple[Any, ...]
    span: tuple[float, float] | None = None

    def drawn(self, share: float) -> Any:
        """The value that a number in [0, 1) stands for."""
        if self.span is None:
            return self.values[int(share * len(self.values))]
        low, high = self.span
        if low > 0 and high / low >= _DECADE:
            value = low * (high / low) ** share
        else:
            value = low + (high - low) * share
        value = min(high, max(low, float(f"{value:.3g}")))
        if self.field is None:
            return literal(value)
        return self.field.check(round(value) if self.field.kind is int else value)


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        values: by the axis's name; None where the default leaves a value open.
        default: what the recipe says without the sweep, with which the others are compared.
    """

    values: Mapping[str, Any]
    recipe: Recipe
    default: bool = False
    named: str = ""

    @property
    def name(self) -> str:
        return self.named or ", ".join(f"{key}={written(value)}" for key, value in self.values.items())

    @property
    def place(self) -> str:
        """Its folder's name."""
        return folder_name(self.name)

    @cached_property
    def key(self) -> Recipe:
        """Two points of one key are one run."""
        formula = formula_of(self.recipe)
        terms = sorted(formula.summands, key=str)  # a sum in another order is the same
        return self.recipe.but(loss=str(replace(formula, summands=tuple(terms))))


def written(value: Any) -> str:
    """A value as a person reads it."""
    return "unset" if value is None else value if isinstance(value, str) else literal(value)


def number(value: Any) -> float | None:
    """The number that a value is, or writes; None if it is none."""
    try:
        return None if isinstance(value, (bool, tuple)) or value is None else float(value)
    except ValueError:
        return None


# What is varied ---------------------------------------------------------------------------------------


def axes_of(texts: Sequence[str], recipe: Recipe, drawn: bool) -> tuple[Axis, ...]:
    """What ``--vary KEY=V1,V2,…`` says, checked.

    Args:
        drawn: points are drawn, so that a value may be a range.
    """
    if not texts:
        raise UserError("nothing is varied", "--vary lr=5e-4,1e-3,2e-3")
    places = dict.fromkeys(PLACE.findall(recipe.loss))
    known = {field.name: field for field in settings()}
    if clash := sorted(places.keys() & known.keys()):
        raise UserError(
            f"the formula's {{{clash[0]}}} is called like a setting of the recipe", "give it another name"
        )
    axes: dict[str, Axis] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if not equals or not values.strip():
            raise UserError(f"--vary {text}: it has no values", "as in --vary lr=5e-4,1e-3")
        if name in axes:
            raise UserError(f"--vary gives {name} twice", "all its values in one, with commas")
        if name not in known and name not in places:
            near = difflib.get_close_matches(name, [*places, *(k for k in known if k not in _FIXED)], 1)
            cure = f"did you mean {near[0]}?" if near else f"a setting of the recipe, or {{{name}}} in --loss"
            raise UserError(f"--vary {name}: neither the recipe nor its formula has that", cure)
        if name in _FIXED:
            raise UserError(
                f"--vary {name}: the points of a sweep have it in common", f"give it to the sweep: --{name}"
            )
        axes[name] = _axis(name, known.get(name), values, drawn)
    if places and "loss" in axes:
        raise UserError(
            "the formula's {names} are varied, and so is the whole formula", "one of the two: --vary loss=…"
        )
    if left := [place for place in places if place not in axes]:
        near = difflib.get_close_matches(left[0], [name for name in axes if name not in known], 1)
        cure = f"did you mean {{{near[0]}}}? " if near else ""
        raise UserError(
            f"the formula's {{{left[0]}}} is not varied",
            f"{cure}--vary {left[0]}=VALUE,VALUE, or write a value",
        )
    return tuple(axes.values())


def _axis(name: str, field: Field | None, values: str, drawn: bool) -> Axis:
    called = f"--vary {name}"
    if found := _RANGE.fullmatch(values.strip()):
        if not drawn:
            raise UserError(
                f"{called}={values}: a range has no grid", "--random N draws from it, or list values"
            )
        if field is not None and field.kind not in (int, float):
            raise UserError(f"{called}={values}: {name} is no number", "list its values")
        low, high = map(float, found.groups())
        if low >= high:
            raise UserError(f"{called}={values}: the range is empty", "the smaller number first")
        for end in (low, high):
            if field is not None:
                field.check(round(end) if field.kind is int else end, called)
        return Axis(name, field, (), (low, high))
    read: list[Any] = []
    for part in parted(values):
        value = _value(field, part, values) if field is not None else part
        if name == "loss" and PLACE.search(part):
            raise UserError(f"{called}: a varied formula takes no {{names}}", "write its values")
        if value in read or (number(value) is not None and number(value) in map(number, read)):
            raise UserError(f"{called} gives {written(value)} twice", "leave one of them out")
        read.append(value)
    return Axis(name, field, tuple(read))


def _value(field: Field, part: str, values: str) -> Any:
    """What a part of the values says."""
    try:
        return field.read(part, f"--vary {field.name}")
    except UserError as problem:
        if field.kind is not tuple or part[:1] in "([":
            raise
        shown = values.strip() if "," in values else "V1,V2"
        cure = f'brackets around each value: --vary "{field.name}=({shown}),(…)"'
        raise UserError(problem.message, cure) from None


def parted(text: str) -> list[str]:
    """Values between commas; a value with commas of its own stands in brackets or in quotes."""
    parts, depth, quote = [""], 0, ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'" and not parts[-1].strip():
            quote = char
        elif char in "([{":
            depth += 1
        elif char in ")]}":
            depth -= 1
        if char == "," and depth <= 0 and not quote:
            parts.append("")
        else:
            parts[-1] += char
    parts = [part.strip() for part in parts]
    if quote or depth or not all(parts):
        raise UserError(
            f"--vary …={text}: a value is empty, or a bracket or quote is open",
            'values with commas go into brackets or quotes: scale=(0.3,1),(0.5,1) or aa="a,b",none',
        )
    return [
        part[1:-1] if part[0] in "\"'" and part[-1] == part[0] and len(part) > 1 else part for part in parts
    ]


def vary_in_words(table: Mapping[str, Any]) -> list[str]:
    """A TOML table ``[vary]`` as ``--vary`` writes it."""

    def spelled(value: Any) -> str:
        if isinstance(value, list):
            return f"({','.join(map(spelled, value))}{',' * (len(value) == 1)})"
        if not isinstance(value, str):
            return literal(value)
        if not re.search(r"[,\"'(){}\[\]]|^\s|\s$", value):
            return value
        quote = "'" if '"' in value else '"'
        return f"{quote}{value}{quote}"

    several = ((key, value if isinstance(value, list) else [value]) for key, value in table.items())
    return [f"{key}={','.join(map(spelled, values))}" for key, values in several]


# The points -------------------------------------------------------------------------------------------


def points_of(recipe: Recipe, axes: Sequence[Axis], drawn: int | None, seed: int) -> list[Point]:
    """The recipe's own point, and those of the grid, or some drawn from it.

    Args:
        drawn: how many are drawn (Bergstra and Bengio 2012); None: the whole grid.
        seed: of the drawing; more points with one seed begin with the same.
    """
    combinations = _drawn(axes, drawn, seed) if drawn else itertools.product(*(a.values for a in axes))
    points = [_point(recipe, dict(zip((a.name for a in axes), c, strict=True))) for c in combinations]
    own = recipe.but(loss=default_formula(recipe.loss))
    values = {a.name: getattr(own, a.name) if a.field else default_of(recipe.loss, a.name) for a in axes}
    default = Point(values, own, default=True, named=DEFAULT)
    runs: dict[Recipe, Point] = {}
    folders: dict[str, Point] = {}
    for point in points:
        if (other := runs.setdefault(point.key, point)) is not point:
            raise UserError(
                f"the points {other.name!r} and {point.name!r} are one run", "leave one of them out"
            )
        if (other := folders.setdefault(point.place.lower(), point)) is not point:
            raise UserError(
                f"the points {other.name!r} and {point.name!r} would have one folder, {point.place}",
                "leave one of them out",
            )
        if point.key == default.key:
            default = Point(point.values, own, default=True)
    return [default, *(point for point in points if point.key != default.key)]


def _point(recipe: Recipe, values: Mapping[str, Any]) -> Point:
    fields = {key: value for key, value in values.items() if key in declared(Recipe)}
    changes: dict[str, Any] = {}
    for model, with_it in _GOES_WITH.items():
        if fields.get(model, getattr(recipe, model)) != getattr(recipe, model):
            changes |= dict.fromkeys(with_it)
    loss = PLACE.sub(lambda found: str(values[found[1]]), fields.get("loss", recipe.loss))
    try:
        point = Point(values, recipe.but(**{**changes, **fields, "loss": loss}))
        formula_of(point.recipe)  # parsed, and every option in its range
        return point
    except UserError as problem:
        named = Point(values, recipe).name
        raise UserError(f"{problem.message} (the point {named})", problem.hint) from None


def _drawn(axes: Sequence[Axis], count: int, seed: int) -> Iterator[tuple[Any, ...]]:
    """Different combinations, each drawn by its own number: Python promises that these draws stay."""
    seen: set[tuple[Any, ...]] = set()
    if not any(axis.span for axis in axes):
        count = min(count, math.prod(len(axis.values) for axis in axes))
    for attempt in range(1000 * count):
        if len(seen) == count:
            return
        drawn = tuple(axis.drawn(random.Random(f"{seed}/{attempt}/{axis.name}").random()) for axis in axes)
        if drawn not in seen:
            seen.add(drawn)
            yield drawn
