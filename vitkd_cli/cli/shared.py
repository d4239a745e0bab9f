"""Flags that mean the same in several commands: one spelling, one help."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

Data = Annotated[
    str | None,
    typer.Option(
        help="Labelled folder, or a timm dataset. Unset: of a run its own, else $VITKD_DATA, else the sample."
    ),
]
DataDir = Annotated[str | None, typer.Option(help="Root folder of a timm dataset.")]
Split = Annotated[str, typer.Option(help="Which split of the data.")]
Checkpoint = Annotated[str | None, typer.Option(help="Weights for MODEL in place of its own.")]
UseEma = Annotated[bool, typer.Option("--use-ema", help="Take the averaged weights of that file.")]
Pretrained = Annotated[
    bool,
    typer.Option(
        "--pretrained/--no-pretrained", help="Random weights in place of those that belong to the name."
    ),
]
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Refuse a folder whose files do not fit its manifest.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images per process and step.")]
Workers = Annotated[int, typer.Option("--workers", "-j", min=0, help="Loader processes.")]
ImgSize = Annotated[int | None, typer.Option(min=1, help="Side of the images, in pixels.")]
CropPct = Annotated[float | None, typer.Option(help="Share of the image kept by the centre crop.")]
Exif = Annotated[
    bool | None,
    typer.Option(
        "--exif/--no-exif",
        help="Turn photographs upright as their EXIF says. Unset: as the model's run does, else yes.",
        show_default=False,
    ),
]
AlphaFill = Annotated[
    str | None, typer.Option(help="Colour behind what is transparent. Unset: as the model's run, else white.")
]
MaxPixels = Annotated[int | None, typer.Option(min=1, help="Refuse pictures of more pixels.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu or cuda, or untested: mps, xpu. Unset: cuda where there is one, else cpu."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")]


@contextmanager
def waking(quiet: bool = False, what: str = "loading torch and timm") -> Iterator[None]:
    """A sign of life, on stderr, for what takes seconds."""
    from vitkd_cli.terminal import Terminal

    with Terminal(stderr=True, quiet=quiet).status(what):
        yield


@contextmanager
def progress(title: str, *, silent: bool) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr, so that stdout holds the result alone; told a stage, what is done, and of how much."""
    from vitkd_cli.terminal import Terminal
    from vitkd_cli.training.progress import Reporter

    reporter = Reporter(Terminal(stderr=True), silent=silent)
    with reporter.bar(title, 0):
        yield lambda stage, done, total: reporter.advance(done, stage, total=total)
