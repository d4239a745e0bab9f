from collections.abc import Callable

import pytest

from vitkd_cli.vit.spec import BlockSpec, ViTSpec


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
