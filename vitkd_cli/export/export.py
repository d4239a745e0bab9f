"""Write a model for others, check what was written against the model, and only then put it in its place."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitkd_cli.device import device_named, tensor_float32
from vitkd_cli.errors import UserError, expanded, require, writable
from vitkd_cli.export import hub
from vitkd_cli.export.compare import Comparison, compare, hold_to, sample_of
from vitkd_cli.export.onnx_file import OnnxFile
from vitkd_cli.export.program import Program
from vitkd_cli.export.state_dict import StateDict
from vitkd_cli.export.target import Target
from vitkd_cli.export.timm_folder import FILES, Backbone, TimmFolder
from vitkd_cli.files import saving
from vitkd_cli.options import takes
from vitkd_cli.requests import ExportRequest
from vitkd_cli.vit.build import open_model
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


@takes(ExportRequest)
def export(
    request: ExportRequest, *, each: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Exported:
    """Write a model in a form that others load, once it answers there as it does here.

    Args:
        request: or its settings, the model and the form first.
        each: told the stage, images done and in all.

    Raises:
        UserError: the request is wrong, the model cannot be written so, or the check fails (exit code 3).
    """
    model, target = request.model, _target(request)
    if request.to == "onnx":
        require("onnx", "onnx", "onnxruntime", "onnxscript", purpose="--to onnx")
    if request.push_to_hub:
        hub.check(request.push_to_hub)
    place = device_named(request.device)
    typed = str(model) if isinstance(model, (str, Path)) else ""
    if not typed and request.output is None:
        raise UserError("a built model has no place that its export could lie beside", "output=…")
    path = expanded(request.output or _beside(typed, target, request))
    _check_output(
        path, target, request.overwrite, [resolve(typed).name if typed else None, request.checkpoint]
    )
    writable(path.with_name(f".{path.name}"), "--output")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as beside:  # on the same disk
        room = Path(beside) / path.name
        model = open_model(typed or copy.deepcopy(model), request)  # which its owner may go on to train
        model = model.prepared(img_size=request.img_size)
        model.net.eval().requires_grad_(False)
        sample = sample_of(model, request, each) if request.check_forward or request.int8 else None
        if request.int8 and sample and not sample.own:
            raise UserError(
                "--int8 is calibrated on images of the model's own kind, and none are named",
                "--data FOLDER or --images FOLDER",
            )
        each(f"writing {request.to}", 0, 0)
        with saving(path):
            notes = target.write(model, room, request, sample.others if sample else None)
        found = None
        if request.check_forward and sample:
            with tensor_float32(place, allowed=False):  # its ten bits would hide what is looked for
                exported = target.load(room, model, request, place)
                found = compare(
                    target.expected(model, request, place),
                    exported,
                    sample,
                    classes=model.gives == "logits" and request.to != "features",
                    each=each,
                )
            hold_to(found, None if request.half or request.int8 else target.tolerance)
        with saving(path):
            if path.is_dir():
                os.replace(path, room.with_name(f"{room.name}.before"))  # which _check_output let pass
            os.replace(room, path)
    files = [path] if path.is_file() else list(path.iterdir())
    return Exported(
        model=model.spec.name,
        to=request.to,
        output=path,
        bytes=sum(file.stat().st_size for file in files),
        model_bytes=sum(t.numel() * t.element_size() for t in model.net.state_dict().values()),
        found=found,
        sample=sample.name if found and sample else "",
        notes=model.notes
        + notes
        + (sample.notes if found and sample else ())
        + (_loss(found) if request.int8 and found else ()),
        pushed=hub.push(path, request.push_to_hub) if request.push_to_hub else None,
    )


def _target(request: ExportRequest) -> Target:
    """The form by its name, which must have every option that was set."""
    if request.to not in TARGETS:
        raise UserError(f"there is no target {request.to!r}", f"one of {', '.join(TARGETS)}")
    for name, target in TARGETS.items():
        for option in target.options:
            if getattr(request, option) and name != request.to:
                flag = option.replace("_", "-")
                raise UserError(f"--{flag} does not go with --to {request.to}", f"it goes with --to {name}")
    return TARGETS[request.to]


def _beside(model: str, target: Target, request: ExportRequest) -> Path:
    """The default output: beside the model's folder, or in the current one."""
    resolved = resolve(model)
    name = resolved.called(request.pretrained and request.checkpoint is None)
    kind = "-fp16" if request.half else "-int8" if request.int8 else ""
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
