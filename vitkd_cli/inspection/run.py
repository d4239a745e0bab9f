"""``vitkd inspect-attention``: pictures, a page, numbers and dumps of what one or two models look at."""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitkd_cli.data.images import Images
from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError, expanded, writable
from vitkd_cli.evaluation.writing import as_csv
from vitkd_cli.files import write_text
from vitkd_cli.inspection.draw import draw, draw_matrix, draw_numbers, file_name
from vitkd_cli.inspection.dump import Dump
from vitkd_cli.inspection.images import batches, images_of, open_models, preprocessing, views_of
from vitkd_cli.inspection.kinds import Array, AttentionLayer
from vitkd_cli.inspection.maps import (
    attention_layers,
    image_attention,
    parse_heads,
    parse_layers,
    parse_query,
    why_no_rollout,
)
from vitkd_cli.inspection.numbers import rough_cka, survey
from vitkd_cli.inspection.page import Page
from vitkd_cli.inspection.teachers import Candidates, compare_teachers
from vitkd_cli.options import takes
from vitkd_cli.requests import InspectRequest
from vitkd_cli.text import plain
from vitkd_cli.vit.model import Model


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


def _listed(values: Array | None) -> Any:
    rows = () if values is None else values.tolist()
    return [[None if np.isnan(value) else value for value in row] for row in rows] or None


@dataclass(frozen=True, eq=False)
class _Inspected:
    """A model to look at.

    Attributes:
        chosen: indices of the layers to draw and dump.
        name: as the numbers call it.
        title: as pictures call it.
    """

    model: Model
    layers: tuple[AttentionLayer, ...]
    chosen: list[int]
    name: str
    title: str

    @property
    def drawn(self) -> list[AttentionLayer]:
        return [self.layers[index] for index in self.chosen]


@takes(InspectRequest)
def inspect_attention(
    request: InspectRequest, *, progress: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Inspection | Candidates:
    """Look at images with one model, or with a teacher and a student; with ``teachers``, compare these.

    Args:
        request: or its settings, the models and the images first.
        progress: told the stage, images done and in all.
    """
    if len(request.models) > 2:
        raise UserError(f"there are {len(request.models)} models", "name one, or a teacher and its student")
    if request.teachers:
        return compare_teachers(request, progress=progress)
    device_named(request.device)  # refused before any work
    images, at = images_of(request), request.output or f"attention-{time.strftime('%Y%m%d-%H%M%S')}"
    with (
        _folder(at, "--output", request.overwrite) as output,
        _folder(request.dump, "--dump", request.overwrite) as dump,
    ):
        assert output is not None
        progress("opening the models", 0, 0)
        subjects = _inspected(request)
        query = _query(request, subjects)
        models, layers = [one.model for one in subjects], [one.layers for one in subjects]
        files = _pictures(request, subjects, images, query, output, dump, progress)
        numbers, divergences, cka = survey(
            list(zip(models, layers, strict=True)),
            batches(images, models, request.batch_size),
            progress=lambda done: progress("counting", done, len(images)),
        )
    rows, titles = tuple(one.rows() for one in numbers), [one.title for one in subjects]
    of_heads = [[row for row in some if row["head"] is not None] for some in rows]
    files.append(draw_numbers(list(zip(titles, of_heads, strict=True)), output / "numbers.png"))
    notes = [*images.notes, *_notes(subjects)]
    if divergences is not None and cka is not None:
        unknown = bool(np.isnan(cka.values()).any())
        of_maps = ("jensen-shannon", "Jensen-Shannon divergence of the maps", divergences.left_out)
        of_blocks = ("cka", "linear CKA of the block outputs", rough_cka(cka.count, undefined=unknown))
        for (stem, title, note), values in ((of_maps, divergences.values()), (of_blocks, cka.values())):
            if not np.isnan(values).all():
                path = output / f"{stem}.png"
                draw_matrix(values, path, title=title, rows=titles[0], columns=titles[1], note=note)
                files.append(path)
            notes += [note] if note else []
    inspection = Inspection(
        tuple(one.name for one in subjects),
        len(images),
        rows,
        None if divergences is None else divergences.values(),
        None if cka is None else cka.values(),
        tuple(notes),
        (*files, output / "numbers.json", output / "numbers.csv"),
    )
    _write(inspection, output)
    return inspection


@contextmanager
def _folder(place: str | None, flag: str, overwrite: bool) -> Iterator[Path | None]:
    """A folder that can be written to; it is removed if it is still empty when the user is refused."""
    if place is None:
        yield None
        return
    folder = expanded(place)
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"{flag} {folder} is not empty", "name another, or --overwrite to write into it")
    writable(folder / "index", flag)
    try:
        yield folder
    except UserError:
        with suppress(OSError):  # it holds something
            folder.rmdir()
        raise


