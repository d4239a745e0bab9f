"""Where models run, and how exactly they compute there."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from vitkd_cli.errors import UserError


def device_named(name: str | None) -> torch.device:
    """What ``--device`` means; unset, a GPU where there is one."""
    present: dict[str, Any] = {"cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    if name not in (None, "cpu", *present):
        raise UserError(f"there is no device {name!r}", f"one of cpu, {', '.join(present)}")
    if name in present and not present[name].is_available():
        raise UserError(f"--device {name}: this machine has no GPU that torch can use", "--device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_cores(device: torch.device, processes: int) -> None:
    """Refuse to start more processes on a CPU than it has cores: each would wait for the others."""
    if device.type == "cpu" and processes > cores():
        raise UserError(
            f"{processes} processes for the {cores()} cores of this machine",
            f"--num-processes {cores()}, and --grad-accum-steps for a larger global batch",
        )


def check_gpus(device: torch.device, processes: int) -> None:
    """Refuse more processes than GPUs."""
    if device.type == "cuda" and processes > torch.cuda.device_count():
        raise UserError(
            f"{processes} processes for the {torch.cuda.device_count()} GPUs of this machine",
            "start at most one process a GPU, or --device cpu",
        )


@contextmanager
def tensor_float32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Whether a GPU may multiply and convolve float32 in TF32, ten bits of mantissa; put back afterwards.

    timm's train.py and validate.py allow it: training is about twice as fast. On a CPU this does nothing, nor
    where somebody used torch's newer switches, which do not mix with these.
    """
    try:
        products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:
        device = torch.device("cpu")
    if device.type != "cuda":
        yield
        return
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions
