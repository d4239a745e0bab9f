"""``vitkd recipes``: the settings that come with the package."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def _recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one as it is shipped, comments included.", show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print name, summary and values as JSON.")] = False,
) -> None:  # fmt: skip
    """List the recipes that come with vitkd, or print one.

    - `vitkd recipes`

    - `vitkd recipes paper/deit3-s_deit-t`

    - `vitkd recipes finetune > mine.toml`: change it, then `vitkd distill --recipe mine.toml`

    A recipe may build on another, its `base`; `vitkd distill --recipe NAME --print-recipe` prints every
    value and where it comes from.
    """
    from rich.table import Table

    from vitkd_cli.recipe import find_recipe, layers_of, shipped_recipes, summary_of
    from vitkd_cli.terminal import Terminal

    paths = shipped_recipes() if name is None else {name: find_recipe(name)}
    values = {key: {k: v for _, layer in layers_of(p) for k, v in layer.items()} for key, p in paths.items()}
    if as_json:
        listed = [
            {"name": key, "summary": summary_of(path), "values": values[key]} for key, path in paths.items()
        ]
        print(json.dumps(listed if name is None else listed[0]))
    elif name is not None:
        print(paths[name].read_text(encoding="utf-8"), end="")
    else:
        table = Table("recipe", "what it is for", box=None)
        for key, path in paths.items():
            table.add_row(key, summary_of(path))
        Terminal().print(table)
        print("\nrun one: vitkd distill --recipe NAME ...   read one: vitkd recipes NAME")


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("recipes")(_recipes)
