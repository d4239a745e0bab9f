"""``vitkd eval``: timm's own numbers for any timm ViT, and what else one pass over the images can tell."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from vitkd_cli.cli.shared import (
    AlphaFill,
    AsJson,
    BatchSize,
    Checkpoint,
    CropPct,
    Data,
    DataDir,
    Device,
    Exif,
    ImgSize,
    MaxPixels,
    Pretrained,
    Quiet,
    Split,
    UseEma,
    Verify,
    Workers,
    progress,
    waking,
)
from vitkd_cli.errors import UserError, expanded, require, writable

_PICTURE = "Preprocessing"
_RESULT = "Results"


def _eval(
    model: Annotated[list[str], typer.Argument(help="Timm names, run folders, local-dir:… or hf-hub:…")],
    data: Data = None,
    data_dir: DataDir = None,
    split: Split = "validation",
    teacher: Annotated[str | None, typer.Option(help="A model to compare each MODEL with: agreement and KL divergence.")] = None,
    checkpoint: Checkpoint = None,
    use_ema: UseEma = False,
    pretrained: Pretrained = True,
    verify: Verify = True,
    batch_size: BatchSize = 256,
    workers: Workers = 4,
    device: Device = None,
    mixed_precision: Annotated[str, typer.Option(help=r"Autocast. \[no|fp16|bf16]")] = "no",
    num_processes: Annotated[int, typer.Option(min=1, help="Share the images among this many processes.")] = 1,
    class_map: Annotated[str | None, typer.Option(help="File with one class folder name a line.")] = None,
    valid_labels: Annotated[str | None, typer.Option(help="File with the model's index of each class of the data, a line each.")] = None,
    ground_truth: Annotated[str | None, typer.Option(help="File with the classes of a flat folder, where it is not found by itself.")] = None,
    input_key: Annotated[str | None, typer.Option(help="Column of the image; for a folder, the endings of files that count. Unset: as the run has it.")] = None,
    target_key: Annotated[str | None, typer.Option(help="Column of the label.")] = None,
    real_labels: Annotated[str | None, typer.Option(help="ImageNet's reassessed labels too: their real.json, or timm for timm's copy.")] = None,
    img_size: ImgSize = None,
    use_train_size: Annotated[bool, typer.Option("--use-train-size", help="Not the test size that timm recommends for some models.", rich_help_panel=_PICTURE)] = False,
    crop_pct: CropPct = None,
    crop_mode: Annotated[str | None, typer.Option(help=r"How the crop is made. \[center|squash|border]", rich_help_panel=_PICTURE)] = None,
    interpolation: Annotated[str | None, typer.Option(help="Interpolation of the resize.", rich_help_panel=_PICTURE)] = None,
    mean: Annotated[str | None, typer.Option(help="Mean, as 0.5,0.5,0.5.", rich_help_panel=_PICTURE)] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation, as 0.5,0.5,0.5.", rich_help_panel=_PICTURE)] = None,
    test_time_pool: Annotated[bool, typer.Option("--test-time-pool", help="Pool the map of a bigger image window by window, where timm does.", rich_help_panel=_PICTURE)] = False,
    exif: Exif = None,
    alpha_fill: AlphaFill = None,
    max_pixels: MaxPixels = None,
    throughput: Annotated[bool, typer.Option("--throughput", help="Also time each model on noise: images/s, latency, memory.", rich_help_panel=_RESULT)] = False,
    calibration: Annotated[bool, typer.Option("--calibration", help="Print accuracy by confidence.", rich_help_panel=_RESULT)] = False,
    output: Annotated[str | None, typer.Option(help="Folder for results and pictures; a second call with it goes on where the first was stopped.", rich_help_panel=_RESULT)] = None,
    predictions: Annotated[str | None, typer.Option(help="Write what each model said of each image: FILE.csv or FILE.parquet.", rich_help_panel=_RESULT)] = None,
    as_json: AsJson = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, and nothing else on stdout.", rich_help_panel=_RESULT)] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, and nothing else on stdout.", rich_help_panel=_RESULT)] = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Score models on a labelled folder: each image once, with timm's own preprocessing.

    - `vitkd eval runs/x` on the images that the run held out

    - `vitkd eval runs/x/student --data ~/imagenet`

    - `vitkd eval deit_tiny --data ~/imagenet --crop-pct 0.875`

    - `vitkd eval runs/x/student runs/y/student --teacher deit3_small --data ~/imagenet --output scores`

    A folder with some of ImageNet's classes (Imagenette, ImageNet-A) is scored among these.
    """
    if sum((as_json, as_csv, as_markdown)) > 1:
        raise UserError("--json, --csv and --markdown each want stdout for themselves", "choose one")
    if predictions is not None:
        if Path(predictions).suffix not in (".csv", ".parquet"):
            raise UserError(
                f"--predictions {predictions} is no .csv or .parquet", "--predictions answers.csv"
            )
        if predictions.endswith(".parquet"):
            require("parquet", "pyarrow", purpose="--predictions with .parquet")
        writable(predictions, "--predictions")
    if output is not None:
        writable(Path(output) / "results.json", "--output")
    with waking(quiet):
        from vitkd_cli.evaluation import evaluate_all
        from vitkd_cli.training.launch import is_launched, launch

    if num_processes > 1 and not is_launched():
        launch(num_processes, sys.argv[1:], device)
        return
    accelerator = None
    if is_launched():
        from accelerate import Accelerator

        from vitkd_cli.device import device_named

        accelerator = Accelerator(cpu=device_named(device).type == "cpu")
    main = accelerator is None or accelerator.is_main_process
    with _told_of_stops(output), progress("eval", silent=quiet or not main) as each:
        found = evaluate_all(
            model,
            data,
            split=split,
            teacher=teacher,
            checkpoint=checkpoint,
            use_ema=use_ema,
            pretrained=pretrained,
            verify=verify,
            batch_size=batch_size,
            workers=min(workers, os.cpu_count() or 1),
            img_size=img_size,
            use_train_size=use_train_size,
            crop_pct=_checked("--crop-pct", crop_pct),
            crop_mode=crop_mode,
            interpolation=interpolation,
            mean=_checked("--mean", mean),
            std=_checked("--std", std),
            test_time_pool=test_time_pool,
            mixed_precision=mixed_precision,
            class_map=class_map,
            valid_labels=valid_labels,
            ground_truth=ground_truth,
            input_key=input_key,
            target_key=target_key,
            exif=exif,
            alpha_fill=alpha_fill,
            max_pixels=max_pixels,
            data_dir=data_dir,
            device=device,
            output=output,
            accelerator=accelerator,
            each=partial(each, ""),
            looking=partial(each, "looking at the files"),
        )
    if accelerator is not None:
        accelerator.wait_for_everyone()
        accelerator.end_training()
    if not main:
        return
    found = _more(found, real_labels, throughput, mixed_precision, quiet)
    _show(
        found,
        "json" if as_json else "csv" if as_csv else "markdown" if as_markdown else "",
        calibration,
        output,
    )
    if predictions is not None:
        from vitkd_cli.report.scores import write_predictions

        print(f"answers  {write_predictions(found, expanded(predictions))}", file=sys.stderr)


