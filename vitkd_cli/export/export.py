"""Write a model for others, check what was written against the model, and only then put it in its place."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError, expanded, require, writable
from vitkd_cli.export import hub
from vitkd_cli.export.check import Check, check, sample_of
from vitkd_cli.export.onnx_file import OnnxFile
from vitkd_cli.export.program import Program
from vitkd_cli.export.state_dict import StateDictFile
from vitkd_cli.export.target import Target
from vitkd_cli.export.timm_folder import FILES, Backbone, TimmFolder
from vitkd_cli.files import whole_file, whole_folder
from vitkd_cli.options import takes
from vitkd_cli.requests import ExportRequest
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.names import Resolved, resolve

TARGETS: dict[str, type[Target]] = {
    "timm": TimmFolder,
    "onnx": OnnxFile,
    "torch": Program,
    "features": Backbone,
    "state-dict": StateDictFile,
}


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        bytes: of the file, or of the folder's files.
        model_bytes: of the model's own weights and buffers.
        found: of the check; None without one.
        sample: what the images of the check are; empty without one.
        notes: for the user, one per line.
        pushed: address on the Hub.
    """

    model: str
    to: str
    output: Path
    bytes: int
    model_bytes: int
    found: Check | None
    sample: str
    notes: tuple[str, ...] = ()
    pushed: str | None = None


@takes(ExportRequest)
def export(
    request: ExportRequest, *, each: Callable[[str, int, int], None] = lambda stage, done, total: None
) -> Exported:
    """Write a model in a form that others load; keep it if it gives the model's own numbers.

    A check that fails leaves nothing behind and has exit code 3.

    Args:
        request: or its settings, the model and the form first.
        each: called with the stage, images done and in all.
    """
    form = _form(request)
    if form.packages:
        require(request.to, *form.packages, purpose=f"--to {request.to}")
    if request.push_to_hub:
        hub.check_upload(request.push_to_hub)
    device = device_named(request.device)
    path = _output(request, form)
    writable(path.with_name(f".{path.name}"), "--output")
    own = request.model if isinstance(request.model, (str, Path)) else copy.deepcopy(request.model)
    model = open_model(own, request).prepared(img_size=request.img_size)  # a built one may be trained further
    model.net.eval().requires_grad_(False)
    sample = sample_of(model, request, each) if request.check_forward or request.int8 else None
    if request.int8 and sample and not sample.own:
        raise UserError(
            "--int8 is calibrated on images of the model's own kind, and none are named",
            "--data FOLDER or --images FOLDER",
        )
    each(f"writing {request.to}", 0, 0)
    target = form(model, request, device)
    with whole_file(path) if form.ending.startswith(".") else whole_folder(path) as beside:
        notes = model.notes + target.write(beside, sample.others if sample else None)
        found = check(target, beside, sample, each) if request.check_forward and sample else None
    if found and sample:
        notes += sample.notes + (_loss(found) if request.int8 else ())
    return Exported(
        model=model.spec.name,
        to=request.to,
        output=path,
        bytes=sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir())),
        model_bytes=sum(t.numel() * t.element_size() for t in model.net.state_dict().values()),
        found=found,
        sample=sample.name if found and sample else "",
        notes=notes,
        pushed=hub.push(path, request.push_to_hub) if request.push_to_hub else None,
    )


def _form(request: ExportRequest) -> type[Target]:
    """The form by its name, which must have every option that was set."""
    if request.to not in TARGETS:
        raise UserError(f"there is no export form {request.to!r}", f"one of {', '.join(TARGETS)}")
    chosen = TARGETS[request.to]
    for option in {option for form in TARGETS.values() for option in form.options} - {*chosen.options}:
        if getattr(request, option):
            flag = option.replace("_", "-")
            having = " or ".join(name for name, form in TARGETS.items() if option in form.options)
            raise UserError(f"--{flag} does not go with --to {request.to}", f"it goes with --to {having}")
    return chosen


def _output(request: ExportRequest, form: type[Target]) -> Path:
    """Where the export goes: never over anything but an earlier one of the same form."""
    name = resolve(str(request.model)) if isinstance(request.model, (str, Path)) else None
    if request.output:
        path = expanded(request.output)
    elif name:
        path = expanded(_beside(name, form, request))
    else:
        raise UserError("a built model has no place that its export could lie beside", "output=…")
    if not path.exists():
        return path
    if not request.overwrite:
        raise UserError(f"{path} is there already", "--overwrite replaces it, --output names another place")
    for read in filter(None, [name.name if name else None, request.checkpoint]):
        place = expanded(read.removeprefix("local-dir:"))
        if place.exists() and place.resolve().is_relative_to(path.resolve()):
            raise UserError(f"--output {path} is what is being exported", "name another place")
    folder = not form.ending.startswith(".")
    strangers = [file.name for file in path.iterdir() if file.name not in FILES] if path.is_dir() else []
    if path.is_dir() != folder or strangers:
        what = f"a folder with {strangers[0]}" if strangers else "a folder" if path.is_dir() else "a file"
        raise UserError(
            f"--output {path} is {what}, no earlier export; it was not touched", "name another place"
        )
    return path


def _beside(resolved: Resolved, form: type[Target], request: ExportRequest) -> Path:
    """The default output: beside the model's folder, or in the current one."""
    name = resolved.called(own_weights=request.pretrained and request.checkpoint is None)
    kind = "-fp16" if request.half else "-int8" if request.int8 else ""
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:")).resolve()
        return folder.with_name(folder.name + kind + form.ending)
    return Path(name.rpartition("/")[2].removeprefix("hf-hub:").replace("@", "-") + kind + form.ending)


def _loss(found: Check) -> tuple[str, ...]:
    """A note on what eight bits cost, if it is over a point."""
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
