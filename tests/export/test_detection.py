"""The pyramid of docs/export.md: its features are the backbone's, and it trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import timm
import torch

from vitkd_cli.export import export

PAGE = Path(__file__).parents[2] / "docs" / "export.md"


@pytest.fixture(scope="module")
def namespace(saved, tmp_path_factory):
    """What the page's block leaves, over a small backbone."""
    folder = tmp_path_factory.mktemp("detection")
    export(str(saved(img_size=64, patch_size=16)), "features", output=folder / "backbone", num_images=4)
    backbone = timm.create_model(
        f"local-dir:{folder / 'backbone'}", pretrained=True, features_only=True, out_indices=(-1,)
    )
    (block,) = (
        text for text in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "MaskRCNN(" in text
    )
    names = {"timm": timm, "backbone": backbone}
    torch.manual_seed(0)
    exec(block, names)
    return names


def test_strides(namespace):
    pyramid = namespace["SimpleFeaturePyramid"](namespace["backbone"], out_channels=8).eval()
    with torch.no_grad():
        maps = pyramid(x := torch.randn(2, 3, 64, 64))
        (last,) = namespace["backbone"](x)
    sides = {
        name: 64 // stride
        for name, stride in zip(["0", "1", "2", "3", "pool"], [4, 8, 16, 32, 64], strict=True)
    }
    assert {name: tuple(found.shape) for name, found in maps.items()} == {
        name: (2, 8, side, side) for name, side in sides.items()
    }
    assert torch.equal(maps["2"], pyramid.levels[2](last))


def test_it_learns(namespace):
    torch.manual_seed(0)
    detector = namespace["MaskRCNN"](
        namespace["SimpleFeaturePyramid"](namespace["backbone"], out_channels=32),
        num_classes=2,
        fixed_size=(64, 64),
        rpn_post_nms_top_n_train=32,
        box_batch_size_per_image=16,
    ).train()
    generator = torch.Generator().manual_seed(0)
    images = [0.1 * torch.rand(3, 64, 64, generator=generator) for _ in range(2)]
    targets = []
    for image, (left, top) in zip(images, [(8, 8), (24, 30)], strict=True):
        mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
        mask[:, top : top + 32, left : left + 28] = 1
        image += mask
        box = torch.tensor([[left, top, left + 28.0, top + 32.0]])
        targets.append({"boxes": box, "labels": torch.tensor([1]), "masks": mask})
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-3)
    losses = []
    for _ in range(14):
        loss = sum(detector(images, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3]), losses
    assert all(p.grad is not None for p in namespace["backbone"].parameters() if p.requires_grad)
