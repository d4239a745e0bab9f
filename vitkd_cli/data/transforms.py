"""Views: a PIL image -> ``[C, H, W]`` uint8, by timm's and torchvision's transforms.

Images stay uint8 until they are on the device, where teacher and student each normalise them their own way.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import MaybePILToTensor, RandomResizedCropAndInterpolation
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torchvision.transforms import Compose, Grayscale, RandomHorizontalFlip

from vitkd_cli.data.pixels import Pixels
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Augmentation

View = Callable[[Image.Image], Tensor]
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
MOST_OPERATIONS = 100  # on one image: more look like a run that hangs


class Views:
    """Several views of an image, which is decoded once."""

    def __init__(self, views: Sequence[View]) -> None:
        self.views = tuple(views)

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        return tuple(view(image) for view in self.views)


def train_view(
    size: int | tuple[int, int],
    aug: Augmentation = Augmentation(),
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> View:
    """Random views for training, with timm's transforms.

    Args:
        size: rows and columns of the view, in pixels.
        mean, std: of the student's images in [0, 1], one value per channel: 3, or 1 for grey, which is made
            of the augmented RGB. Erasing and RandAugment's fill colour follow them.

    Returns:
        A function from a PIL image of any mode, or from :class:`Pixels`, to ``[len(mean), *size]`` uint8; it
        draws from the global generators of Python, numpy and torch, the same for both.
    """
    mean, std = (_channels(values, len(values)) for values in (mean, std))
    aa = None if aug.aa in ("", "none") else aug.aa
    if any(int(number) > MOST_OPERATIONS for number in re.findall(r"-[nwd](\d+)", aa or "")):
        raise UserError(
            f"aa: {aa!r} asks for more than {MOST_OPERATIONS} operations on an image", "timm's default is -n2"
        )
    try:
        augment = create_transform(
            size,
            is_training=True,
            no_aug=aug.no_aug,
            scale=aug.scale,
            ratio=aug.ratio,
            hflip=aug.hflip,
            color_jitter=aug.color_jitter or None,
            auto_augment=aa,
            interpolation=aug.train_interpolation,
            mean=tuple(_channels(mean, 3)),
            normalize=False,  # with it timm would drop erasing in silence, hence re_prob=0 and our own call
            re_prob=0.0,
        )
    except (AssertionError, ValueError, KeyError) as error:
        if aa is None:
            raise
        raise UserError(
            f"aa: timm cannot read {aa!r}", "such as --aa rand-m9-mstd0.5-inc1, or --aa none"
        ) from error
    if len(mean) == 1:
        augment.transforms.insert(-1, Grayscale())  # before the last step, which makes the tensor
    for op in _augmentations(augment.transforms):
        if op.aug_fn is auto_augment.posterize:
            op.aug_fn = _posterize
    erase = [] if aug.no_aug else [_Erase(aug, mean, std)]
    return Compose([_Augment(augment), *erase])


def view_of(config: Mapping[str, Any]) -> View:
    """timm's evaluation view, before normalisation: a function from a PIL image to ``[C, H, W]`` uint8.

    Args:
        config: timm's data configuration: ``input_size`` and what differs from the defaults below. ``mean``
            is the colour of the border in ``crop_mode="border"``.
    """
    own = {
        "crop_pct": 0.875,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
    }
    own.update(config)
    channels, *size = own["input_size"]
    mean = tuple(_channels(own["mean"], channels))
    _check(own["interpolation"], INTERPOLATIONS, "interpolation")
    _check(own["crop_mode"] or "center", CROP_MODES, "crop_mode")
    options = {key: own[key] for key in ("crop_pct", "crop_mode", "interpolation")}
    transform = create_transform(tuple(size), **options, mean=mean, normalize=False)
    return Compose([partial(_in, mode="L" if channels == 1 else "RGB"), transform])


class _Augment:
    """timm's training transforms, of an image by Pillow and of :class:`Pixels` without it as far as possible.

    Both draw the same from the same generators: crop, flip, operations.
    """

    def __init__(self, steps: Compose) -> None:
        self.steps = steps
        self.crop, *self.rest = steps.transforms
        self.fast = isinstance(self.crop, RandomResizedCropAndInterpolation)

    def __call__(self, picture: Image.Image | Pixels) -> Tensor:
        if not self.fast and isinstance(picture, Pixels):
            picture = picture.image()
        if isinstance(picture, Image.Image):
            view: Tensor = self.steps(_in(picture, "RGB"))
            return view
        pixels: Any = self._crop(picture)
        for step in self.rest:
            if isinstance(pixels, Tensor) and not isinstance(step, (RandomHorizontalFlip, MaybePILToTensor)):
                pixels = Pixels(pixels, self.crop.size).image()
            pixels = step(pixels)
        view = pixels
        return view

    def _crop(self, picture: Pixels) -> Tensor:
        """As timm's ``RandomResizedCropAndInterpolation`` of the same draws."""
        whole = torch.empty((3, *picture.size), device="meta")  # of which timm asks the size
        box = self.crop.get_params(whole, self.crop.scale, self.crop.ratio)
        by = self.crop.interpolation
        chosen = random.choice(by) if isinstance(by, (tuple, list)) else by
        return picture.crop(box, self.crop.size, chosen.value)


class _Erase:
    """timm's random erasing, whose noise is N(0, 1) *after* normalisation, on a uint8 image."""

    def __init__(self, aug: Augmentation, mean: Sequence[float], std: Sequence[float]) -> None:
        self.erase = RandomErasing(1.0, mode=aug.remode, max_count=aug.recount, device="cpu")
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))  # [C, 1, 1]
        self.prob = aug.reprob

    def __call__(self, view: Tensor) -> Tensor:
        # timm would draw this itself; drawn here, the images that are left alone cost nothing.
        if random.random() >= self.prob:
            return view
        rectangles = _Rectangles(view.shape)
        self.erase(rectangles)
        for place, noise in rectangles.drawn:
            grey = ((noise * self.std + self.mean) * 255).round().clamp(0, 255)
            view[place] = grey.to(torch.uint8)
        return view


class _Rectangles:
    """What timm erases in place of an image: it notes where timm writes, and what."""

    dtype = torch.float32

    def __init__(self, size: Sequence[int]) -> None:
        self.size = lambda: size
        self.drawn: list[tuple[Any, Tensor]] = []

    def __setitem__(self, place: Any, noise: Tensor) -> None:
        self.drawn.append((place, noise))


def _in(image: Image.Image, mode: str) -> Image.Image:
    """The image in a mode, itself where it has it: a copy of a big one fills the memory."""
    return image if image.mode == mode else image.convert(mode)


def _check(value: str, known: Sequence[str], key: str) -> None:
    if value not in known:
        raise UserError(f"{key}: {value!r} is unknown", f"one of {', '.join(known)}")


def _channels(values: Sequence[float], in_chans: int) -> list[float]:
    """Statistics for 1 or 3 channels: grey statistics are repeated, colour ones averaged."""
    if in_chans not in (1, 3):
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
