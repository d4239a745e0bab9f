"""One declaration of a setting: type, default, range, help.

A setting is ``name: Annotated[type, Option("What it is.")] = default``: a field of a request (``Recipe``,
``EvalRequest``, …) or of a term, or a keyword of a macro. The command line's flags, the keys of TOML, the
options of a formula's words, their checks, ``--help`` and the tables in docs/ are all read off it.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import math
import types
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache, cached_property, wraps
from pathlib import PurePath
from typing import Any, ClassVar, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from vitkd_cli.errors import UserError

_LARGEST = 2**53  # of whole numbers: what a float, and so any reader of TOML or JSON, can hold
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class Option:
    """The part of a setting that its type does not say.

    Attributes:
        help: what it does; of a switch that is on by default, what its ``--no-`` form does.
        short: one-letter flags.
        minimum, maximum: the least and the largest number.
        above, below: likewise, but not these numbers themselves.
        flag: on the command line, where it is not the setting's name.
        argument: on the command line it has no flag: it is what the command is about.
        metavar: what ``--help`` calls its value.
        unset: what ``--help`` says of a default that is None.
        excludes: settings that cannot be given beside it.
        panel: of ``--help``; by default the one of the class that declares it.
    """

    help: str
    short: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None
    below: float | None = None
    flag: str = ""
    argument: bool = False
    metavar: str | None = None
    unset: str = ""
    excludes: tuple[str, ...] = ()
    panel: str = ""


@dataclass(frozen=True)
class Field:
    """A setting as it was declared.

    Attributes:
        type: without None.
        optional: None is a value.
        default: ``dataclasses.MISSING`` where it has to be given.
        of: the term that it belongs to; empty for a request's.
    """

    name: str
    type: Any
    optional: bool
    default: Any
    option: Option
    panel: str = ""
    of: str = ""

    @cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have."""
        return get_args(self.type) if _is_union(self.type) else (self.type,)

    @property
    def kind(self) -> Any:
        """``bool``, ``int``, ``float``, ``str`` or ``tuple``; None for a choice or for any object."""
        kind = get_origin(self.kinds[0]) or self.kinds[0]
        return None if kind in (Literal, Any) else kind

    @property
    def choices(self) -> tuple[Any, ...]:
        return get_args(self.kinds[0]) if get_origin(self.kinds[0]) is Literal else ()

    @property
    def repeated(self) -> bool:
        """Several texts: on the command line a flag for each."""
        return self.kind is tuple and get_args(self.kinds[0])[0] in (str, Any)

    @property
    def flag(self) -> str:
        return self.option.flag or "--" + self.name.replace("_", "-")

    @property
    def off(self) -> str:
        """The flag that switches it off."""
        return f"--{self.flag[5:]}" if self.flag.startswith("--no-") else f"--no-{self.flag[2:]}"

    def typed(self, value: Any) -> list[str]:
        """The command-line arguments that set it."""
        if self.kind is bool:
            return [self.flag if value else self.off]
        if self.repeated:
            return [word for text in value for word in (self.flag, str(text))]
        return [self.flag, self.spelled(value)]

    def spelled(self, value: Any) -> str:
        """The text that stands for a value, as :meth:`read` takes it."""
        return ",".join(map(str, value)) if self.kind is tuple else str(value)

    def read(self, text: str, called: str = "") -> Any:
        """The value that a piece of text stands for, as on a command line: :meth:`check` of it."""
        value: Any = text.strip()
        if self.kind is not str:
            with suppress(ValueError, SyntaxError):  # no literal: the check says what is expected
                value = read_literal(ast.parse(value, mode="eval").body, bare_words=True)
        return self.check(value, called)

    @property
    def range(self) -> str:
        """A sentence about the numbers that are allowed, such as ``Above 0 and at most 1.``; or nothing."""
        option = self.option
        if option.minimum is not None and option.maximum is not None:
            return f"{option.minimum:g} to {option.maximum:g}."
        limits = {
            "at least": option.minimum,
            "above": option.above,
            "at most": option.maximum,
            "below": option.below,
        }
        said = " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)
        return f"{said[0].upper()}{said[1:]}." if said else ""

    @property
    def expects(self) -> str:
        spell = literal if self.of else str
        return ", or ".join(_in_words(kind, spell) for kind in self.kinds)

    def check(self, value: Any, called: str = "") -> Any:
        """The value in the setting's type.

        Args:
            called: what a refusal calls the setting, where that is not its name.

        Raises:
            UserError: names the setting, what was given and what would be right.
        """
        title = called or (f"{self.of}: {self.name}" if self.of else self.name)
        if value is None and self.optional:
            return None
        if value is None and not self.of:
            raise UserError(f"{title} must be set")
        for kind in self.kinds:
            if (converted := _as(kind, value)) is not None:
                for number in converted if isinstance(converted, tuple) else (converted,):
                    self._check_range(title, number)
                return converted
        raise UserError(f"{title} must be {self.expects}, not {value!r}", self.cure(value))

    def cure(self, value: Any) -> str:
        near = difflib.get_close_matches(str(value), list(map(str, self.choices)), 1)
        if near:
            return f"did you mean {near[0]}?"
        if self.of and self.default is None:
            return f"leave it out, or see: vitkd methods {self.of}"
        if self.of:
            return f"as in {self.of}({self.name}={literal(self.default)})"
        several = self.kind is tuple and not self.repeated
        such = "1,5,10" if several and get_args(self.kinds[0])[0] is int else "0.9,0.999"
        return f"write the values with commas and no spaces, such as {such}" if several else ""

    def _check_range(self, title: str, value: Any) -> None:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{title} must be a finite number, not {value}", self.cure(value))
        cure = self.cure(value) if self.of else ""
        shown = f"{value:g}" if abs(value) < 1e300 else f"a number of {len(str(abs(int(value))))} digits"
        option = self.option
        high = _LARGEST if option.maximum is None and isinstance(value, int) else option.maximum
        if option.minimum is not None and value < option.minimum:
            raise UserError(f"{title} must be at least {option.minimum:g}, not {shown}", cure)
        if high is not None and value > high:
            raise UserError(f"{title} must be at most {high:g}, not {shown}", cure)
        if option.above is not None and value <= option.above:
            raise UserError(f"{title} must be above {option.above:g}, not {shown}", cure)
        if option.below is not None and value >= option.below:
            raise UserError(f"{title} must be below {option.below:g}, not {shown}", cure)


