"""Commands whose flags are the recipe's beside their own: a file may have set what is not typed."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from vitkd_cli.cli.flags import parameter, published
from vitkd_cli.options import Request, declared
from vitkd_cli.recipe import settings


def layered_command(
    name: str, act: Callable[..., None], help: str, requests: Sequence[type[Request]], first: Sequence[str]
) -> Callable[..., None]:
    """A command that hands ``act`` an object for each of ``requests``, the recipe's flags that were given,
    and the names of the requests' own that were.

    Args:
        first: settings that the short help shows, in this order; ``--help-all`` shows the rest. Of two that
            go by one name, that of ``requests`` counts.
    """
    own = {key: field for request in requests for key, field in declared(request).items()}

    def command(help_all: bool, **values: Any) -> None:
        given = {key: value for key, value in values.items() if value is not None}
        typed = own.keys() & given.keys()
        parts = [r(**{key: given.pop(key) for key in declared(r) if key in given}) for r in requests]
        act(*parts, given, typed)

    every = typer.Option("--help-all", help="Show every flag and exit.", is_eager=True, callback=_help_all)
    parameters = [
        inspect.Parameter(
            "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, every]
        ),
        *(parameter(field, first=first, layered=True) for field in settings() if field.name not in own),
        *(parameter(field, first=first, layered=field.kind is not bool) for field in own.values()),
    ]
    return published(name, command, help, parameters, first)


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit
