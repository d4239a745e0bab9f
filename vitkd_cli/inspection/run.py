"""``vitkd inspect-attention``: pictures, a page, numbers and dumps of what one or two models look at."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vitkd_cli.data.images import Images, loose_images
from vitkd_cli.errors import UserError, expanded, writable
from vitkd_cli.files import whole_file, write_text
from vitkd_cli.inspection.draw import draw, draw_matrix, draw_numbers, file_name
from vitkd_cli.inspection.dump import Dump
from vitkd_cli.inspection.images import batches, preprocessing, views_of
from vitkd_cli.inspection.layers import Array, AttentionLayer, Look
from vitkd_cli.inspection.maps import attention_layers, look, why_no_rollout
from vitkd_cli.inspection.numbers import survey
from vitkd_cli.inspection.page import Page
from vitkd_cli.inspection.places import heads_of, query_of
from vitkd_cli.text import csv_cell, plain
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.model import AnyModel, Model

FEWEST_FOR_CKA, ENOUGH_FOR_CKA = 4, 512


@dataclass(frozen=True, eq=False)
class Inspection:
    """What was found, and where it lies.

    Attributes:
        models: how they are called; the teacher, then the student.
        images: that were counted.
        rows: for each model those of :meth:`vitkd_cli.inspection.numbers.Numbers.rows`.
        divergence: ``[teacher's layers, student's]``, Jensen-Shannon, in nats; NaN where left out; None for
            one model.
        cka: ``[teacher's blocks, student's]``.
        notes: what a reader of the numbers should know.
        files: that were written.
    """

    models: tuple[str, ...]
    images: int
    rows: tuple[list[dict[str, Any]], ...]
    divergence: Array | None
    cka: Array | None
    notes: tuple[str, ...]
    files: tuple[Path, ...]

    def as_json(self) -> dict[str, Any]:
        """As ``numbers.json`` has it: None for what there is not."""
        models = zip(self.models, self.rows, strict=True)
        return {
            "images": self.images,
            "models": [{"model": name, "rows": rows} for name, rows in models],
            "jensen_shannon": _listed(self.divergence),
            "cka": _listed(self.cka),
            "notes": self.notes,
        }


def _listed(values: Array | None) -> list[list[float | None]] | None:
    if values is None:
        return None
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def inspect_attention(
    models: AnyModel | Sequence[AnyModel],
    images: Images | str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    layers: str = "all",
    heads: str = "mean",
    query: str | None = None,
    rollout: bool = False,
    dump: Path | None = None,
    pictures: int = 4,
    batch_size: int = 8,
    each: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Inspection:
    """Look at images with one model, or with a teacher and a student.

    Args:
        models: names, folders or built models, these on the device that they are to run on.
        images: all of which are counted; or files and folders.
        output: a folder for PNGs, ``attention.html`` and the numbers.
        layers: ``all``, or indices such as ``0,1,-1`` into the layers of each model.
        heads, query: as :func:`vitkd_cli.inspection.draw.draw` has them; without a query the class token, or
            all patches where there is none.
        dump: an open folder for the maps.
        pictures: of the first so many images; so many are dumped.
        each: told what goes on, images done and in all.

    Raises:
        UserError: a model none of whose maps can be read; layers, heads or a query that there are not; no
            rollout; an image that cannot be read.
    """
    several = models if isinstance(models, Sequence) and not isinstance(models, str) else [models]
    opened = [open_model(model) for model in several]
    if not isinstance(images, Images):
        images = loose_images([images] if isinstance(images, (str, Path)) else images)
    names = _titles(opened)
    every = [attention_layers(built) for built in opened]
    for name, found in zip(names, every, strict=True):
        if all(layer.kind == "none" for layer in found):
            raise UserError(f"{name} has no attention map to read: {found[0].why}", "inspect another model")
    against = [why_no_rollout(found) for found in every]
    if rollout and all(against):
        raise UserError(f"--rollout: {names[0]}: {against[0]}", "leave it out")
    chosen = [_chosen(layers, found, name) for name, found in zip(names, every, strict=True)]
    typed, query = query, _asked(query, opened, every, names)
    blank = [
        Look(name, "", np.zeros((1, 1, 3), np.uint8), tuple(found[i] for i in indices), ())
        for name, found, indices in zip(names, every, chosen, strict=True)
    ]
    at = query_of(query, blank)
    heads_of(heads, blank)

    output = open_output(expanded(output), overwrite=True)
    files: list[Path] = []
    titles = _titles(opened, _in_pictures)
    page = Page(" and ".join(titles), heads, at if typed else None)
    dumped = Dump(dump, preprocessing(opened), heads) if dump else None
    views = views_of(opened)
    pictures = min(pictures, len(images))
    classes = [_class_of(images, label) for label in images.labels()[:pictures]]
    called = [_called(images.path(index), of) for index, of in enumerate(classes)]
    if len({file_name(name) for name in called}) < pictures:
        called = [f"{index}-{name}" for index, name in enumerate(called)]
    for index, name in enumerate(called):
        each("drawing", index, pictures)
        image = images[index][0]
        looks = [
            look(
                built,
                found,
                title,
                name,
                view(image),
                truth=classes[index],
                dtype=np.float32 if dumped else np.float16,
            )
            for built, found, title, view in zip(opened, every, titles, views, strict=True)
        ]
        if dumped:
            dumped.add(images.path(index), (image.height, image.width), opened, looks, chosen)
        looks = [_pictured(one, indices) for one, indices in zip(looks, chosen, strict=True)]
        files += draw(looks, output, query=query, heads=heads, rollout=rollout)
        page.add(looks)
    files.append(page.write(output / "attention.html"))
    if dumped:
        files.append(dumped.close())

    numbers, divergences, cka = survey(
        list(zip(opened, every, strict=True)),
        batches(images, opened, batch_size),
        each=lambda done: each("counting", done, len(images)),
    )
    rows = tuple(one.rows() for one in numbers)
    by_head = [
        (name, [row for row in some if row["head"] is not None])
        for name, some in zip(titles, rows, strict=True)
    ]
    files.append(draw_numbers(by_head, output / "numbers.png"))
    notes = [*images.notes, *_notes(names, every, opened)]
    if divergences is not None and cka is not None:
        for stem, values, title, note in (
            (
                "jensen-shannon",
                divergences.values(),
                "Jensen-Shannon divergence of the maps",
                divergences.left_out,
            ),
            (
                "cka",
                cka.values(),
                "linear CKA of the block outputs",
                rough_cka(cka.count, undefined=bool(np.isnan(cka.values()).any())),
            ),
        ):
            path = output / f"{stem}.png"
            if not np.isnan(values).all():
                files.append(
                    draw_matrix(values, path, title=title, rows=titles[0], columns=titles[1], note=note)
                )
            notes += [note] if note else []
    inspection = Inspection(
        tuple(names),
        len(images),
        rows,
        None if divergences is None else divergences.values(),
        None if cka is None else cka.values(),
        tuple(notes),
        (*files, output / "numbers.json", output / "numbers.csv"),
    )
    write_text(output / "numbers.json", json.dumps(inspection.as_json(), indent=1))
    with whole_file(output / "numbers.csv") as beside, beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["model", *rows[0][0]])
        writer.writeheader()
        for name, some in zip(names, rows, strict=True):
            writer.writerows({"model": csv_cell(name), **row} for row in some)
    return inspection


def open_output(folder: Path, *, overwrite: bool = False, flag: str = "--output") -> Path:
    """Make a folder that can be written to.

    Raises:
        UserError: it cannot, or it holds something and ``overwrite`` is not set.
    """
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{flag} {folder} is not empty", "name another, or --overwrite to write into it")
    return writable(folder / "index", flag).parent


def _titles(models: Sequence[Model], of: Callable[[Model], str] = lambda built: built.spec.name) -> list[str]:
    """What each is called; of two, with its role."""
    if len(models) == 1:
        return [of(models[0])]
    return [f"{role} {of(built)}" for role, built in zip(("teacher", "student"), models, strict=True)]


def _in_pictures(built: Model) -> str:
    """A folder by the end of its path, without the ``student`` that every run has."""
    if not built.weights.startswith("local-dir:"):
        return built.spec.name
    *above, last = expanded(built.spec.name).absolute().parts
    return plain("/".join((above if last == "student" else [*above, last])[-2:]))


def _class_of(images: Images, label: int) -> str:
    return plain(images.class_names[label]) if 0 <= label < len(images.class_names) else ""


def _called(path: str, of: str) -> str:
    """An image's name in pictures, below its class: ``cat/01.jpg``."""
    name = plain(Path(path).name)
    return f"{of}/{name}" if of else name