def _more(found: Any, real_labels: str | None, throughput: bool, mixed_precision: str, quiet: bool) -> Any:
    """What is measured after the pass, where it was asked for."""
    from dataclasses import replace

    from vitkd_cli.evaluation import reassessed
    from vitkd_cli.evaluation.accuracy import AUTOCAST
    from vitkd_cli.evaluation.cost import BATCHES, measure_cost

    models = list(found.models)
    if real_labels is not None:
        scores = reassessed(found, real_labels)
        models = [replace(one, real=real) for one, real in zip(models, scores, strict=True)]

    if throughput:
        with progress("throughput", silent=quiet) as each:
            for index, one in enumerate(models):

                def timing(batch: int, before: int = index * len(BATCHES)) -> None:
                    each(f"batch {batch}", before + BATCHES.index(batch), len(models) * len(BATCHES))

                cost = measure_cost(one.net, one.built, AUTOCAST[mixed_precision], each=timing)
                models[index] = replace(one, cost=cost)
    return replace(found, models=tuple(models))


@contextmanager
def _told_of_stops(output: str | None) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        from vitkd_cli.data import abandon_workers

        abandon_workers()
        hint = "the same call goes on from there" if output else "with --output FOLDER a second call goes on"
        kept = f", and {output} keeps what was answered" if output else ""
        raise UserError(f"the scoring was stopped{kept}", hint, exit_code=130) from None


def _show(found: Any, form: str, calibration: bool, output: str | None) -> None:
    from vitkd_cli.report import scores
    from vitkd_cli.terminal import Terminal

    records = [scores.record(one, found.names) for one in found.models]
    pairs = scores.comparisons(found)
    count = found.models[0].metrics.count
    written = scores.write_folder(found, records, pairs, expanded(output)) if output else []
    if form:
        text = {
            "json": lambda: scores.json_text(records, pairs) + "\n",
            "csv": lambda: scores.csv_text(records),
            "markdown": lambda: scores.markdown(records, pairs, count),
        }[form]()
        print(text, end="")
        for note in found.notes:
            print(f"note: {note}", file=sys.stderr)
        return
    console = Terminal()
    say = console.say
    for one in found.models:
        described = ", ".join(f"{key} {value}" for key, value in one.preprocessing.items())
        say(f"{one.model}: {described}" + ("; scored before, answers kept" if one.kept else ""))
        if one.classes[0] < one.classes[1]:
            say(f"{one.model}: scored on {one.classes[0]} of its {one.classes[1]} classes")
    console.print(scores.table(records))
    taught = found.models[0].teacher
    teacher = f"; agrees and KL: with {found.teacher}, top-1 {taught.top1:.3f}" if taught else ""
    say(f"{count:,} images of {found.about}{teacher}", style="bold")
    for one in found.models if calibration else ():
        console.print(scores.reliability(one))
    if len(records) == 1 and records[0].get("worst_classes"):
        worst, taken = records[0]["worst_classes"][:5], records[0]["confusions"][:5]
        say("worst classes: " + ", ".join(f"{row['class']} {row['accuracy']:.1f}" for row in worst))
        if taken:
            pairs_seen = (f"{row['class']} for {row['taken_for']} ({row['images']})" for row in taken)
            say("most often taken: " + ", ".join(pairs_seen))
    for pair in pairs:
        say(pair.sentence(count))
    if pairs:
        say(f"note: {scores.CAUTION}")
    for note in found.notes:
        say(f"note: {note}", style="yellow")
    for path in written:
        say(f"wrote {path}")


def _checked(flag: str, value: Any) -> Any:
    """A value in the range that the recipe's field of this name has."""
    from vitkd_cli.recipe import options

    (field,) = (f for f in options() if f.flag == flag)
    return field.check(value)


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("eval")(_eval)
