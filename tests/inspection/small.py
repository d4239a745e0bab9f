"""The zoo's models as these tests look at them."""

from __future__ import annotations

import torch
from zoo import SMALL, noise
from zoo import small as made

from vitkd_cli.vit.model import Model

__all__ = ["FAMILIES", "noise", "small"]

# Those without any map: linear attention, or a state space.
LINEAR = ("coat_", "efficientvim_", "efficientvit_b", "efficientvit_l")
FAMILIES = [name for name in SMALL if not name.startswith(LINEAR)]


def small(name: str) -> Model:
    """In double precision, or the last layers of deep ones would differ by more than the tolerance."""
    return made(name, noise=0.05, dtype=torch.double)
