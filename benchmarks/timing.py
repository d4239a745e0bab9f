"""Variants timed in turn, so that a busy machine tilts none of them, and the table that they make."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

Times = dict[str, list[float]]


def clock(device: torch.device | str = "cpu") -> float:
    """Seconds of this process on a CPU, or by the clock once the GPU is idle."""
    if torch.device(device).type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turn(
    variants: Mapping[str, Callable[[int], object]],
    repeats: int,
    device: torch.device | str = "cpu",
    warmup: int = 1,
) -> Times:
    """Seconds of every round of each variant, which is given the round's number; the first rounds warm up."""
    times: Times = {name: [] for name in variants}
    for repeat in range(-warmup, repeats):
        for name, run in variants.items():
            start = clock(device)
            run(max(0, repeat))
            if repeat >= 0:
                times[name].append(clock(device) - start)
    return times


def ratios(times: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Times over the base's: of the smallest, and the median over pairs of neighbours."""
    return min(times) / min(base), median(a / b for a, b in zip(times, base, strict=True))


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table in Markdown; numbers have three digits."""
    cells = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(heading), ["---"] * len(heading), *cells])


def judged(ratio: float, goal: float, *, at_least: bool = False) -> str:
    """A goal, and whether the ratio reaches it."""
    met = ratio >= goal if at_least else ratio <= goal
    return f"{'≥' if at_least else '≤'} {goal:g}: {'met' if met else '**missed**'}"
