"""Pictures as photographs are, for the tests of the fast input and of its cache."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitkd_cli.data.images import Images
from vitkd_cli.data.keyed import Keyed
from vitkd_cli.data.transforms import train_view
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Augmentation


def photo(seed: int, mode: str = "RGB", size: tuple[int, int] = (150, 110)) -> Image.Image:
    """Smooth, as photographs are: clouds of grey."""
    coarse = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).convert(mode)


def saved(folder: Path, name: str, image: Image.Image, **options: object) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    image.save(folder / name, **options)  # type: ignore[arg-type]
    return str(folder / name)


def views(images: Images, aug: Augmentation, size: int = 64) -> torch.Tensor:
    keyed = Keyed(images, train_view((size, size), aug), seed=3)
    keys = [(epoch, i, i) for epoch in range(3) for i in range(len(images))]
    return torch.stack([view[0] for view in keyed.__getitems__(keys) if not isinstance(view, UserError)])
