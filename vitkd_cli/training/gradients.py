"""How strongly each term pulls at the student: the norm of its gradient."""

from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor, nn


class TermGradients:
    """Norms of the terms' gradients, before their weights, at the student's parameters.

    They are those of the global batch: gradients are summed over micro-batches and averaged over
    processes first. One gradient is held at a time, with its copy; of several micro-batches one per term.

    Args:
        scaler: of mixed precision in float16, which keeps small gradients above zero.
        steps: micro-batches that :meth:`add` will see.
    """

    def __init__(self, student: nn.Module, scaler: Any = None, steps: int = 1) -> None:
        self._parameters = [p for p in student.parameters() if p.requires_grad]
        self._scaler, self._steps, self._seen = scaler, steps, 0
        self._sums: dict[str, Tensor] = {}
        self._norms: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """Take in a micro-batch's terms, before its backward frees the graph."""
        self._seen += 1
        for name, value in terms.items():
            gradient = self._of(value) / self._steps
            if name in self._sums:
                gradient += self._sums.pop(name)
            if self._seen < self._steps:
                self._sums[name] = gradient
                continue
            # One process with the whole batch has this mean: see the trainer's gather.
            mean = reduce(gradient, "mean")
            fine = torch.float64 if mean.device.type != "mps" else None
            self._norms[name] = torch.linalg.vector_norm(mean, dtype=fine)

    def norms(self) -> dict[str, float]:
        """Of each term, the same on every process to the bit."""
        together = broadcast(torch.stack(list(self._norms.values())))
        return dict(zip(self._norms, together.tolist(), strict=True))

    def _of(self, value: Tensor) -> Tensor:
        """The gradient of a micro-batch's term, in one row, in float32 at least."""
        if not value.requires_grad:
            return torch.zeros(1, device=value.device)
        scale = torch.ones_like(value)
        if self._scaler is not None:
            # Terms before their weights differ by orders of magnitude, and float16 has few: each is
            # brought to the size 1 first.
            size = value.detach().abs()
            scale = self._scaler.get_scale() / torch.where(size > 0, size, 1)
        parts = torch.autograd.grad(
            value * scale, self._parameters, retain_graph=True, materialize_grads=True
        )
        row = torch.cat([part.flatten().to(torch.promote_types(part.dtype, scale.dtype)) for part in parts])
        return row / scale
