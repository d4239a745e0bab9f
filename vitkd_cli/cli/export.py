"""``vitkd export``: a model in the form that others load, checked before it is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from vitkd_cli.cli.shared import (
    AlphaFill,
    AsJson,
    Checkpoint,
    Device,
    Exif,
    ImgSize,
    MaxPixels,
    Pretrained,
    Quiet,
    UseEma,
    Verify,
    progress,
    waking,
)


def _export(
    model: Annotated[str, typer.Argument(help="A run folder, timm name, local-dir:… or hf-hub:…")],
    to: Annotated[str, typer.Option(help="timm, onnx, torch, features or state-dict.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File or folder. Unset: beside the model's folder, or here.")] = None,
    checkpoint: Checkpoint = None,
    use_ema: UseEma = False,
    pretrained: Pretrained = True,
    verify: Verify = True,
    img_size: ImgSize = None,
    data: Annotated[str | None, typer.Option(help="Labelled images of the model's classes for the check. Unset: its run's own, else the sample.")] = None,
    images: Annotated[list[Path] | None, typer.Option(help="Image file or folder for the check instead; may be repeated.")] = None,
    exif: Exif = None,
    alpha_fill: AlphaFill = None,
    max_pixels: MaxPixels = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images of the check; --int8 is calibrated on as many others.")] = 64,
    batch_size: Annotated[int, typer.Option("--batch-size", "-b", min=2, help="Images of the trace for onnx and torch; any number may be fed later.")] = 2,
    opset: Annotated[int | None, typer.Option(min=1, help="Of onnx. Unset: the exporter's own.")] = None,
    half: Annotated[bool, typer.Option("--half", help="onnx: weights in float16; inputs and outputs stay float32.")] = False,
    int8: Annotated[bool, typer.Option("--int8", help="onnx: eight bits, calibrated on the images.")] = False,
    preprocess: Annotated[bool, typer.Option("--preprocess", help="onnx: uint8 images [B, H, W, C] in, probabilities out.")] = False,
    prefix: Annotated[str, typer.Option(help="state-dict: before every key, such as backbone.")] = "",
    push_to_hub: Annotated[str | None, typer.Option(metavar="ORG/NAME", help="timm: upload the folder too.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    check_forward: Annotated[bool, typer.Option("--check-forward/--no-check-forward", help="Keep it without comparing it with the model on real images.")] = True,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Write a model in the form that others load, once it answers there as it does here.

    - `vitkd export runs/x --to timm` for timm and transformers

    - `vitkd export runs/x --to onnx --preprocess` for ONNX Runtime, fed with plain images

    - `vitkd export runs/x --to torch` for torch alone

    - `vitkd export runs/x --to features` for detection and segmentation

    - `vitkd export runs/x --to state-dict --prefix backbone.` for a model of your own
    """
    from rich.table import Table

    with waking(quiet):
        from vitkd_cli.export import export
    from vitkd_cli.terminal import Terminal

    with progress("export", silent=quiet) as each:
        done = export(
            model,
            to,
            output=output,
            checkpoint=checkpoint,
            use_ema=use_ema,
            pretrained=pretrained,
            verify=verify,
            img_size=img_size,
            data=data,
            images=images or (),
            exif=exif,
            alpha_fill=alpha_fill,
            max_pixels=max_pixels,
            num_images=num_images,
            batch_size=batch_size,
            opset=opset,
            half=half,
            int8=int8,
            preprocess=preprocess,
            prefix=prefix,
            push_to_hub=push_to_hub,
            overwrite=overwrite,
            check_forward=check_forward,
            device=device,
            each=each,
        )
    found = done.found
    if as_json:
        seen = ("difference", "scale", "agreement", "top1", "images_per_second")
        facts = {**vars(done), "output": str(done.output), "images": found.count if found else 0}
        del facts["found"]
        print(json.dumps(facts | {key: getattr(found, key, None) for key in seen}))
        return
    console = Terminal()
    table = Table("", "MiB", "top-1", "images/s", box=None)
    for place, (name, size) in enumerate((("model", done.model_bytes), (to, done.bytes))):
        table.add_row(
            name,
            f"{size / 2**20:.2f}",
            f"{found.top1[place]:.2f}" if found and found.top1 else "–",
            f"{found.images_per_second[place]:.0f}" if found else "–",
        )
    console.print(table)
    if found:
        agree = f", the same class on {found.agreement:.2f} %" if found.agreement is not None else ""
        console.say(
            f"{found.count} images of {done.sample}: largest difference {found.difference:.1e} "
            f"of {found.scale:.3g}{agree}; speed in batches of {found.batch}"
        )
    else:
        console.say("not checked: --check-forward compares it with the model")
    for line in (*done.notes, *([f"pushed to {done.pushed}"] if done.pushed else [])):
        console.say(line)
    console.say(str(done.output), style="bold")


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("export")(_export)
