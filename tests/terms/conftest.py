from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor

from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.training.learner import Learner
from vitkd_cli.vit.spec import BlockSpec, ViTSpec, as_seen_by, describe
from vitkd_cli.vit.taps import TappedViT


def vit_spec(
    dim: int,
    *,
    grid: tuple[int, int] = (4, 4),
    depth: int = 3,
    classes: int = 24,
    name: str = "vit",
    distilled: bool = False,
) -> ViTSpec:
    blocks = tuple(
        BlockSpec(
            f"blocks.{i}", dim, grid, heads=2, num_prefix_tokens=1, attention_output=f"blocks.{i}.norm2"
        )
        for i in range(depth)
    )
    return ViTSpec(
        name=name,
        blocks=blocks,
        num_prefix_tokens=1,
        input_size=(grid[0] * 4, grid[1] * 4),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        num_classes=classes,
        embed_dim=dim,
        final_dim=dim,
        final_grid=grid,
        distilled=distilled,
    )


@pytest.fixture
def spec() -> Callable[..., ViTSpec]:
    return vit_spec


_VIT = {"img_size": 32, "patch_size": 8, "depth": 3, "num_classes": 10}
_SWIN = {"img_size": 32, "depths": (1, 2), "embed_dim": 24, "num_heads": (1, 2), "window_size": 4}
# grid, width and prefix tokens of the last block
SMALL_VITS = {
    "flat": ("vit_tiny_patch16_224", {**_VIT, "embed_dim": 24, "num_heads": 3}),  # 4×4, 24, 1
    "deep": ("vit_tiny_patch16_224", {**_VIT, "embed_dim": 48, "num_heads": 4, "depth": 9, "patch_size": 4}),
    "oblong": ("vit_tiny_patch16_224", {**_VIT, "embed_dim": 32, "num_heads": 2, "img_size": (32, 48)}),
    "registers": ("vit_small_patch14_reg4_dinov2", {**_VIT, "embed_dim": 48, "num_heads": 3}),  # 4×4, 48, 5
    "tokenless": ("vit_base_patch16_siglip_224", {**_VIT, "embed_dim": 48, "num_heads": 3}),  # 4×4, 48, 0
    "swin": ("swin_tiny_patch4_window7_224", {**_SWIN, "num_classes": 10}),  # 8×8, 24 and 4×4, 48
}

Learn = Callable[..., tuple[dict[str, Tensor], Learner]]


@pytest.fixture
def learn() -> Learn:
    """``learn(formula, student, teacher)``: one forward and backward through small random models by name."""

    def run(formula: str, student: str, teacher: str) -> tuple[dict[str, Tensor], Learner]:
        torch.manual_seed(0)
        ours, theirs = (
            timm.create_model(name, **kwargs) for name, kwargs in map(SMALL_VITS.get, (student, teacher))
        )
        spec, teachers = describe(ours, name=student), describe(theirs, name=teacher)
        learner = Learner(ours, Objective(formula, spec, teachers), spec)
        images = torch.rand(4, 3, 32, 32)
        with torch.no_grad():
            tapped = TappedViT(theirs.eval(), learner.objective.teacher_taps, teachers)
            signals = tapped(as_seen_by(teachers, images))
        batch = Batch(torch.tensor([3, 0, 9, 7]), generator=torch.Generator().manual_seed(1), global_size=4)
        total, raw = learner(images, signals, batch)
        total.backward()
        assert total.isfinite()
        gradients = [parameter.grad for parameter in learner.objective.parameters()]
        gradients.append(ours.get_submodule("patch_embed").proj.weight.grad)
        assert all(g is not None and g.isfinite().all() and g.any() for g in gradients)
        return raw, learner

    return run