def declared(owner: Callable[..., Any], of: str = "") -> Mapping[str, Field]:
    """The settings of a request's class, of a term's class, or of a macro, in order.

    A term's are those that its class body or a base's gives a default, the class's own first, then the
    keyword-only ones of its constructor; a macro's are keyword-only.

    Args:
        of: the word that a term goes by.
    """
    return _declared(owner, of)


@cache
def _declared(owner: Any, of: str) -> Mapping[str, Field]:
    found = {}
    if isinstance(owner, type) and is_dataclass(owner):
        hints = get_type_hints(owner, include_extras=True)
        panels = {
            name: getattr(part, "panel", "")
            for part in reversed(owner.mro())
            for name in vars(part).get("__annotations__", ())
        }
        for field in fields(owner):
            found[field.name] = _field(field.name, hints[field.name], field.default, panels[field.name])
        return types.MappingProxyType(found)
    if isinstance(owner, type) and _takes_any_option(owner):
        hints = get_type_hints(owner, include_extras=True)
        for name in (name for part in owner.mro() for name in vars(part)):
            if hasattr(hints.get(name), "__metadata__") and name not in found:
                found[name] = _field(name, hints[name], getattr(owner, name), of=of or owner.__name__)
    function = cast(Any, owner).__init__ if isinstance(owner, type) else owner
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
            continue
        if not hasattr(hints.get(name), "__metadata__") or parameter.default is parameter.empty:
            raise UserError(
                f"{owner.__module__}: {owner.__name__} does not say type, help and default of '{name}'",
                f'declare it as {name}: Annotated[float, "What it is."] = 1.0',
            )
        found[name] = _field(name, hints[name], parameter.default, of=of or owner.__name__)
    return types.MappingProxyType(found)


def _takes_any_option(owner: type) -> bool:
    """Not so a class whose own constructor lists its options."""
    own = vars(owner).get("__init__")
    kinds = [parameter.kind for parameter in inspect.signature(own).parameters.values()] if own else []
    return own is None or inspect.Parameter.VAR_KEYWORD in kinds


