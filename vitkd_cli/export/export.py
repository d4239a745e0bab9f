"""Write a model for others, check what was written against the model, and only then put it in its place."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vitkd_cli.device import device_named, tensor_float32
from vitkd_cli.errors import UserError, expanded, require, writable
from vitkd_cli.evaluation.images import decoding_for
from vitkd_cli.export import hub
from vitkd_cli.export.compare import Comparison, compare, hold_to, sample_of
from vitkd_cli.export.onnx_file import OnnxFile
from vitkd_cli.export.program import Program
from vitkd_cli.export.source import open_source
from vitkd_cli.export.state_dict import StateDict
from vitkd_cli.export.target import Asked, Target
from vitkd_cli.export.timm_folder import FILES, Backbone, TimmFolder
from vitkd_cli.files import saving
from vitkd_cli.vit.build import AnyModel, source_of
from vitkd_cli.vit.names import resolve

TARGETS: dict[str, Target] = {
    "timm": TimmFolder(),
    "onnx": OnnxFile(),
    "torch": Program(),
    "features": Backbone(),
    "state-dict": StateDict(),
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        bytes: of the file, or of the folder's files.
        model_bytes: of the model's own weights and buffers.
        found: of the check; None without one.
        sample: what the images of the check are; empty without one.
        notes: what a person should know of it, a line each.
        pushed: address on the Hub.
    """

    model: str
    to: str
    output: Path
    bytes: int
    model_bytes: int
    found: Comparison | None
    sample: str
    notes: tuple[str, ...] = ()
    pushed: str | None = None


