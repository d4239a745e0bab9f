"""``vitkd inspect-attention``: what a model looks at, or a teacher and its student."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from vitkd_cli.cli.shared import (
    AlphaFill,
    AsJson,
    Checkpoint,
    Data,
    Device,
    Exif,
    ImgSize,
    MaxPixels,
    Pretrained,
    Quiet,
    Split,
    Verify,
    progress,
    waking,
)
from vitkd_cli.errors import UserError


def _inspect_attention(
    models: Annotated[list[str], typer.Argument(metavar="MODEL [MODEL]", help="A timm name, run folder, local-dir:… or hf-hub:…; of two, first the teacher, then the student.")],
    images: Annotated[list[str] | None, typer.Option(metavar="PATH…", help="Image files, or folders of them. Unset: some of --data.")] = None,
    data: Data = None,
    split: Split = "validation",
    exif: Exif = None,
    alpha_fill: AlphaFill = None,
    max_pixels: MaxPixels = None,
    img_size: ImgSize = None,
    checkpoint: Checkpoint = None,
    pretrained: Pretrained = True,
    verify: Verify = True,
    layers: Annotated[str, typer.Option(help="Layers to draw and dump: all, or 0,1,-1.")] = "all",
    heads: Annotated[str, typer.Option(help="Heads to draw and dump: mean, all, or 0,3.")] = "mean",
    query: Annotated[str | None, typer.Option(help="Whose attention to draw: cls, all, or ROW,COL of a patch.", show_default="cls, or all without a class token")] = None,
    rollout: Annotated[bool, typer.Option("--rollout", help="Draw the attention rolled out through all layers, too.")] = False,
    teachers: Annotated[list[str] | None, typer.Option(metavar="MODEL…", help="Compare these as teachers of MODEL instead, on labelled data.")] = None,
    dump: Annotated[Path | None, typer.Option(metavar="DIR", help="Write the maps as safetensors, with an index.json.")] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images to count.")] = 64,
    num_pictures: Annotated[int, typer.Option(min=1, help="The first of them to draw and dump.")] = 4,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Where pictures, page and numbers go.", show_default="attention-TIME")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into folders that hold something.")] = False,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images a step.")] = 8,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Draw and count what a model looks at, alone or beside its student.

    - `vitkd inspect-attention deit3_small --images cat.jpg dog.jpg`

    - `vitkd inspect-attention runs/x/teacher/student runs/x/student --data ~/flowers`

    - `vitkd inspect-attention deit_tiny --teachers deit3_small cait_s24 --data ~/imagenet`

    Writes PNGs, attention.html, numbers.json and numbers.csv. docs/attention.md says what they mean.
    """
    with waking(quiet):
        from vitkd_cli.device import device_named
        from vitkd_cli.evaluation.images import data_for, decoding_for
        from vitkd_cli.inspection.images import images_to_look_at
        from vitkd_cli.inspection.run import inspect_attention, open_output
        from vitkd_cli.inspection.teachers import compare_teachers
        from vitkd_cli.vit.build import open_model

    if len(models) > 2:
        raise UserError(f"there are {len(models)} models", "name one, or a teacher and its student")
    if teachers and len(models) > 1:
        raise UserError("--teachers is for one model, their student", "name the student alone")
    if teachers and (output or dump):
        raise UserError(
            "--teachers prints a table and writes no files", "leave the folder out; --json > FILE"
        )
    place = device_named(device)
    typed = [*models[:-1], checkpoint or models[-1]]
    if not images:
        data = data_for(typed, data)
    found = images_to_look_at(images or [], data or "", split, num_images, typed)
    decoding: dict[str, Any] = {"exif": exif, "alpha_fill": alpha_fill, "max_pixels": max_pixels}
    found.decode_by(decoding_for(typed, **decoding))
    folder = output or Path(f"attention-{time.strftime('%Y%m%d-%H%M%S')}")
    with _no_empty_folders(folder, dump):
        if not teachers:
            folder = open_output(folder, overwrite=overwrite)
            dump = open_output(dump, overwrite=overwrite, flag="--dump") if dump else None
        with waking(quiet, "opening the models"):
            built = [
                open_model(
                    name,
                    checkpoint=checkpoint if index == len(models) - 1 else None,
                    pretrained=pretrained,
                    img_size=img_size,
                    verify=verify,
                )
                for index, name in enumerate(models)
            ]
        for one in built:
            one.model.to(place)
            for note in one.notes:
                print(f"note: {one.spec.name}: {note}", file=sys.stderr)
        with progress("inspect", silent=quiet) as each:
            if teachers:
                candidates = compare_teachers(
                    built[0],
                    [name for names in teachers for name in names.split(",")],
                    found,
                    data_for(typed, data),
                    split=split,
                    beside=typed,
                    batch_size=batch_size,
                    verify=verify,
                    device=device,
                    decoding=decoding,
                    each=each,
                )
            else:
                seen = inspect_attention(
                    built,
                    found,
                    folder,
                    layers=layers,
                    heads=heads,
                    query=query,
                    rollout=rollout,
                    dump=dump,
                    pictures=num_pictures,
                    batch_size=batch_size,
                    each=each,
                )
    if teachers:
        if as_json:
            print(json.dumps([asdict(candidate) for candidate in candidates]))
        else:
            _print_teachers(candidates, built[0].spec.name, found)
    elif as_json:
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
    app.command("inspect-attention")(_inspect_attention)
