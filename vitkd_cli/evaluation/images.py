"""Which images a model is scored on, and which of its classes theirs are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vitkd_cli.data import Images, named_split, open_data
from vitkd_cli.data.images import Labelled, first_line
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Recipe
from vitkd_cli.vit.build import Built
from vitkd_cli.vit.classes import Match, matched

Named = tuple[Images, list[str] | None]  # images, and the names of their classes in order


def run_of(model: str) -> Path | None:
    """The folder of the run that a student's folder belongs to; None if there is none."""
    path = Path(model.removeprefix("local-dir:")).expanduser()
    # RUN, RUN/student, RUN/teacher/student or RUN/distilled-42/student
    return next((p for p in (path, *path.parents[:2]) if (p / "recipe.toml").is_file()), None)


def held_out(models: Sequence[str], data: str, split: str) -> Named | None:
    """The images that a run set aside itself, if one of these is that run and learned from this folder.

    Raises:
        UserError: two of them set other images aside.
    """
    found: dict[str, Path] = {}
    for run in map(run_of, models) if split == "validation" else ():
        if run is None or not (run / "split.json").is_file():
            continue
        recipe = Recipe.from_toml(run / "recipe.toml")
        if Path(recipe.data or "").expanduser().resolve() == Path(data).expanduser().resolve():
            found.setdefault((run / "split.json").read_text(), run)
    if len(found) > 1:
        raise UserError(
            f"{' and '.join(map(str, found.values()))} set other images of {data} aside",
            "score them on images that none of them learned from",
        )
    for listed, run in found.items():
        recipe = Recipe.from_toml(run / "recipe.toml")
        opened = open_data(data, class_map=recipe.class_map, split_files=json.loads(listed))
        return (opened.val, list(opened.class_names or ()) or None) if opened.val is not None else None
    return None


def classes_in(
    data: str,
    names: Sequence[str] | None,
    built: Built,
    *,
    class_map: str | None = None,
    valid_labels: str | None = None,
) -> Match:
    """Which of a model's classes those of the data are.

    Args:
        names: of the data's classes, in the order of its labels.
        class_map: has put them in the model's order.
        valid_labels: timm's: a file with the model's index of each, one on a line.

    Raises:
        UserError: the data's classes are not the model's.
    """
    if valid_labels:
        rows = _valid_labels(Path(valid_labels).expanduser(), names, built.spec.num_classes)
        return Match(tuple(rows), tuple(names or ()))
    return matched(built, names, data, mapped=class_map is not None)


def images_for(built: Built, model: str, data: str) -> tuple[Images, str]:
    """Validation images with their classes as the model counts them, and a note; a run's own held-out ones.

    Raises:
        UserError: as :func:`classes_in`.
    """
    images, names = held_out([model], data, "validation") or named_split(data)
    if not built.spec.num_classes:
        return images, ""
    found = classes_in(data, names, built)
    if found.rows is None:
        return images, found.note
    return Labelled(images, [found.rows[label] for label in images.labels()]), found.note


def _valid_labels(file: Path, names: Sequence[str] | None, own: int) -> list[int]:
    """timm's list of the classes that data has: an index a line."""
    try:
        rows = [int(line) for line in file.read_text().split()]
    except (OSError, ValueError) as problem:
        raise UserError(
            f"--valid-labels: cannot read {file}: {first_line(problem)}",
            "one of the model's class indices a line",
        ) from None
    if (names is not None and len(names) != len(rows)) or not all(0 <= row < own for row in rows):
        raise UserError(
            f"--valid-labels: {file} lists {len(rows)} classes, the data has "
            f"{len(names or rows)}, the model {own}",
            "a line for each class of the data, with its index in the model",
        )
    return rows