def _chosen(text: str, layers: Sequence[AttentionLayer], name: str) -> list[int]:
    """Indices from ``all`` or ``0,1,-1``."""
    if text == "all":
        return list(range(len(layers)))
    if not re.fullmatch(r"-?\d+(,-?\d+)*", text):
        raise UserError(f"--layers {text}: neither all nor numbers", "such as --layers 0,1,-1")
    indices = [int(part) for part in text.split(",")]
    for index in indices:
        if not -len(layers) <= index < len(layers):
            raise UserError(
                f"--layers {index}: {name} has {len(layers)} layers that attend",
                f"0 to {len(layers) - 1}, or -1 to {-len(layers)} from the end",
            )
    return list(dict.fromkeys(index % len(layers) for index in indices))


def _asked(
    query: str | None,
    models: Sequence[Model],
    every: Sequence[Sequence[AttentionLayer]],
    names: Sequence[str],
) -> str:
    """The query; unset, the class token where there is one."""
    has_class = [
        built.spec.class_token or any(layer.kind == "class" for layer in layers)
        for built, layers in zip(models, every, strict=True)
    ]
    if query == "cls" and not any(has_class):
        raise UserError(f"--query cls: {' and '.join(names)} has no class token", "--query all, or ROW,COL")
    return query or ("cls" if any(has_class) else "all")


