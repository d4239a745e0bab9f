"""``vitkd demo``: the main job on the built-in data, in a few minutes."""

from __future__ import annotations

import time
from typing import Annotated

import typer

_NEXT = """next, on your own images (a folder with a folder a class):
  vitkd distill --teacher deit3_small --student deit_tiny --recipe small \\
      --data PATH/TO/IMAGES
what it would do, without doing it: add --dry-run"""


def _demo(
    output: Annotated[str | None, typer.Option(help="The run folder.", show_default="runs/demo-TIME")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what it holds.")] = False,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds to repeat with.", show_default="5")] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of the students.", show_default="200")] = None,
    finetune_teacher: Annotated[int | None, typer.Option(min=1, help="Epochs of the teacher.", show_default="30")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:  # fmt: skip
    """Distil a small ViT on built-in scans of handwritten digits: no network, no GPU, a few minutes.

    It is `vitkd distill --recipe tiny-cpu`: a teacher sees every training scan, its students see five of
    each digit, alone and distilled, with five seeds.
    """
    from vitkd_cli.cli.distill import run
    from vitkd_cli.cli.shared import progress, waking

    with waking(quiet):
        from vitkd_cli.inspection.images import images_to_look_at
        from vitkd_cli.inspection.run import inspect_attention
        from vitkd_cli.recipe import settle
        from vitkd_cli.terminal import Terminal
        from vitkd_cli.vit.build import open_model

    output = output or f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"
    flags = {"output": output, "seeds": seeds, "epochs": epochs, "finetune_teacher": finetune_teacher}
    given = {key: value for key, value in flags.items() if value is not None}
    recipe, _ = settle(given, "tiny-cpu")
    finished = run(recipe, given, overwrite=overwrite, quiet=quiet)
    if finished is None:
        return
    console = Terminal(quiet=quiet)
    attention = finished.folder / "attention"
    attention.mkdir(exist_ok=True)
    models = [
        open_model(f"local-dir:{folder}")
        for folder in (finished.folder / "teacher/student", finished.student)
    ]
    with progress("attention", silent=quiet) as each:
        inspect_attention(models, images_to_look_at(count=64), attention, pictures=3, each=each)
    console.say(f"attention {attention / 'attention.html'}")
    console.print(_NEXT, soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(_demo)
