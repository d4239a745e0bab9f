"""``vitkd inspect-attention``: what a model looks at, or a teacher and its student."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import typer

from vitkd_cli.cli.flags import Shown, add_command, progress, waking
from vitkd_cli.errors import UserError
from vitkd_cli.requests import InspectRequest


def _inspect_attention(request: InspectRequest, shown: Shown) -> None:
    """Draw and count what a model looks at, alone or beside its student.

    - `vitkd inspect-attention deit3_small --images cat.jpg dog.jpg`

    - `vitkd inspect-attention runs/x/teacher/student runs/x/student --data ~/flowers`

    - `vitkd inspect-attention deit_tiny --teachers deit3_small cait_s24 --data ~/imagenet`

    Writes PNGs, attention.html, numbers.json and numbers.csv. docs/attention.md says what they mean.
    """
    models, teachers, quiet = request.models, request.teachers, shown.quiet
    with waking(quiet):
        from vitkd_cli.device import device_named
        from vitkd_cli.evaluation.images import Provenance
        from vitkd_cli.inspection.images import images_to_look_at
        from vitkd_cli.inspection.run import inspect_attention, open_output
        from vitkd_cli.inspection.teachers import compare_teachers
        from vitkd_cli.vit.build import open_model

    if len(models) > 2:
        raise UserError(f"there are {len(models)} models", "name one, or a teacher and its student")
    if teachers and len(models) > 1:
        raise UserError("--teachers is for one model, their student", "name the student alone")
    if teachers and (request.output or request.dump):
        raise UserError(
            "--teachers prints a table and writes no files", "leave the folder out; --json > FILE"
        )
    place = device_named(request.device)
    typed = [*models[:-1], request.checkpoint or models[-1]]
    origin = Provenance(typed)
    data = request.data if request.images else origin.data(request.data)
    found = images_to_look_at(request.images, data or "", request.split, request.num_images, typed)
    found.decode_by(origin.decoding(request))
    folder = Path(request.output or f"attention-{time.strftime('%Y%m%d-%H%M%S')}")
    dump = Path(request.dump) if request.dump else None
    with _no_empty_folders(folder, dump):
        if not teachers:
            folder = open_output(folder, overwrite=request.overwrite)
            dump = open_output(dump, overwrite=request.overwrite, flag="--dump") if dump else None
        with waking(quiet, "opening the models"):
            others = replace(request, checkpoint=None, use_ema=False)  # the file is the last one's
            built = [open_model(name, others) for name in models[:-1]] + [open_model(models[-1], request)]
        for one in built:
            one.to(place)
            for note in one.notes:
                print(f"note: {one.spec.name}: {note}", file=sys.stderr)
        with progress("inspect", silent=quiet) as each:
            if teachers:
                candidates = compare_teachers(
                    built[0],
                    [name for names in teachers for name in names.split(",")],
                    found,
                    origin.data(data),
                    request,
                    beside=typed,
                    each=each,
                )
            else:
                seen = inspect_attention(
                    built,
                    found,
                    folder,
                    layers=request.layers,
                    heads=request.heads,
                    query=request.query,
                    rollout=request.rollout,
                    dump=dump,
                    pictures=request.num_pictures,
                    batch_size=request.batch_size,
                    each=each,
                )
    if teachers:
        if shown.as_json:
            print(json.dumps([asdict(candidate) for candidate in candidates]))
        else:
            _print_teachers(candidates, built[0].spec.name, found)
    elif shown.as_json:
        print(json.dumps(seen.as_json()))
    else:
        _print_numbers(seen)


@contextmanager
def _no_empty_folders(*folders: Path | None) -> Iterator[None]:
    """Where nothing came of the call, what was made for it goes again."""
    try:
        yield
    except UserError:
        for folder in folders:
            with suppress(OSError):  # it holds something
                if folder is not None:
                    folder.rmdir()
        raise


def _print_numbers(seen: Any) -> None:
    from vitkd_cli.terminal import Fitted, Terminal

    console = Terminal()
    measures = ("entropy", "distance", "prefix_share", "class_prefix_share", "redundancy")
    titles = (
        "layer",
        "module",
        "maps",
        "heads",
        "entropy",
        "distance",
        "to prefix",
        "class to prefix",
        "redundancy",
    )
    for name, rows in zip(seen.models, seen.rows, strict=True):
        shown = []
        for row in rows:
            if row["head"] is not None:
                continue
            heads = sum(other["layer"] == row["layer"] for other in rows) - 1
            cells = (_with_error(row, key) for key in measures)
            shown.append((str(row["layer"]), row["path"], row["kind"], str(heads or "–"), *cells))
        spare = ("module", "maps", "heads", "redundancy", "class to prefix")
        console.print(Fitted(titles, shown, title=f"{name}, {seen.images} images", spare=spare))
    console.print("entropy in nats, distance in pixels; ± is the standard error over images", style="dim")
    for note in seen.notes:
        console.say(f"note: {note}", style="yellow")
    for path in seen.files:
        console.say(str(path))


def _with_error(row: dict[str, Any], key: str) -> str:
    value, error = row[key], row[f"{key}_se"]
    if value is None:
        return "–"
    return f"{value:.3g}" + ("" if error is None else f" ± {error:.2g}")


def _print_teachers(candidates: Any, student: str, images: Any) -> None:
    from vitkd_cli.inspection.run import rough_cka
    from vitkd_cli.terminal import Fitted, Terminal

    console = Terminal()
    titles = ("teacher", "top-1", "attention similarity", "of its blocks", "CKA, last block", "parameters")
    rows = [
        (
            one.model,
            f"{one.top1:.2f}",
            "–" if one.similarity is None else f"{one.similarity:.3f}",
            str(one.pairs),
            "–" if one.cka is None else f"{one.cka:.3f}",
            f"{one.parameters / 1e6:.2f} M, {one.larger:.1f} ×",
            f"{one.multiply_adds / 1e6:,.1f} M, {one.dearer:.1f} ×",
        )
        for one in candidates
    ]
    about = f"teachers for {student}, the most accurate first"
    spare = ("of its blocks", "parameters", "multiply-adds", "CKA, last block")
    console.print(Fitted((*titles, "multiply-adds"), rows, title=about, spare=spare))
    for note in (
        f"similarity is 1 - JSD / ln 2 of the maps at answering blocks, over {len(images)} images",
        "similarity and CKA describe, they do not rank: one paper lost with a CaiT teacher, later ones gained "
        "with the same (docs/attention.md)",
        rough_cka(len(images), undefined=any(one.cka is None for one in candidates)),
        *images.notes,
    ):
        if note:
            console.say(f"note: {note}", style="yellow")


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    add_command(app, "inspect-attention", _inspect_attention, InspectRequest, Shown)