def export(
    model: AnyModel,
    to: str,
    *,
    output: str | Path | None = None,
    checkpoint: str | Path | None = None,
    use_ema: bool = False,
    pretrained: bool = True,
    img_size: int | None = None,
    data: str | Path | None = None,
    images: Sequence[str | Path] = (),
    exif: bool | None = None,
    alpha_fill: str | None = None,
    max_pixels: int | None = None,
    num_images: int = 64,
    batch_size: int = 2,
    opset: int | None = None,
    half: bool = False,
    int8: bool = False,
    preprocess: bool = False,
    prefix: str = "",
    push_to_hub: str | None = None,
    overwrite: bool = False,
    check_forward: bool = True,
    verify: bool = True,
    device: str | None = None,
    each: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Exported:
    """Write a model in a form that others load, once it answers there as it does here.

    Args:
        model: a name, run folder, ``local-dir:…`` or ``hf-hub:…``; or a built model.
        to: one of ``TARGETS``.
        output: file or folder; by default beside the model's folder, or in the current one. A built model
            needs it.
        checkpoint, use_ema, pretrained, img_size, verify: as for ``vitkd eval``.
        data: labelled images of the model's classes for the check.
        images: files and folders without labels instead; with neither, the images of the model's own run, or
            the built-in digits.
        exif, alpha_fill, max_pixels: how they are decoded, as for ``vitkd eval``.
        num_images: to compare on; int8 is calibrated on as many others.
        batch_size: images of the trace of ``onnx`` and ``torch``, at least 2; any number may be fed later.
        opset, half, int8, preprocess: of ``onnx``; see :class:`vitkd_cli.export.target.Asked`.
        prefix: of ``state-dict``'s keys.
        push_to_hub: ``ORG/NAME`` to upload the folder of ``timm`` to.
        check_forward: compare before keeping; False writes only.
        device: for the check.
        each: told the stage, images done and in all.

    Raises:
        UserError: the request is wrong, the model cannot be written so, or the check fails (exit code 3).
    """
    asked = Asked(batch_size, opset, half, int8, preprocess, prefix, push_to_hub)
    target = _target(to, asdict(asked))
    if half and int8:
        raise UserError(
            "--half and --int8 exclude each other", "--half keeps more accuracy, --int8 less size"
        )
    if to == "onnx":
        require("onnx", "onnx", "onnxruntime", "onnxscript", purpose="--to onnx")
    if push_to_hub:
        hub.check(push_to_hub)
    place = device_named(device)
    typed = str(model) if isinstance(model, (str, Path)) else ""
    if not typed and output is None:
        raise UserError("a built model has no place that its export could lie beside", "output=…")
    file = None if checkpoint is None else str(checkpoint)
    path = expanded(output or _beside(typed, target, asked, pretrained and file is None))
    _check_output(path, target, overwrite, [resolve(typed).name if typed else None, file])
    writable(path.with_name(f".{path.name}"), "--output")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:  # on the same disk
        room = Path(beside) / path.name
        source = open_source(
            typed or copy.deepcopy(model),  # which its owner may go on to train
            checkpoint=file,
            use_ema=use_ema,
            pretrained=pretrained,
            img_size=img_size,
            verify=verify,
        )
        sample = None
        if check_forward or int8:
            sample = sample_of(
                source,
                source_of(model),
                checkpoint=file,
                data=str(data) if data else None,
                images=images,
                decoding=decoding_for(
                    [name for name in [file or source_of(model)] if name],
                    exif=exif,
                    alpha_fill=alpha_fill,
                    max_pixels=max_pixels,
                ),
                count=num_images,
                calibrate=int8,
                each=each,
            )
        if int8 and sample and not sample.own:
            raise UserError(
                "--int8 is calibrated on images of the model's own kind, and none are named",
                "--data FOLDER or --images FOLDER",
            )
        each(f"writing {to}", 0, 0)
        with saving(path):
            notes = target.write(source, room, asked, sample.others if sample else None)
        found = None
        if check_forward and sample:
            with tensor_float32(place, allowed=False):  # its ten bits would hide what is looked for
                exported = target.load(room, source, asked, place)
                found = compare(
                    target.expected(source, asked, place),
                    exported,
                    sample,
                    classes=source.gives == "logits" and to != "features",
                    each=each,
                )
            hold_to(found, None if half or int8 else target.tolerance)
        with saving(path):
            if path.is_dir():
                os.replace(path, room.with_name(f"{room.name}.before"))  # which _check_output let pass
            os.replace(room, path)
    files = [path] if path.is_file() else list(path.iterdir())
    return Exported(
        model=source.spec.name,
        to=to,
        output=path,
        bytes=sum(file.stat().st_size for file in files),
        model_bytes=sum(t.numel() * t.element_size() for t in source.built.model.state_dict().values()),
        found=found,
        sample=sample.name if found and sample else "",
        notes=source.built.notes
        + notes
        + (sample.notes if found and sample else ())
        + (_loss(found) if int8 and found else ()),
        pushed=hub.push(path, push_to_hub) if push_to_hub else None,
    )


def _target(to: str, options: dict[str, Any]) -> Target:
    """The form by its name, which must have every option that was set."""
    if to not in TARGETS:
        raise UserError(f"there is no target {to!r}", f"one of {', '.join(TARGETS)}")
    for name, target in TARGETS.items():
        for option in target.options:
            if options[option] and name != to:
                flag = option.replace("_", "-")
                raise UserError(f"--{flag} does not go with --to {to}", f"it goes with --to {name}")
    return TARGETS[to]


def _beside(model: str, target: Target, asked: Asked, own_weights: bool) -> Path:
    """The default output: beside the model's folder, or in the current one."""
    resolved = resolve(model)
    # A tag names weights.
    name = resolved.name if own_weights or not resolved.architecture else resolved.architecture
    kind = "-fp16" if asked.half else "-int8" if asked.int8 else ""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:")).resolve()
        return folder.with_name(folder.name + kind + target.ending)
    return Path(name.rpartition("/")[2].removeprefix("hf-hub:").replace("@", "-") + kind + target.ending)


def _check_output(path: Path, target: Target, overwrite: bool, reads: Sequence[str | None]) -> None:
    """Refuse to write over anything that is not an export of the same form, or is what is exported."""
    if not path.exists():
        return
    if not overwrite:
        raise UserError(f"{path} is there already", "--overwrite replaces it, --output names another place")
    for read in filter(None, reads):
        place = expanded(read.removeprefix("local-dir:"))
        if place.exists() and place.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--output {path} is what is being exported", "name another place")
    folder = not target.ending.startswith(".")
    strangers = [file.name for file in path.iterdir() if file.name not in FILES] if path.is_dir() else []
    if path.is_dir() != folder or strangers:
        what = f"a folder with {strangers[0]}" if strangers else "a folder" if path.is_dir() else "a file"
        raise UserError(
            f"--output {path} is {what}, no earlier export; it was not touched", "name another place"
        )


def _loss(found: Comparison) -> tuple[str, ...]:
    """A word on what eight bits cost, if it is over a point."""
    drop, of = 0.0, ""
    if found.top1 is not None:
        drop, of = found.top1[0] - found.top1[1], "accuracy"
    elif found.agreement is not None:
        drop, of = 100 - found.agreement, "agreement"
    if drop <= 1:
        return ()
    return (
        f"eight bits cost {drop:.2f} points of {of} on {found.count} images: --half is the better choice",
    )
