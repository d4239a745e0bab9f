"""What a model costs: multiply-adds, images a second, time to an answer, memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vitkd_cli.device import tensor_float32
from vitkd_cli.vit.model import Model

BATCHES = (1, 4, 16, 64, 256)
_SECONDS, _LEAST = 2.0, 10  # a batch size is timed for so long, and at least so often


@dataclass(frozen=True)
class Cost:
    """Measured on noise, without reading images.

    Attributes:
        batch: the size, of :data:`BATCHES`, at which most images a second went through.
        images_per_second: there, the median.
        latency, latency_at_batch: milliseconds a batch, (p50, p95), of one image and of ``batch``.
        peak_memory: bytes in use at most at ``batch``, weights included; on a CPU of the whole process, and
            None where the system does not tell.
    """

    batch: int
    images_per_second: float
    latency: tuple[float, float]
    latency_at_batch: tuple[float, float]
    peak_memory: int | None


@torch.inference_mode()
def measure_cost(
    net: nn.Module,
    built: Model,
    dtype: torch.dtype | None = None,
    each: Callable[[int], None] = lambda batch: None,
) -> Cost:
    """Time a model at every batch size of :data:`BATCHES` that memory allows.

    Args:
        dtype: of autocast; None for the weights' own.
        each: told the batch size that comes next.
    """
    device = next(net.parameters()).device
    others = 0  # bytes that are there besides the model: other models, if several are scored
    if device.type == "cuda":
        others = torch.cuda.memory_allocated(device) - sum(
            t.nbytes for t in (*net.parameters(), *net.buffers())
        )
    times: dict[int, np.ndarray[Any, Any]] = {}
    peaks: dict[int, int | None] = {}
    for batch in BATCHES:
        each(batch)
        try:
            noise = torch.rand(batch, len(built.spec.mean), *built.spec.input_size, device=device)
            with (
                tensor_float32(device, allowed=True),
                torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            ):
                _timed(net, noise, device, 0.2, 2)  # kernels are chosen and memory is found
                _forget_peak(device)
                times[batch] = _timed(net, noise, device, _SECONDS, _LEAST)
            peak = _peak(device)
            peaks[batch] = None if peak is None else peak - others
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        # past the best size a bigger batch only takes longer
        if batch > 1 and float(np.median(times[batch])) / batch > 1.1 * min(
            float(np.median(t)) / b for b, t in times.items()
        ):
            break
    speed = {batch: batch / float(np.median(seconds)) for batch, seconds in times.items()}
    best = max(speed, key=speed.__getitem__)

    def quantiles(batch: int) -> tuple[float, float]:
        p50, p95 = np.percentile(times[batch], (50, 95)) * 1000
        return float(p50), float(p95)

    return Cost(best, speed[best], quantiles(1), quantiles(best), peaks[best])


def _timed(
    net: nn.Module, noise: torch.Tensor, device: torch.device, seconds: float, least: int
) -> np.ndarray[Any, Any]:
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        start = time.perf_counter()
        net(noise)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
        if sum(taken) > 10 * seconds and len(taken) > 2:  # a big batch of a big model: three will do
            break
    return np.array(taken)


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak of resident memory starts anew


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))
