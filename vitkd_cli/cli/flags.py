"""Commands whose flags are read off the declarations of their request."""

import atexit
import gc
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from vitkd_cli.errors import UserError
from vitkd_cli.options import MISSING, Field, Option, Request, declared


@dataclass(frozen=True, kw_only=True)
class AsJson(Request):
    """How a command shows facts."""

    panel = "Results"

    as_json: Annotated[bool, Option("Print JSON, and nothing else on stdout.", flag="--json")] = False


@dataclass(frozen=True, kw_only=True)
class Silent(Request):
    """How much a command says."""

    panel = "Results"

    quiet: Annotated[bool, Option("No progress bar.", short=("-q",))] = False


@dataclass(frozen=True, kw_only=True)
class Shown(Silent, AsJson):
    """How a command shows its result."""


def command_of(name: str, act: Callable[..., Any], *requests: type[Request]) -> Callable[..., None]:
    """A command that hands ``act`` one object for each of ``requests``; its help is ``act``'s docstring."""

    def command(**values: Any) -> None:
        given = {key: value for key, value in values.items() if value not in (None, [])}
        for request in requests:
            for key, field in declared(request).items():
                if key in given:
                    check_typed(field, given[key], name)
        act(*(r(**{key: given[key] for key in declared(r) if key in given}) for r in requests))

    parameters = [parameter(field) for request in requests for field in declared(request).values()]
    return published(name, command, act.__doc__, parameters)


def check_typed(field: Field, value: Any, command: str) -> None:
    """Check what was typed; a refusal names the flag."""
    try:
        field.check(value, field.flag)
    except UserError as problem:
        raise UserError(problem.message, problem.hint or f"vitkd {command} --help") from None


def published(
    name: str,
    command: Callable[..., None],
    help: str | None,
    parameters: Sequence[inspect.Parameter],
    first: Sequence[str] = (),
) -> Callable[..., None]:
    """A function as Typer takes it, with these parameters; those of ``first`` come first."""
    order = [*first, *(parameter.name for parameter in parameters)]
    shown = sorted(parameters, key=lambda parameter: order.index(parameter.name))
    command.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    command.__name__, command.__doc__ = name, help
    return command


def parameter(field: Field, *, first: Sequence[str] = (), layered: bool = False) -> inspect.Parameter:
    """A setting as a parameter that Typer understands; what is not typed is None.

    Args:
        first: settings that the short help shows, in this order; the others are hidden. Empty: it shows all.
        layered: a file may have set it, so a switch can be switched back.
    """
    option, kind = field.option, field.kind if field.kind in (bool, int, float) else str
    choices = "|".join(map(str, field.choices))
    text = f"{option.help} [{choices}]" if choices else option.help
    help = text.replace("[", r"\[")
    hint: Any = list[str] if field.repeated else kind
    if option.argument:
        spec: Any = typer.Argument(help=help, metavar=option.metavar, show_default=False)
    else:
        flag = field.flag
        if kind is bool and (layered or field.default in (True, None)):
            flag += f"/{field.off}"
        # What a file may have set has its default there, and Typer is told of it for the help alone.
        default = field.default if not layered and kind in (int, float, str) else None
        default = None if default in (MISSING, "", ()) else default
        told = option.unset or (_told(field) if layered or field.default is True else "")
        spec = typer.Option(
            flag,
            *option.short,
            help=help,
            metavar=option.metavar,
            show_default=told or default is not None,
            rich_help_panel=None if field.name in first else field.panel or None,
            hidden=bool(first) and field.name not in first,
        )
    keyword = inspect.Parameter.KEYWORD_ONLY
    if field.default is MISSING:
        return inspect.Parameter(field.name, keyword, annotation=Annotated[hint, spec])
    unset = None if option.argument else default
    return inspect.Parameter(field.name, keyword, default=unset, annotation=Annotated[hint | None, spec])


def _told(field: Field) -> str:
    """A default in words."""
    if field.kind is bool:
        return "on" if field.default else "off"
    return "" if field.default in (None, "", ()) else shown(field.default)


def shown(value: Any) -> str:
    """A value as a flag takes it."""
    if isinstance(value, tuple) and any(isinstance(text, str) for text in value):
        return ", ".join(f'"{text}"' for text in value)
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


@contextmanager
def waking(quiet: bool = False, what: str = "loading torch and timm") -> Iterator[None]:
    """A sign of life, on stderr, for what takes seconds."""
    from vitkd_cli.terminal import Terminal

    with Terminal(stderr=True, quiet=quiet).status(what), _uncollected():
        yield


@contextmanager
def _uncollected() -> Iterator[None]:
    """No search for garbage while torch and timm are imported, a fifth of their time, nor later among them."""
    first = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            atexit.register(gc.unfreeze)  # else extension modules report their functions as leaked at exit
        gc.enable()


@contextmanager
def progress(title: str, *, silent: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, so that stdout holds the result alone; told a stage, what is done, and of how much."""
    from vitkd_cli.progress import Reporter
    from vitkd_cli.terminal import Terminal

    reporter = Reporter(Terminal(stderr=True), silent=silent)
    with reporter.bar(title, 0):
        yield lambda stage, done, total: reporter.advance(done, stage, total=total)


@contextmanager
def told_of_stops(what: str, again: str) -> Iterator[None]:
    """Turn Ctrl-C into ``what``, with ``again`` for a hint."""
    try:
        yield
    except KeyboardInterrupt:
        from vitkd_cli.data.keyed import abandon_workers

        abandon_workers()
        raise UserError(what, again, exit_code=130) from None
