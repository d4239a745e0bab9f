"""Views: a PIL image -> ``[C, H, W]`` uint8, by timm's and torchvision's transforms.

Images stay uint8 until they are on the device, where teacher and student each normalise them their own way.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Grayscale

from vitkd_cli.errors import UserError

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
RGB, GREY = 3, 1
MOST_OPERATIONS = 100  # on one image: more look like a run that hangs


class TrainView:
    """A random view of an image, erased with probability ``reprob``; build it with :func:`train_view`."""

    def __init__(self, augment: Any, erase: RandomErasing, reprob: float, mean: Tensor, std: Tensor) -> None:
        self.augment, self.erase, self.reprob = augment, erase, reprob
        self.mean, self.std = mean, std  # [C, 1, 1] each

    def __call__(self, image: Image.Image) -> Tensor:
        view: Tensor = self.augment(_in(image, "RGB"))  # [C, H, W] uint8
        # timm would draw this itself; drawn here, the images that are left alone cost nothing.
        return self._erased(view) if random.random() < self.reprob else view

    def _erased(self, view: Tensor) -> Tensor:
        """timm's random erasing, whose noise is N(0, 1) *after* normalisation, on a uint8 image.

        timm writes into a canvas of NaN; where it wrote, its noise is taken back to grey values and clipped.
        """
        canvas = self.erase(torch.full(view.shape, torch.nan))  # [C, H, W]
        noise = ((canvas * self.std + self.mean) * 255).round().clamp(0, 255)
        return torch.where(canvas.isnan(), view, noise.nan_to_num().to(torch.uint8))


class ValView:
    """The same view of an image every time; build it with :func:`val_view`."""

    def __init__(self, transform: Any, mode: str) -> None:
        self.transform, self.mode = transform, mode

    def __call__(self, image: Image.Image) -> Tensor:
        view: Tensor = self.transform(_in(image, self.mode))  # [C, H, W] uint8
        return view


class Views:
    """Several views of an image, which is decoded once."""

    def __init__(self, views: Sequence[ValView]) -> None:
        self.views = tuple(views)

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        return tuple(view(image) for view in self.views)


def train_view(
    size: tuple[int, int],
    *,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    color_jitter: float = 0.0,
    aa: str | None = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    reprob: float = 0.25,
    remode: str = "pixel",
    recount: int = 1,
    no_aug: bool = False,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
    in_chans: int = 3,
) -> TrainView:
    """Random views for training, with timm's parameters under timm's names.

    Args:
        size: rows and columns of the view, in pixels.
        aa: a RandAugment, AutoAugment or AugMix string of timm's; "", "none" or None for none.
        interpolation: Pillow's filter by name, or "random".
        reprob, remode, recount: random erasing: probability; "pixel", "rand" or "const"; most rectangles.
        no_aug: resize and crop only.
        mean, std: of the student's images in [0, 1]; erasing and RandAugment's fill colour follow them.
        in_chans: 3, or 1 for grey; augmentation happens in RGB either way.

    Returns:
        A function from a PIL image of any mode to ``[in_chans, *size]`` uint8; it draws from the global
        generators of Python, numpy and torch.

    Raises:
        UserError: a name that timm does not know.
    """
    mean, std = _channels(mean, in_chans), _channels(std, in_chans)
    _check(interpolation, (*INTERPOLATIONS, "random"), "train_interpolation")
    _check(remode, ("pixel", "rand", "const"), "remode")
    aa = None if aa in (None, "", "none") else aa
    if any(int(number) > MOST_OPERATIONS for number in re.findall(r"-[nwd](\d+)", aa or "")):
        raise UserError(
            f"aa: {aa!r} asks for more than {MOST_OPERATIONS} operations on an image", "timm's default is -n2"
        )
    try:
        augment = create_transform(
            size,
            is_training=True,
            no_aug=no_aug,
            scale=scale,
            ratio=ratio,
            hflip=hflip,
            color_jitter=color_jitter or None,
            auto_augment=aa,
            interpolation=interpolation,
            mean=tuple(_channels(mean, RGB)),
            normalize=False,  # with it timm would drop erasing in silence, hence re_prob=0 and our own call
            re_prob=0.0,
        )
    except (AssertionError, ValueError, KeyError) as error:
        if aa is None:
            raise
        raise UserError(
            f"aa: timm cannot read {aa!r}", "such as --aa rand-m9-mstd0.5-inc1, or --aa none"
        ) from error
    if in_chans == GREY:
        augment.transforms.insert(-1, Grayscale())  # before the last step, which makes the tensor
    for op in _augmentations(augment.transforms):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    erase = RandomErasing(1.0, mode=remode, max_count=recount, device="cpu")
    mean_and_std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return TrainView(augment, erase, 0.0 if no_aug else reprob, *mean_and_std)


def val_view(
    size: tuple[int, int],
    *,
    crop_pct: float | None = 0.875,
    crop_mode: str | None = "center",
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    in_chans: int = 3,
) -> ValView:
    """timm's evaluation view, before normalisation.

    Args:
        size: rows and columns of the view, in pixels.
        crop_pct: share of the resized image that the crop keeps, along each side.
        crop_mode: timm's: "center", "squash" or "border" (padded in the colour of ``mean``).
        in_chans: 3, or 1 for grey.

    Returns:
        A function from a PIL image of any mode to ``[in_chans, *size]`` uint8.

    Raises:
        UserError: a name that timm does not know.
    """
    _check(interpolation, INTERPOLATIONS, "interpolation")
    _check(crop_mode or "center", ("center", "squash", "border"), "crop_mode")
    transform = create_transform(
        size,
        is_training=False,
        interpolation=interpolation,
        crop_pct=crop_pct,
        crop_mode=crop_mode,
        mean=tuple(_channels(mean, in_chans)),
        normalize=False,
    )
    return ValView(transform, "L" if in_chans == GREY else "RGB")


def view_of(config: Mapping[str, Any]) -> ValView:
    """The view of timm's data configuration, as :func:`val_view`."""
    channels, *size = config["input_size"]
    return val_view(
        (size[0], size[1]),
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        in_chans=channels,
    )


def _in(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode, itself where it has it: a copy of a big one fills the memory."""
    return image if image.mode == mode else image.convert(mode)


def _check(value: str, known: Sequence[str], key: str) -> None:
    if value not in known:
        raise UserError(f"{key}: {value!r} is unknown", f"one of {', '.join(known)}")


def _channels(values: Sequence[float], in_chans: int) -> list[float]:
    """Statistics for 1 or 3 channels: grey statistics are repeated, colour ones averaged."""
    if in_chans not in (GREY, RGB):
        raise UserError(f"in_chans is {in_chans}", "images have 3 channels, or 1 with --in-chans 1")
    if len(values) == in_chans:
        return list(values)
    return [sum(values) / len(values)] * in_chans


def _augmentations(steps: Sequence[Any]) -> Iterator[auto_augment.AugmentOp]:
    """The single operations of timm's RandAugment, AugMix (``ops``) and AutoAugment (``policy``)."""
    for step in steps:
        yield from getattr(step, "ops", ())
        for policy in getattr(step, "policy", ()):
            yield from policy


def _posterize(image: Image.Image, bits_to_keep: int, **options: Any) -> Image.Image:
    # timm's strongest magnitude keeps 0 bits: black in older Pillows, a ValueError since Pillow 13.
    posterized: Image.Image = auto_augment.posterize(image, max(1, bits_to_keep), **options)
    return posterized
