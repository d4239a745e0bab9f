"""The student and its objective, as the one module that is wrapped for distribution."""

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import ViTSpec, as_seen_by
from vitkd_cli.vit.taps import Tap, TappedViT, cut


class Learner(nn.Module):
    """Images and the teacher's signals → the loss and its raw terms, in one ordinary forward.

    Args:
        student: the model that learns.
        objective: what is minimised.
        spec: the student's facts.
    """

    def __init__(self, student: nn.Module, objective: Objective, spec: ViTSpec) -> None:
        super().__init__()
        taps = {replace(tap, view=0) for tap in objective.student_taps}
        self.student = TappedViT(student, taps, spec)
        self.objective = objective
        self.spec = spec

    def forward(
        self, images: Tensor, teacher: dict[Tap, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Images ``[B, C, H, W]`` in [0, 1] → the weighted sum, and every term as it is."""
        seen = as_seen_by(self.spec, images)
        signals: dict[Tap, Tensor] = self.student(seen)
        if (second := self.objective.second_view(seen, batch)) is not None:
            again = {replace(tap, view=1): signal for tap, signal in self.student(second).items()}
            signals |= {tap: again[tap] for tap in self.objective.student_taps & again.keys()}
        return self.objective(signals, teacher, batch)

    def optimizer_groups(self, weight_decay: float, layer_decay: float | None) -> list[dict[str, Any]]:
        """Parameter groups by timm's rules: no decay on biases, norms and what the model exempts.

        Layer decay is the student's alone; projectors learn at the full rate.
        """
        from timm.optim import param_groups_layer_decay, param_groups_weight_decay

        student = self.student.model
        exempt: set[str] = set()
        if hasattr(student, "no_weight_decay"):
            exempt = student.no_weight_decay()  # type: ignore[operator]
        if layer_decay is None:
            groups = param_groups_weight_decay(student, weight_decay, no_weight_decay_list=exempt)
        else:
            groups = param_groups_layer_decay(
                student, weight_decay, no_weight_decay_list=exempt, layer_decay=layer_decay
            )
        # Matrices and the mask token decay, biases do not: as the authors train theirs.
        projectors = param_groups_weight_decay(self.objective, weight_decay)
        return [g for g in [*groups, *projectors] if g["params"]]


# What autocast does to the weights of these is to round them at each use; a subclass may do more with them.
_ROUNDED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Teacher:
    """The frozen model that is imitated: in eval mode, without gradients, outside the wrapped module.

    It runs no further than its deepest tap.

    Attributes:
        rounded: the parameters that may be kept in bfloat16 (:meth:`try_bf16`).
    """

    def __init__(self, built: Model, taps: frozenset[Tap], *, compiled: bool = False) -> None:
        self.built = built
        self.spec = built.spec
        self.taps = taps
        self.rounded = tuple(p for p in built.net.parameters() if p.dtype == torch.bfloat16)
        built.net.requires_grad_(False).eval()
        model = cut(built.net, taps, built.spec) if compiled else built.net
        stops = not (compiled or isinstance(built.net, FSDPModule))
        self.tapped = TappedViT(model, taps, built.spec, stop_early=stops).eval()

    @property
    def bytes(self) -> int:
        """Of its weights while a student is trained."""
        half = {id(parameter) for parameter in self.rounded}
        each = ((p, 2 if id(p) in half else p.element_size()) for p in self.built.net.parameters())
        return sum(p.numel() * size for p, size in each)

    def try_bf16(self, images: Tensor) -> None:
        """See whether weights that autocast rounds at each use can be kept rounded, in half the memory.

        They can where the signals are the same to the bit, as with every structure of timm's.

        Args:
            images: ``[B, C, H, W]``, to try it on, under the autocast of the training.
        """
        layers = {id(layer): type(layer) in _ROUNDED for layer in self.built.net.modules()}
        owned = [
            (parameter, layers[id(layer)])
            for layer in self.built.net.modules()
            for parameter in layer._parameters.values()
            if parameter is not None
        ]
        others = {id(parameter) for parameter, plain in owned if not plain}  # where one is shared
        tried = {id(p): p for p, plain in owned if plain and id(p) not in others}
        before, whole = self(images), [parameter.data for parameter in tried.values()]
        self.rounded = tuple(tried.values())
        self.halve()
        try:
            after = self(images)
        except RuntimeError:  # a layer that autocast leaves alone
            after = {}
        if not all(torch.equal(signal, after.get(tap, signal[:0])) for tap, signal in before.items()):
            self.rounded = ()
        for parameter, data in zip(tried.values(), whole, strict=True):
            parameter.data = data

    def halve(self) -> None:
        """Keep in bfloat16 what can be."""
        for parameter in self.rounded:
            if parameter.dtype != torch.bfloat16:
                parameter.data = parameter.data.to(torch.bfloat16)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[Tap, Tensor]:
        """Its signals for the very images that the student sees, ``[B, C, H, W]`` in [0, 1]."""
        with torch.autocast(images.device.type, torch.bfloat16) if self.rounded else nullcontext():
            return self.tapped(as_seen_by(self.spec, images))
