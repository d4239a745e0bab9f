"""``vitkd eval``: timm's own numbers for any timm ViT."""

from __future__ import annotations

import json
import os
import sys
from typing import Annotated

import typer

from vitkd_cli.cli.shared import (
    AsJson,
    BatchSize,
    Checkpoint,
    CropPct,
    Data,
    DataDir,
    Device,
    ImgSize,
    Quiet,
    Split,
    UseEma,
    Workers,
    data_named,
)


def _eval(
    model: Annotated[str, typer.Argument(help="A timm name, run folder, local-dir:… or hf-hub:…")],
    data: Data = None,
    data_dir: DataDir = None,
    split: Split = "validation",
    checkpoint: Checkpoint = None,
    use_ema: UseEma = False,
    batch_size: BatchSize = 256,
    workers: Workers = 4,
    img_size: ImgSize = None,
    crop_pct: CropPct = None,
    interpolation: Annotated[str | None, typer.Option(help="Interpolation of the resize.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean, as 0.5,0.5,0.5.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, as 0.5,0.5,0.5.")] = None,
    class_map: Annotated[str | None, typer.Option(help="File with one class folder name a line.")] = None,
    device: Device = None,
    num_processes: Annotated[int, typer.Option(min=1, help="Share the images among this many processes.")] = 1,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Top-1 and top-5 on a labelled folder: each image once, with timm's own preprocessing.

    - `vitkd eval runs/x/student --data ~/imagenet`

    - `vitkd eval deit_tiny --data ~/imagenet --crop-pct 0.875`
    """
    from rich.console import Console

    from vitkd_cli.evaluation import evaluate
    from vitkd_cli.training.launch import is_launched, launch
    from vitkd_cli.training.progress import Reporter

    if num_processes > 1 and not is_launched():
        launch(num_processes, sys.argv[1:])
        return
    accelerator = None
    if is_launched():
        from accelerate import Accelerator

        from vitkd_cli.evaluation.accuracy import device_named

        accelerator = Accelerator(cpu=device_named(device).type == "cpu")
    main = accelerator is None or accelerator.is_main_process
    # The bar goes to stderr, so that --json leaves nothing but JSON on stdout.
    reporter = Reporter(Console(stderr=True), silent=quiet or not main)

    def each(done: int, total: int) -> None:
        reporter.advance(done, total=total)

    with reporter.bar("eval", 0):
        found = evaluate(
            model,
            data_named(data),
            split=split,
            checkpoint=checkpoint,
            use_ema=use_ema,
            batch_size=batch_size,
            workers=min(workers, os.cpu_count() or 1),
            img_size=img_size,
            crop_pct=crop_pct,
            interpolation=interpolation,
            mean=_numbers("--mean", mean),
            std=_numbers("--std", std),
            class_map=class_map,
            data_dir=data_dir,
            device=device,
            accelerator=accelerator,
            each=each,
        )
    if accelerator is not None:
        accelerator.wait_for_everyone()
        accelerator.end_training()
    if not main:
        return
    metrics = found.metrics
    if as_json:
        print(
            json.dumps(
                {
                    "model": found.model,
                    "data": found.data,
                    "count": metrics.count,
                    "top1": metrics.top1,
                    "top5": metrics.top5,
                    "loss": metrics.loss,
                    "classes": found.classes[0],
                    "model_classes": found.classes[1],
                    "parameters": found.parameters,
                    "preprocessing": found.preprocessing,
                }
            )
        )
        return
    console = Console(highlight=False)
    console.print(f"{found.model}  {found.parameters / 1e6:.2f} M parameters", markup=False)
    described = ", ".join(f"{key} {value}" for key, value in found.preprocessing.items())
    console.print(f"preprocessing: {described}", markup=False, soft_wrap=True)
    if found.classes[0] < found.classes[1]:
        console.print(f"scored on {found.classes[0]} of its {found.classes[1]} classes")
    console.print(
        f"top-1 {metrics.top1:.3f}   top-5 {metrics.top5:.3f}   loss {metrics.loss:.4f}   "
        f"{metrics.count:,} images",
        style="bold",
    )


def _numbers(flag: str, text: str | None) -> tuple[float, ...] | None:
    from vitkd_cli.recipe import options

    if text is None:
        return None
    (field,) = (f for f in options() if f.flag == flag)
    checked: tuple[float, ...] = field.check(text)
    return checked


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(_eval)