def _field(name: str, hint: Any, default: Any, panel: str = "", of: str = "") -> Field:
    """Of ``Annotated[type, Option(…)]``, or of ``Annotated[type, "help"]``, which is enough for a term."""
    inner, option = get_args(hint)[:2]
    option = Option(option) if isinstance(option, str) else option
    kinds = get_args(inner) if _is_union(inner) else (inner,)
    several = tuple(kind for kind in kinds if kind is not types.NoneType)
    kind = Union[several] if len(several) > 1 else several[0]  # noqa: UP007  # a tuple of any length
    optional = len(several) < len(kinds) or (kind is Any and default is None)
    return Field(name, kind, optional, default, option, option.panel or panel, of)


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _as(kind: Any, value: Any) -> Any:
    """A value as the declared type; None if it is none. True and False are no numbers."""
    if kind is Any:
        return value
    if get_origin(kind) is Literal:
        return value if value in get_args(kind) else None
    if get_origin(kind) is tuple:
        return _as_tuple(get_args(kind), value)
    if isinstance(value, bool) or kind is bool:
        return value if isinstance(value, bool) and kind is bool else None
    if kind is float and isinstance(value, int):
        return float(value)
    if kind is str and isinstance(value, PurePath):
        return str(value)
    return value if isinstance(value, kind) else None


def _as_tuple(kinds: tuple[Any, ...], value: Any) -> tuple[Any, ...] | None:
    length = None if Ellipsis in kinds else len(kinds)
    if isinstance(value, str) and (kinds[0] is float or kinds == (int, ...)):  # as a command line has it
        try:
            value = [kinds[0](part) for part in value.split(",") if part.strip()]
        except ValueError:
            return None
    value = value.tolist() if hasattr(value, "tolist") else value  # NumPy's and torch's
    if not isinstance(value, (tuple, list)) and kinds[0] is float:
        return None
    items = value if isinstance(value, (tuple, list)) else (value,)
    converted = tuple(_as(kinds[0], item) for item in items)
    fits = None not in converted and (converted or kinds[0] is not float) and length in (None, len(converted))
    return converted if fits else None


def _in_words(kind: Any, spell: Callable[[Any], str]) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(spell, get_args(kind)))
    if get_origin(kind) is tuple:
        item, *rest = get_args(kind)
        several = {int: "whole numbers", float: "numbers"}.get(item, "texts")
        return several if Ellipsis in rest else f"{len(rest) + 1} {several}"
    return _WORDS.get(kind, "an object")


class Request:
    """What a command is asked: a frozen dataclass of declared settings, which are checked when it is made.

    Attributes:
        panel: of ``--help``, for the settings that a class declares.
    """

    panel: ClassVar[str] = ""

    def __post_init__(self) -> None:
        known = declared(type(self))
        for name, field in known.items():
            object.__setattr__(self, name, field.check(getattr(self, name)))
        for name, field in known.items():
            for other in field.option.excludes:
                if getattr(self, name) != field.default and getattr(self, other) != known[other].default:
                    raise UserError(
                        f"{field.flag} and {known[other].flag} exclude each other", "leave one of them out"
                    )


AnyRequest = TypeVar("AnyRequest", bound=Request)


def takes(request: type[AnyRequest]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let a function of a request be called with the request's settings as well.

    ``export(ExportRequest("runs/x", "onnx", half=True))`` is ``export("runs/x", "onnx", half=True)``.
    """

    def wrap(act: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(act)
        def call(*given: Any, **more: Any) -> Any:
            if given and isinstance(given[0], request):
                return act(*given, **more)
            own = {name: more.pop(name) for name in declared(request) if name in more}
            return act(request(*given, **own), **more)

        return call

    return wrap


# Literals ---------------------------------------------------------------------------------------------


def read_literal(node: ast.expr, *, bare_words: bool = False) -> Any:
    """The value that a piece of text writes: a Python literal, or true, false, none.

    Args:
        bare_words: any other word is text, as on a command line.

    Raises:
        ValueError: it is none.
    """
    if isinstance(node, ast.Name):
        words = {"true": True, "false": False, "none": None}
        word = node.id.lower() if bare_words else node.id
        if word in words or bare_words:
            return words.get(word, node.id)
        raise ValueError("a literal, with quotes if a string")
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise ValueError("a literal") from None


def literal(value: object) -> str:
    """A value as a formula writes it: 3e-5, 1, true, "auto", (0, 1)."""
    match value:
        case bool() | None:
            return str(value).lower()
        case float():
            return repr(value).removesuffix(".0").replace("e-0", "e-").replace("e+", "e")
        case tuple():
            inside = ", ".join(map(literal, value))
            return f"({inside},)" if len(value) == 1 else f"({inside})"
        case str():
            return f'"{value}"'
    return repr(value)


__all__ = ["MISSING", "Field", "Option", "Request", "declared", "literal", "read_literal", "takes"]
