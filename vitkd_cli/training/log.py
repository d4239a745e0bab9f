"""What a training writes down: ``log.jsonl``, trackers, and the words for a terminal."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from vitkd_cli.files import saving, write_text
from vitkd_cli.session import Session
from vitkd_cli.training.checkpoint import Progress


class Log:
    """``log.jsonl``: one line per logged update; on resume it is cut back to the checkpoint."""

    def __init__(self, path: Path, progress: Progress, session: Session) -> None:
        self._path, self._accelerator = path, session.accelerator
        self._wrote = time.monotonic()
        self._file: Any = None
        if not session.accelerator.is_main_process:
            return
        kept, damaged = _kept(path, progress)
        if damaged:
            session.reporter.warn(f"{path} is damaged: lines that cannot be read were left out ({damaged})")
        write_text(path, "".join(f"{line}\n" for line in kept))
        with saving(path):
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # as long as the run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            with saving(self._path):
                self._file.close()

    @property
    def overdue(self) -> bool:
        """Is the last line a minute old? Rank 0 knows."""
        return self._file is not None and time.monotonic() - self._wrote > 60

    def write(self, line: dict[str, Any]) -> None:
        self._wrote = time.monotonic()
        if self._file is not None:
            # JSON has no NaN; a gradient's norm may be one where a scaler passes over the update.
            told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with saving(self._path):
                self._file.write(json.dumps(told, allow_nan=False) + "\n")
        if self._accelerator.trackers:
            numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
            self._accelerator.log(numbers, step=line["update"])

    def flush(self) -> None:
        if self._file is not None:
            with saving(self._path):
                os.fsync(self._file.fileno())


def _kept(path: Path, progress: Progress) -> tuple[list[str], int]:
    """The lines that a checkpoint knows of, and how many others cannot be read."""
    noted = {entry["update"] for entry in progress.history}
    try:
        lines = path.read_bytes().splitlines() if progress.update else []
    except OSError:
        lines = []
    kept, damaged = [], 0
    for line in lines:
        try:
            values = json.loads(line)
            update, event = int(values["update"]), values.get("event")
        except (ValueError, KeyError, TypeError, AttributeError):
            damaged += line is not lines[-1]  # a kill cuts the last one short
            continue
        # A validation that its checkpoint does not know of is made again.
        if update <= progress.update and (event != "validation" or update in noted):
            kept.append(line.decode())
    return kept, damaged


class Losses:
    """The losses since a validation, without waiting for a device.

    Attributes:
        last: the newest one that has arrived, on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.last = torch.zeros((), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else None, device=device)
        self._count = 0

    def add(self, loss: Tensor) -> None:
        self._sum += loss
        self._count += 1
        self.last.copy_(loss, non_blocking=True)

    def mean(self, accelerator: Any) -> str:
        """In words, over all processes; empty where nothing was trained since. It begins anew."""
        if not self._count:
            return ""
        mean = float(accelerator.reduce(self._sum, "mean")) / self._count
        self._sum, self._count = torch.zeros_like(self._sum), 0
        return f" train {mean:.3f}"


def gradient_shares(norms: dict[str, float], weights: dict[str, float], update: int) -> dict[str, Any]:
    """Each term's share of the student's gradient, by norm, weighted as in the objective.

    Args:
        norms: before the weights.
    """
    weighted = {name: abs(weights[name]) * norm for name, norm in norms.items()}
    total = sum(weighted.values()) or 1.0
    return {
        "event": "gradients",
        "update": update,
        **{f"{name}/grad_norm": norm for name, norm in weighted.items()},
        **{f"{name}/grad_share": norm / total for name, norm in weighted.items()},
    }


def in_words(line: dict[str, Any], updates: int) -> str:
    """A log line for a terminal without a bar."""
    waited = f", {line['data_wait']:.0%} of the time waiting for them" if line["data_wait"] >= 0.1 else ""
    return (
        f"update {line['update']}/{updates}  epoch {line['epoch']:.2f}  loss {line['loss']:.4f}  "
        f"{terms_in_words(line)}  {line['images_per_second']:.0f} images/s{waited}"
    )


def terms_in_words(line: dict[str, Any]) -> str:
    """Its weighted terms and learning rate."""
    terms = [
        f"{key.removesuffix('/weighted')} {value:.4g}"
        for key, value in line.items()
        if key.endswith("/weighted")
    ]
    return "  ".join([*terms, f"lr {line['lr']:.2e}"])
