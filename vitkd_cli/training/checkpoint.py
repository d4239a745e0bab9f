"""Checkpoints that a kill at any moment cannot spoil, and whose damage is seen.

A checkpoint is a folder, ``checkpoints/update-00001000``: tensors in safetensors, the optimizer in a
file that ``torch.load(weights_only=True)`` reads, the rest in JSON, and ``manifest.json`` with the
SHA-256 of each. It is written beside its place and renamed into it, so that under its name it is whole.
"""

import json
import pickle
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vitkd_cli.errors import UserError
from vitkd_cli.files import (
    MANIFEST,
    CannotWrite,
    check_room,
    damaged,
    remove,
    repair,
    sha256_of,
    whole_file,
    whole_folder,
    write_json,
    write_manifest,
)
from vitkd_cli.training.sharding import restore

FORMAT = 2
BEST = "best.safetensors"
_UNREADABLE = (
    *(OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError),
    *(SafetensorError, pickle.UnpicklingError),
)


@dataclass
class Progress:
    """How far a run has come; with the recipe it determines every draw that is still to be made.

    Attributes:
        update: optimizer updates done. Generators are keyed by it, so none is stored.
        history: one entry per validation.
        best: the best validation's entry, with the SHA-256 of ``best.safetensors``.
        skipped: unreadable images that were replaced, and how often.
    """

    update: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Found:
    """A checkpoint that was loaded.

    Attributes:
        states: those asked for; none of a finished run, which keeps no optimizer.
        notes: a line for each newer checkpoint that had to be passed over.
    """

    path: Path
    progress: Progress
    states: dict[str, Any]
    notes: tuple[str, ...]