def _inspected(request: InspectRequest) -> list[_Inspected]:
    """The models of a request, and what of them is asked for."""
    models = open_models(request)
    roles = ["teacher ", "student "] if len(models) == 2 else [""]
    subjects = []
    for role, model in zip(roles, models, strict=True):
        layers, name = attention_layers(model), role + model.spec.name
        if all(layer.why for layer in layers):
            raise UserError(f"{name} has no attention map to read: {layers[0].why}", "inspect another model")
        chosen = parse_layers(request.layers, layers, name)
        subjects.append(_Inspected(model, layers, chosen, name, role + _in_pictures(model)))
    against = [why_no_rollout(one.layers) for one in subjects]
    if request.rollout and all(against):
        raise UserError(f"--rollout: {subjects[0].name}: {against[0]}", "leave it out")
    parse_heads(request.heads, [one.drawn for one in subjects])
    return subjects


def _query(request: InspectRequest, subjects: Sequence[_Inspected]) -> str:
    """The query; unset, the class token where there is one."""
    asks = any(layer.class_token for one in subjects for layer in one.layers)
    names = " and ".join(one.name for one in subjects)
    if request.query == "cls" and not asks:
        raise UserError(f"--query cls: {names} has no class token", "--query all, or ROW,COL")
    query = request.query or ("cls" if asks else "all")
    parse_query(query, [one.drawn for one in subjects])
    return query


def _in_pictures(model: Model) -> str:
    """A folder by the end of its path, without the ``student`` that every run has."""
    if not model.weights.startswith("local-dir:"):
        return model.spec.name
    *above, last = expanded(model.spec.name).absolute().parts
    return plain("/".join((above if last == "student" else [*above, last])[-2:]))


def _pictures(
    request: InspectRequest,
    subjects: Sequence[_Inspected],
    images: Images,
    query: str,
    output: Path,
    dump: Path | None,
    progress: Callable[[str, int, int], None],
) -> list[Path]:
    """Draw and dump the first images, and write the page of them."""
    models, layers = [one.model for one in subjects], [one.layers for one in subjects]
    chosen, titles = [one.chosen for one in subjects], [one.title for one in subjects]
    files: list[Path] = []
    opens_with = parse_query(query, [one.drawn for one in subjects]) if request.query else None
    page = Page(" and ".join(titles), request.heads, opens_with)
    dumped, dtype = None, np.float32 if dump else np.float16
    if dump:
        whole = list(zip(models, layers, chosen, strict=True))
        dumped = Dump(dump, whole, preprocessing(models), request.heads)
    views, named = views_of(models), _named(images, min(request.num_pictures, len(images)))
    for index, (name, truth) in enumerate(named):
        progress("drawing", index, len(named))
        image = images[index][0]
        seen = [
            image_attention(
                one.model, one.layers, view(image), dtype, title=one.title, name=name, truth=truth
            )
            for one, view in zip(subjects, views, strict=True)
        ]
        if dumped:
            dumped.add(images.path(index), (image.height, image.width), seen)
        seen = [one.chosen(indices) for one, indices in zip(seen, chosen, strict=True)]
        files += draw(seen, output, query=query, heads=request.heads, rollout=request.rollout)
        page.add(seen)
    files.append(page.write(output / "attention.html"))
    return [*files, dumped.close()] if dumped else files


def _named(images: Images, count: int) -> list[tuple[str, str]]:
    """The first images' names in pictures, below their class, as ``cat/01.jpg``; and that class."""
    known = [plain(name) for name in images.class_names]
    classes = [known[label] if 0 <= label < len(known) else "" for label in images.labels()[:count]]
    files = (plain(Path(images.path(index)).name) for index in range(count))
    names = [f"{of}/{file}" if of else file for of, file in zip(classes, files, strict=True)]
    if len({file_name(name) for name in names}) < count:
        names = [f"{index}-{name}" for index, name in enumerate(names)]
    return list(zip(names, classes, strict=True))


def _notes(subjects: Sequence[_Inspected]) -> list[str]:
    notes = [f"{one.name}: {note}" for one in subjects for note in one.model.notes]
    if len(subjects) == 2:
        shared = preprocessing([one.model for one in subjects])
        crop = ", ".join(f"{key} {value}" for key, value in shared.items())
        notes.append(f"both see the part of an image that the student is evaluated on: {crop}")
    for one in subjects:
        if any(layer.mixed for layer in one.layers):
            notes.append(
                f"{one.name}: rows of its maps need not sum to 1 (talking heads or differential attention); "
                "its numbers are of their magnitudes, scaled to do so"
            )
    return notes


def _write(inspection: Inspection, output: Path) -> None:
    """``numbers.json`` and ``numbers.csv``."""
    write_text(output / "numbers.json", json.dumps(inspection.as_json(), indent=1))
    rows = [
        {"model": name, **row}
        for name, rows in zip(inspection.models, inspection.rows, strict=True)
        for row in rows
    ]
    write_text(output / "numbers.csv", as_csv(rows))