def _pictured(seen: Look, indices: Sequence[int]) -> Look:
    """The chosen layers; of windows that cannot be put back on the image, why."""
    layers, maps = [], []
    for index in indices:
        layer, map_ = seen.layers[index], seen.maps[index]
        if layer.kind == "windows" and layer.windows is None:
            layer, map_ = replace(layer, kind="none", why=_NO_PLACE), None
        layers.append(layer)
        maps.append(map_)
    return replace(seen, layers=tuple(layers), maps=tuple(maps))


_NO_PLACE = "its windows pool their queries, or are of pixels within patches: they have no place on the grid"


def _notes(
    names: Sequence[str], every: Sequence[Sequence[AttentionLayer]], models: Sequence[Model]
) -> list[str]:
    notes = []
    if len(models) == 2:
        crop = ", ".join(f"{key} {value}" for key, value in preprocessing(models).items())
        notes.append(f"both see the part of an image that the student is evaluated on: {crop}")
    for name, layers in zip(names, every, strict=True):
        if any(layer.mixed for layer in layers):
            notes.append(
                f"{name}: rows of its maps need not sum to 1 (talking heads or differential attention); "
                "its numbers are of their magnitudes, scaled to do so"
            )
    return notes


def rough_cka(images: int, *, undefined: bool = False) -> str:
    """A warning where CKA has seen too few images, or features that do not differ between them."""
    if images < FEWEST_FOR_CKA:
        return f"CKA needs {FEWEST_FOR_CKA} images, and there {'is 1' if images == 1 else f'are {images}'}"
    if undefined:
        return "CKA is undefined where a block has the same features for every image"
    enough = images >= ENOUGH_FOR_CKA
    return "" if enough else f"CKA of {images} images is rough: --num-images {ENOUGH_FOR_CKA} or more"
