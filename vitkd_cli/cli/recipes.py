"""``vitkd recipes``: the settings that come with the package."""

import json
from dataclasses import dataclass
from typing import Annotated

from vitkd_cli.cli.flags import AsJson, command_of
from vitkd_cli.options import Option, Request


@dataclass(frozen=True)
class RecipesRequest(Request):
    """Which recipe to print."""

    # fmt: off
    name: Annotated[str | None, Option("Print this one as it is shipped, comments included.", argument=True)] = None
    # fmt: on


def _recipes(request: RecipesRequest, shown: AsJson) -> None:
    """List the recipes that come with vitkd, or print one.

    - `vitkd recipes`

    - `vitkd recipes paper/deit3-s_deit-t`

    - `vitkd recipes finetune > mine.toml`: change it, then `vitkd distill --recipe mine.toml`

    A recipe may build on another, its `base`; `vitkd distill --recipe NAME --print-recipe` prints every
    value and where it comes from.
    """
    from vitkd_cli.recipe import find_recipe, layers_of, shipped_recipes, summary_of
    from vitkd_cli.terminal import Terminal

    name = request.name
    paths = shipped_recipes() if name is None else {name: find_recipe(name)}
    values = {key: {k: v for _, layer in layers_of(p) for k, v in layer.items()} for key, p in paths.items()}
    if shown.as_json:
        listed = [
            {"name": key, "summary": summary_of(path), "values": values[key]} for key, path in paths.items()
        ]
        print(json.dumps(listed if name is None else listed[0]))
    elif name is not None:
        print(paths[name].read_text(encoding="utf-8"), end="")
    else:
        rows = ((key, summary_of(path)) for key, path in paths.items())
        Terminal().table(("recipe", "what it is for"), rows)
        print("\nrun one: vitkd distill --recipe NAME ...   read one: vitkd recipes NAME")


command = command_of("recipes", _recipes, RecipesRequest, AsJson)
