"""One batch of seeded noise through everything, before any data is read."""

import resource
import sys
from dataclasses import dataclass

import torch

from vitkd_cli.errors import UserError
from vitkd_cli.terms import Batch
from vitkd_cli.training.learner import Learner, Teacher


@dataclass(frozen=True)
class Rehearsal:
    """What the rehearsal showed.

    Attributes:
        frozen: parameters of the student that no term reaches; they would stall distributed training.
        peak_memory: bytes on the device, or of the process on a CPU.
        images: how many it took.
    """

    frozen: tuple[str, ...]
    peak_memory: int
    images: int


def rehearse(
    learner: Learner,
    teacher: Teacher | None,
    *,
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    images: int = 2,
) -> Rehearsal:
    """Prove every tap, shape, class count and grid, and freeze what no term reaches.

    Args:
        size: rows and columns of the batches that the data will deliver.
        images: of the batch of noise.
    """
    spec = learner.spec
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    training = learner.training
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        noise = torch.rand(images, len(spec.mean), *size, device=device, dtype=dtype)
        targets = None
        if spec.num_classes:
            targets = torch.arange(images, device=device) % spec.num_classes
        generator = torch.Generator().manual_seed(0)
        learner.train()
        total, raw = learner(
            noise,
            teacher(noise) if teacher else {},
            Batch(targets=targets, generator=generator, global_size=images),
        )
        total.backward()
    bad = [name for name, value in raw.items() if not torch.isfinite(value)]
    if bad:
        raise UserError(
            f"{', '.join(bad)} is not finite on a batch of noise", "check the weights that were loaded"
        )
    if not torch.isfinite(total):
        shown = ", ".join(f"{name} {float(value.detach()):.3g}" for name, value in raw.items())
        raise UserError(
            f"the weighted sum of {shown} is not finite on a batch of noise", "smaller weights in --loss"
        )
    frozen = []
    for name, parameter in learner.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.requires_grad_(False)
            frozen.append(name.removeprefix("student.model."))
        parameter.grad = None
    for name, buffer in learner.named_buffers():
        buffer.copy_(buffers[name])
    learner.train(training)
    return Rehearsal(tuple(frozen), peak_memory(device), images)


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: on the device, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
