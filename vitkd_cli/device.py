"""Where models run, and how exactly they compute there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitkd_cli.errors import UserError


def device_named(name: str | None) -> torch.device:
    """What ``--device`` means; unset, a GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"there is no device {name!r}", "--device cpu or --device cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use", "--device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def check_gpus(device: torch.device, processes: int) -> None:
    """Refuse more processes than GPUs.

    Raises:
        UserError: there are fewer.
    """
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes for the {torch.cuda.device_count()} GPUs of this machine",
            "start at most one process a GPU, or --device cpu",
        )


@contextmanager
def tensor_float32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether a GPU may multiply and convolve float32 in TF32, ten bits of mantissa; put back afterwards.

    timm's train.py and validate.py allow it: training is about twice as fast. On a CPU this does nothing.
    """
    before = _tensor_float32() if device.type == "cuda" else None
    if before is None:
        yield
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def _tensor_float32() -> tuple[str, bool] | None:
    """Of products and convolutions; None if somebody used torch's newer switches, and so has decided."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # they do not mix
        return None
