"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a folder, ``checkpoints/update-00001000``: tensors in safetensors, the optimizer in a
file that ``torch.load(weights_only=True)`` reads, the rest in JSON. It is written beside its place
and renamed into it, so a name without a dot in front is a checkpoint that is whole.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vitkd_cli.errors import UserError

FORMAT = 1
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    EOFError,
    SafetensorError,
    pickle.UnpicklingError,
)


@dataclass
class Progress:
    """How far a run has come; with the recipe it determines every draw that is still to be made.

    Attributes:
        update: optimizer updates done. Generators are keyed by it, so none is stored.
        history: one entry a validation.
        best: the best validation's entry.
        skipped: unreadable images that were replaced, and how often.
    """

    update: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    skipped: dict[str, int] = field(default_factory=dict)


def save(
    folder: Path,
    progress: Progress,
    tensors: dict[str, nn.Module],
    states: dict[str, Any],
    *,
    keep: int,
) -> Path:
    """Write ``folder/update-N`` and drop all but the ``keep`` newest.

    Args:
        tensors: modules whose state dicts become ``NAME.safetensors``.
        states: what becomes ``NAME.pt``: tensors, numbers, strings and containers of them.

    Raises:
        UserError: the disk is full; the last good checkpoint is kept and named.
    """
    path = folder / f"update-{progress.update:08d}"
    beside = folder / f".{path.name}"
    with _full_disk_is_the_users(folder):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, module in tensors.items():
            _save_tensors(module, beside / f"{name}.safetensors")
        for name, state in states.items():
            torch.save(state, beside / f"{name}.pt")
        (beside / "progress.json").write_text(json.dumps({"format": FORMAT, **asdict(progress)}))
        for file in beside.iterdir():
            _flush(file)
        if path.exists():  # saved twice at one update: the states are equal
            shutil.rmtree(path)
        # A reader sees no checkpoint or a whole one.
        os.replace(beside, path)
        _flush(folder)
    # One that is numbered higher was passed over as unreadable when this run was resumed.
    for old in [*complete(folder)[:-keep], *(p for p in complete(folder) if p.name > path.name)]:
        if old != path:
            shutil.rmtree(old, ignore_errors=True)
    return path


def complete(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(path for path in folder.glob("update-*") if (path / "progress.json").is_file())


def load(
    folder: Path, tensors: dict[str, nn.Module], states: tuple[str, ...]
) -> tuple[Progress, dict[str, Any], list[str]] | None:
    """Restore the newest readable checkpoint into ``tensors``.

    Returns:
        Progress, the named states, and a line for each checkpoint that had to be passed over;
        None if there is no checkpoint at all.

    Raises:
        UserError: there are checkpoints and none can be read.
    """
    skipped: list[str] = []
    candidates = complete(folder)
    for path in reversed(candidates):
        try:
            content = json.loads((path / "progress.json").read_text())
            if content.pop("format") != FORMAT:
                raise UserError(
                    f"{path} has another checkpoint format", "resume it with the version that wrote it"
                )
            weights = {name: load_file(path / f"{name}.safetensors") for name in tensors}
            loaded = {
                name: torch.load(path / f"{name}.pt", map_location="cpu", weights_only=True)
                for name in states
            }
        except _UNREADABLE as problem:
            skipped.append(f"{path.name} is incomplete ({problem}); it was passed over")
            continue
        for name, module in tensors.items():
            module.load_state_dict(weights[name])
        return Progress(**content), loaded, skipped
    if candidates:
        raise UserError(f"no checkpoint in {folder} can be read", "start anew with --overwrite")
    return None


def save_best(folder: Path, module: nn.Module) -> None:
    """Keep a module's weights as ``folder/best.safetensors``."""
    with _full_disk_is_the_users(folder):
        folder.mkdir(exist_ok=True)
        beside = folder / ".best.safetensors"
        _save_tensors(module, beside)
        os.replace(beside, folder / "best.safetensors")


def _save_tensors(module: nn.Module, path: Path) -> None:
    state: dict[str, Tensor] = {
        # safetensors refuses memory that is shared or strided.
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in module.state_dict().items()
    }
    save_file(state, path, metadata={"format": "pt"})


@contextmanager
def _full_disk_is_the_users(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as problem:
        # safetensors and torch wrap the system's error in their own.
        full = getattr(problem, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            words in str(problem) for words in ("No space left", "os error 28", "quota")
        )
        if not full:
            raise
        for unfinished in folder.glob(".*"):
            shutil.rmtree(unfinished, ignore_errors=True)
            if unfinished.is_file():
                unfinished.unlink(missing_ok=True)
        good = complete(folder)
        free = shutil.disk_usage(folder).free / 2**20
        raise UserError(
            f"the disk is full ({free:.0f} MiB free) while saving in {folder}; "
            + (f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"),
            "make room and go on with --resume",
            exit_code=3,
        ) from None


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