def save(
    folder: Path,
    progress: Progress,
    tensors: dict[str, dict[str, Tensor]],
    states: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``folder/update-N`` and drop all but the ``keep`` newest.

    Args:
        tensors: state dicts of modules, which become ``NAME.safetensors``.
        states: what becomes ``NAME.pt``: tensors, numbers, strings and containers of them.
    """
    path = path_of(folder, progress.update)
    try:
        leaves = tree_leaves([tensors, states])
        check_room(path, sum(leaf.nbytes for leaf in leaves if isinstance(leaf, Tensor)))
        with whole_folder(path) as beside:
            for name, state in tensors.items():
                _save_tensors(state, beside / f"{name}.safetensors")
            for name, state in states.items():
                torch.save(state, beside / f"{name}.pt")
            write_json(beside / "progress.json", {"format": FORMAT, **asdict(progress)})
            write_manifest(beside, [file.name for file in beside.iterdir()])
    except CannotWrite as problem:
        good = complete(folder)
        last = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        raise CannotWrite(f"{problem.message}; {last}", problem.hint) from None
    # One that is numbered higher was passed over as unreadable when this run was resumed.
    for old in [*complete(folder)[:-keep], *(p for p in complete(folder) if p.name > path.name)]:
        if old != path:
            remove(old)
    return path


def note(path: Path, progress: Progress) -> None:
    """Put newer progress at the same update into a checkpoint; its tensors are not written again.

    The manifest says which progress holds, so a crash leaves the one before or this one.
    """
    promised = _promised(path)
    newest = path / _progress_of(promised)
    content = {"format": FORMAT, **asdict(progress)}
    if json.loads(newest.read_bytes()) == json.loads(json.dumps(content)):
        return
    later = path / f"progress-{len([name for name in promised if name.startswith('progress')]) + 1}.json"
    write_json(later, content)
    write_json(path / MANIFEST, {**promised, later.name: sha256_of(later)})


def strip(folder: Path) -> None:
    """Leave of a finished run's checkpoints the newest, without the optimizer's state."""
    repair(folder)
    for path in complete(folder)[:-1]:
        remove(path)
    for path in complete(folder):
        with suppress(*_UNREADABLE):  # one that is damaged is named when a run goes on from it
            kept = {k: v for k, v in _promised(path).items() if not k.endswith(".pt")}
            write_json(path / MANIFEST, kept)
        for state in path.glob("*.pt"):
            remove(state)


def path_of(folder: Path, update: int) -> Path:
    """Where the checkpoint of an update lies."""
    return folder / f"update-{update:08d}"


def can_go_on(folder: Path) -> bool:
    """Does the newest checkpoint hold the optimizer's state? So it does where there is none yet."""
    return all((path / "optimizer.pt").is_file() for path in complete(folder)[-1:])


def complete(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(folder.glob("update-*"))


def newest(folder: Path) -> int:
    """The update of the newest whole checkpoint; 0 if there is none."""
    return max((int(path.name.removeprefix("update-")) for path in complete(folder)), default=0)


def load(folder: Path, tensors: dict[str, nn.Module], states: tuple[str, ...]) -> Found | None:
    """Restore the newest undamaged checkpoint into ``tensors``; None if there is no checkpoint at all."""
    notes: list[str] = []
    candidates = complete(folder)
    for path in reversed(candidates):
        try:
            progress = _read_progress(path)
            weights = {name: load_file(path / f"{name}.safetensors") for name in tensors}
            loaded = {
                name: torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)
                for name in states
                if f"{name}.pt" in _promised(path)
            }
            for name, module in tensors.items():
                _check_fit(module, weights[name], f"{name}.safetensors")
        except _UNREADABLE as problem:
            notes.append(f"{path.name} is damaged ({problem}); it was passed over")
            continue
        for name, module in tensors.items():
            restore(module, weights[name])
        return Found(path, progress, loaded, tuple(notes))
    if candidates:
        raise UserError(f"no checkpoint in {folder} can be read: {notes[0]}", "start anew with --overwrite")
    return None


def _read_progress(path: Path) -> Progress:
    """A checkpoint's progress, once all of its files were found to be what was written."""
    if wrong := damaged(path):
        raise ValueError("; ".join(f"{name} {what}" for name, what in wrong.items()))
    name = _progress_of(_promised(path))
    content = json.loads((path / name).read_bytes())
    if content.pop("format") != FORMAT:
        raise UserError(f"{path} has another checkpoint format", "resume it with the version that wrote it")
    progress = Progress(**content)
    if path != path_of(path.parent, progress.update):
        raise ValueError(f"{name} is of update {progress.update}")
    return progress


def _promised(path: Path) -> dict[str, str]:
    """File name → SHA-256."""
    if not (manifest := path / MANIFEST).is_file():
        raise ValueError(f"{MANIFEST} is missing")
    return dict(json.loads(manifest.read_bytes()))


def _progress_of(promised: dict[str, str]) -> str:
    names = [name for name in promised if name.startswith("progress")]
    return max(names, key=lambda name: (len(name), name))  # progress.json, progress-2.json, …


def _check_fit(module: nn.Module, state: dict[str, Tensor], name: str) -> None:
    shapes = {key: tensor.shape for key, tensor in module.state_dict().items()}
    if shapes != {key: tensor.shape for key, tensor in state.items()}:
        raise ValueError(f"{name} is of another model")


def save_best(folder: Path, state: dict[str, Tensor]) -> str:
    """Keep a module's state dict as ``folder/best.safetensors``; its SHA-256."""
    _save_tensors(state, folder / BEST)
    return sha256_of(folder / BEST)


def best_fits(folder: Path, progress: Progress) -> bool:
    """Is ``best.safetensors`` the one that the progress names, if it names any?"""
    if progress.best is None:
        return True
    try:
        return progress.best.get("sha256") in (None, sha256_of(folder / BEST))
    except OSError:
        return False


def load_best(folder: Path, progress: Progress, module: nn.Module) -> None:
    """Restore the best weights."""
    path = folder / BEST
    try:
        if not best_fits(folder, progress):
            raise ValueError("does not have the content that was written")
        state = load_file(path)
        _check_fit(module, state, BEST)
    except _UNREADABLE as problem:
        hint = "start anew with --overwrite"
        raise UserError(f"{path} is damaged ({problem})", hint, exit_code=3) from None
    restore(module, state)


def _save_tensors(state: dict[str, Tensor], path: Path) -> None:
    # safetensors refuses memory that is shared or strided.
    copied = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}
    with whole_file(path) as beside:
        save_file(copied, beside, metadata={"format": "pt"})
