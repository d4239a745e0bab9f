"""A JPEG → uint8 pixels → a crop, by libjpeg-turbo and torch in place of Pillow: the fast input.

What is decoded equals Pillow's to the bit; a crop's grey values differ by 1 where two ways of rounding do.
"""

import warnings
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from functools import cache
from io import BytesIO
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vitkd_cli.data.decoding import Decoding, orientation_of
from vitkd_cli.data.images import Split, Stream


class Pixels(NamedTuple):
    """An upright RGB picture.

    Attributes:
        values: ``[3, h, w]`` uint8, the channels last in memory.
        size: rows and columns of the picture, of which ``values`` may be a smaller copy. Crops are drawn
            from it.
    """

    values: Tensor
    size: tuple[int, int]

    def image(self) -> Image.Image:
        """For Pillow."""
        return Image.fromarray(self.values.permute(1, 2, 0).numpy())

    def crop(self, box: tuple[int, int, int, int], size: tuple[int, int], interpolation: str) -> Tensor:
        """A part of the picture, scaled to ``size`` as Pillow does, antialiased.

        Args:
            box: its first row and column, and its rows and columns.
            interpolation: bicubic or bilinear.

        Returns:
            ``[3, *size]`` uint8.
        """
        height, width = self.values.shape[1:]
        top, left, rows, columns = box
        if (height, width) != self.size:
            down, right = height / self.size[0], width / self.size[1]
            top, left = min(round(top * down), height - 1), min(round(left * right), width - 1)
            rows = max(1, min(round(rows * down), height - top))
            columns = max(1, min(round(columns * right), width - left))
        part = self.values[None, :, top : top + rows, left : left + columns]
        part = part.contiguous(memory_format=torch.channels_last)  # a third faster than as it lies
        scaled = torch.nn.functional.interpolate(part, size, mode=interpolation, antialias=True)
        return scaled[0]


@dataclass(frozen=True)
class FastDecoding(Decoding):
    """:class:`Decoding`, but a plain JPEG becomes :class:`Pixels`.

    Not plain are pictures that EXIF turns, CMYK, and whatever libjpeg-turbo complains of: they stay Pillow's,
    and so do other formats.
    """

    @classmethod
    def like(cls, decoding: Decoding) -> Self:
        """With the settings of another one."""
        return cls(**asdict(decoding))

    def __call__(self, file: Any) -> Any:
        """Decode a file, by name or open: :class:`Pixels`, else a PIL image."""
        if isinstance(file, str):
            with open(file, "rb") as opened:
                content = opened.read()
        else:
            content = file.read()
        with self.open(BytesIO(content)) as image:
            if image.format == "JPEG" and image.mode in ("RGB", "L") and not self._turns(image):
                try:
                    values = _decoder()(content)
                    return Pixels(values, (values.shape[1], values.shape[2]))
                except (RuntimeError, ValueError, OSError):
                    pass  # Pillow judges
            return self.upright(image)

    def _turns(self, image: Image.Image) -> bool:
        tells = "exif" in image.info or "xmp" in image.info
        return self.exif and tells and orientation_of(image) > 1


def decoded_fast(images: Split) -> Split:
    """The same images, by :class:`FastDecoding`; a stream's reader decodes by itself."""
    if isinstance(images, Stream):
        return images
    decoded = copy(images)
    decoded.decode_by(FastDecoding.like(images.decoding))
    return decoded


def as_values(image: Image.Image) -> Tensor:
    """An RGB picture's ``[3, H, W]`` uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@cache
def _decoder() -> Callable[[bytes], Tensor]:
    """JPEG → ``[3, H, W]`` uint8: by simplejpeg, where it is installed, by torchvision, or by Pillow."""
    try:
        import simplejpeg  # a sixth faster

        return lambda content: torch.from_numpy(simplejpeg.decode_jpeg(content)).permute(2, 0, 1)
    except ImportError:
        pass
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except ImportError:  # it is to be removed there
        return lambda content: as_values(Image.open(BytesIO(content)).convert("RGB"))

    # 0.29 speaks of a removal, of each image
    warnings.filterwarnings("ignore", "The image decoding and encoding capabilities of TorchVision")
    return lambda content: decode_jpeg(
        torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)), ImageReadMode.RGB
    )
