"""One declaration of a setting: what counts as its value, how a refusal reads, how it is handed over."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pytest
import torch

from vitkd_cli import UserError
from vitkd_cli.options import Option, Request, declared, takes


@dataclass(frozen=True)
class Wish(Request):
    things: Annotated[tuple[Any, ...], Option("What it is about.", argument=True)]
    count: Annotated[int, Option("How many.", minimum=1)] = 2
    share: Annotated[float | None, Option("A share.", above=0, maximum=1)] = None
    pair: Annotated[tuple[float, float], Option("Two numbers.", minimum=0)] = (0.0, 1.0)
    colour: Annotated[Literal["red", "green"], Option("A colour.", excludes=("loud",))] = "red"
    loud: Annotated[bool, Option("Whether it is loud.")] = False


@takes(Wish)
def grant(wish: Wish, *, twice: bool = False) -> tuple[Wish, bool]:
    return wish, twice


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("things", "one", ("one",)),
        ("share", 1, 1.0),
        ("share", None, None),
        ("pair", "0.5,0.9", (0.5, 0.9)),
        ("pair", [0, 1], (0.0, 1.0)),
        ("pair", np.array([0.5, 0.9]), (0.5, 0.9)),
        ("pair", torch.tensor([0.5, 0.75]), (0.5, 0.75)),
        ("colour", "green", "green"),
    ],
)
def test_a_value_is_taken_in_the_declared_type(name, value, taken):
    found = getattr(Wish(**{"things": ("x",), name: value}), name)
    assert found == taken and type(found) is type(taken)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", True, "count must be a whole number, not True"),
        ("count", 1.5, "count must be a whole number, not 1.5"),
        ("count", 0, "count must be at least 1, not 0"),
        ("count", 10**400, "count must be at most 9.0072e.15, not a number of 401 digits"),
        ("count", None, "count must be set"),
        ("share", 0, "share must be above 0, not 0"),
        ("share", float("nan"), "share must be a finite number, not nan"),
        ("pair", 0.5, "pair must be 2 numbers, not 0.5"),
        ("pair", "0.5", "pair must be 2 numbers, not '0.5'"),
        ("pair", (0.5, True), r"pair must be 2 numbers, not \(0.5, True\)"),
        ("colour", "gren", "colour must be one of red, green, not 'gren'"),
    ],
)
def test_what_is_no_value_is_refused_with_what_would_be(name, value, message):
    with pytest.raises(UserError, match=message):
        Wish(**{"things": ("x",), name: value})


def test_settings_may_exclude_each_other():
    with pytest.raises(UserError, match="--colour and --loud exclude each other"):
        Wish(("x",), colour="green", loud=True)


def test_a_request_or_its_settings():
    assert grant(Wish(("x",), 3), twice=True) == grant(["x"], 3, twice=True) == (Wish(("x",), 3), True)


def test_a_constructor_that_lists_its_options_has_those_alone():
    class Base:
        size: Annotated[float, Option("A size.")] = 1.0

        def __init__(self, **options: Any) -> None: ...

    class Heir(Base):
        def __init__(self, *, width: Annotated[int, "A width."] = 3) -> None: ...

    assert [*declared(Base)] == ["size"] and [*declared(Heir)] == ["width"]
