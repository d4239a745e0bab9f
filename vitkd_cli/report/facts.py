"""Recipe, data and commands of a run, as others may see them."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from vitkd_cli.data.census import summary
from vitkd_cli.data.images import ImageData, Images
from vitkd_cli.data.listing import differences, read_record
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Recipe, settings
from vitkd_cli.report.found import FoundRun
from vitkd_cli.text import last_name, plain, without_places
from vitkd_cli.training.data import data_of

_WIDTH = 88  # characters of a line of the command
_LOOKED_AT = 32  # validation images whose size is told
_MOST_CLASSES = 100  # whose images are counted one by one
_OF_THE_FOLDER = ("output", "report")


@dataclass(frozen=True)
class DataFacts:
    """What is known of a run's images.

    Attributes:
        lines: sentences.
        classes: name and training images of each; empty where there are many, or nobody knows.
    """

    lines: Sequence[str]
    classes: Sequence[tuple[str, int]] = ()


def changes_of(recipe: Recipe) -> list[tuple[str, str, str]]:
    """(setting, value, default) of what is not the default, as others may see it."""
    public = recipe.public()
    return [
        (field.name, _shown(getattr(public, field.name)), _shown(field.default))
        for field in settings()
        if field.name not in _OF_THE_FOLDER and getattr(public, field.name) != field.default
    ]


def command_of_run(recipe: Recipe) -> str:
    """The command that makes the run, on lines of a page's width; files are named without their folders."""
    public = recipe.public()
    pieces = ["vitkd distill"]
    for field in settings():
        value = getattr(public, field.name)
        if value is None or value == field.default or field.name in _OF_THE_FOLDER:
            continue
        if field.repeated:
            pieces += [shlex.join(field.typed((one,))) for one in value]
        else:
            pieces.append(shlex.join(field.typed(value)))
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < _WIDTH:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}")
    return " \\\n".join(lines)


def _shown(value: object) -> str:
    if value is None or value == ():
        return "–"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return (" · " if isinstance(value[0], str) else ",").join(map(str, value))
    return plain(value)


def opened_data(found: FoundRun) -> ImageData:
    """The run's images, where they are still there; nothing is decoded.

    Raises:
        UserError: they are gone, or others.
    """
    record = read_record(found.folder / "data.json")
    labelled = record is None or record["classes"] is not None
    data = data_of(found.recipe, labelled, found.folder)
    if record is not None and (changed := differences(record, data.record or {})):
        raise UserError(f"they changed since ({without_places('; '.join(changed))})")
    return data


def data_facts(found: FoundRun, data: ImageData | None) -> DataFacts:
    """From the images if they are at hand, else from what the run wrote down of them."""
    record, lines = read_record(found.folder / "data.json"), [f"Data: {last_name(found.recipe.data or '')}."]
    if record is not None:
        sizes = {split: (record[split] or {}).get("images", 0) for split in ("train", "validation")}
        shots = f", of which {found.recipe.shots} a class are used" if found.recipe.shots else ""
        lines.append(f"{sizes['train']:,} training images{shots}; {sizes['validation']:,} validation images.")
        if record["held_out"]:
            lines.append("The run held the validation images out itself; no model was trained on them.")
    if data is None:
        return DataFacts(lines)
    if data.num_classes:
        lines.append(f"{data.num_classes} classes.")
    lines += [f"{line[0].upper()}{line[1:]}." for line in map(without_places, summary(data)[1:])]
    lines += [f"{note[0].upper()}{note[1:]}." for note in map(without_places, data.notes)]
    names, train, every = data.class_names or (), data.train, data.val
    classes: list[tuple[str, int]] = []
    if isinstance(train, Images) and len(names) <= _MOST_CLASSES:
        images = train.counts()
        classes = [(plain(name), images[index]) for index, name in enumerate(names)]
    if isinstance(every, Images):
        step = max(1, len(every) // _LOOKED_AT)
        seen = [every[index][0].size for index in range(0, len(every), step)][:_LOOKED_AT]
        widths, heights = zip(*seen, strict=True)
        lines.append(
            f"Pictures are {_range(widths)} pixels wide and {_range(heights)} high ({len(seen)} looked at)."
        )
    return DataFacts(lines, classes)


def _range(values: Sequence[int]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
