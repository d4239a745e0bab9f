"""What a model costs: images per second, time to an answer, memory."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from vitkd_cli.device import tensor_float32
from vitkd_cli.vit.model import Model

BATCHES = (1, 4, 16, 64, 256)
_SECONDS, _LEAST = 2.0, 10  # a batch size is timed for so long, and at least so often
Result = TypeVar("Result")


def timed(act: Callable[..., Result], *given: Any) -> tuple[Result, float]:
    """The result of a call, and the seconds until it is there, on a GPU too."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    result = act(*given)
    wait()
    return result, time.perf_counter() - start


@dataclass(frozen=True)
class Cost:
    """Measured on noise, without reading images.

    Attributes:
        batch: the size, of :data:`BATCHES`, at which most images per second went through.
        images_per_second: there, by the median of the times.
        latency, latency_at_batch: milliseconds per batch, (p50, p95), of one image and of ``batch``.
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
    model: Model,
    dtype: torch.dtype | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Cost:
    """Time a model at every batch size of :data:`BATCHES` that memory allows.

    Args:
        dtype: of autocast; None for the weights' own.
        progress: told the batch size that comes next.
    """
    net, device = model.net, model.device
    others = 0  # bytes that are there besides the model: other models, if several are scored
    if device.type == "cuda":
        own = sum(t.nbytes for t in (*net.parameters(), *net.buffers()))
        others = torch.cuda.memory_allocated(device) - own
    times: dict[int, list[float]] = {}
    peaks: dict[int, int | None] = {}
    an_image: dict[int, float] = {}  # seconds
    for index, batch in enumerate(BATCHES):
        progress(f"throughput, batch {batch}", index, len(BATCHES))
        try:
            noise = torch.rand(batch, len(model.spec.mean), *model.spec.input_size, device=device)
            with (
                tensor_float32(device, allowed=True),
                torch.autocast(device.type, dtype=dtype, enabled=dtype is not None),
            ):
                _times(net, noise, 0.2, 2)  # kernels are chosen and memory is found
                _forget_peak(device)
                times[batch] = _times(net, noise, _SECONDS, _LEAST)
            peak = _peak(device)
            peaks[batch] = None if peak is None else peak - others
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        # past the best size a bigger batch only takes longer
        an_image = {b: float(np.median(seconds)) / b for b, seconds in times.items()}
        if an_image[batch] > 1.1 * min(an_image.values()):
            break
    best = min(an_image, key=an_image.__getitem__)

    def quantiles(batch: int) -> tuple[float, float]:
        p50, p95 = np.percentile(times[batch], (50, 95)) * 1000
        return float(p50), float(p95)

    return Cost(best, 1 / an_image[best], quantiles(1), quantiles(best), peaks[best])


@torch.inference_mode()
def latency(model: Model, seconds: float = 0.4) -> tuple[float, float]:
    """Milliseconds from one image to its answer, (p50, p95), timed for so long."""
    noise = torch.rand(1, len(model.spec.mean), *model.spec.input_size, device=model.device)
    with tensor_float32(model.device, allowed=True):
        _times(model.net, noise, 0.1, 2)  # kernels are chosen and memory is found
        p50, p95 = np.percentile(_times(model.net, noise, seconds, _LEAST), (50, 95)) * 1000
    return float(p50), float(p95)


def _times(net: nn.Module, noise: Tensor, seconds: float, least: int) -> list[float]:
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < least or time.perf_counter() < end:
        taken.append(timed(net, noise)[1])
        if sum(taken) > 10 * seconds and len(taken) > 2:  # a big batch of a big model: three will do
            break
    return taken


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
