"""Where a model comes from, as far as its folder or weight file says."""

import json
import tomllib
from collections import Counter
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.listing import Files, digest_of
from vitkd_cli.errors import UserError, expanded
from vitkd_cli.recipe import Recipe, recipe_of
from vitkd_cli.text import folder_in
from vitkd_cli.vit.names import resolve


class ModelOrigin:
    """The run that a model came out of, and what it wrote of its images.

    Args:
        typed: the model as a person types it, or the file with its weights.

    Attributes:
        run: the folder of its run; None if there is none.
    """

    def __init__(self, typed: str) -> None:
        self.typed, self._told_by = typed, expanded(typed)
        if not self._told_by.is_file():
            name = resolve(typed).name  # says what is wrong with a name, or that a run has no student yet
            self._told_by = expanded(name.removeprefix("local-dir:")) / "config.json"
        path = expanded(typed.removeprefix("local-dir:"))
        # RUN, RUN/student, RUN/distilled-42/student, RUN/arms/kd-42/student, or a file in one of these
        places = (path, *path.parents[:4]) if path.exists() else ()
        self.run = next((place for place in places if (place / "recipe.toml").is_file()), None)

    @cached_property
    def recipe(self) -> Recipe | None:
        return recipe_of(self.run) if self.run else None

    @cached_property
    def told(self) -> dict[str, Any]:
        """What our run wrote of its student, and the names of its classes."""
        try:
            if self._told_by.suffix == ".safetensors":
                with safe_open(self._told_by, "pt") as file:
                    return dict(json.loads((file.metadata() or {}).get("vitkd", "{}")))
            if self._told_by.suffix != ".json":
                return {}
            config = json.loads(self._told_by.read_bytes())
            return {**(config.get("vitkd") or {}), "class_names": config.get("label_names")}
        except (OSError, ValueError, TypeError, AttributeError, SafetensorError):
            return {}  # a name of timm's, or whoever opens the model will say what is wrong

    @property
    def images(self) -> dict[str, Any]:
        """Those of its run (:func:`vitkd_cli.data.listing.carried`)."""
        images = self.told.get("images")
        return images if isinstance(images, dict) else {}

    @property
    def held_out(self) -> Files:
        """The files that its run set aside itself."""
        files = (self.images.get("validation") or {}).get("files") if self.images.get("held_out") else None
        return {name: (size, label) for name, (size, label) in (files or {}).items()}

    @cached_property
    def decoding(self) -> Decoding | None:
        """How its run read pictures; None where it does not say."""
        try:
            told, keys = tomllib.loads(self.told["recipe"]), [field.name for field in fields(Decoding)]
            recipe = Recipe(**{key: told[key] for key in keys if key in told})  # checks types and ranges
            return Decoding(**{key: getattr(recipe, key) for key in keys})
        except (KeyError, TypeError, ValueError, UserError):
            return None

    def learned_from(self, data: str) -> bool:
        """Is this the place that its run's training images, or validation images, were read from?"""
        recipe = self.recipe
        return recipe is not None and any(
            same_place(place, data) for place in (recipe.data, recipe.val_data) if place
        )

    def warnings(self, files: Files) -> tuple[str, ...]:
        """Say so where it was trained on these images, or may have been."""
        if digest_of(files) == (self.images.get("train") or {}).get("digest"):
            return (f"{self.typed} was trained on these images",)
        held, here = (
            Counter((Path(name).name, size) for name, (size, _) in some.items())
            for some in (self.held_out, files)
        )
        alike = (held & here).total()
        if 2 * alike <= held.total() or len(files) == held.total():
            return ()
        return (
            f"{alike:,} of these images have name and size of ones that {self.typed} held out, and lie "
            "in other folders: it may have been trained on the rest",
        )


def same_place(one: str, other: str) -> bool:
    (kind, place), (other_kind, other_place) = folder_in(one), folder_in(other)
    same = expanded(place).resolve() == expanded(other_place).resolve()
    return one == other or (kind == other_kind and same)
