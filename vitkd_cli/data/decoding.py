"""Any picture that Pillow reads → upright 8-bit RGB; docs/data.md has the table."""

import re
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageColor
from PIL.Image import Transpose

from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Data

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # what it warns of is refused here

# of EXIF's orientations 2 to 8
_TURNS = (
    Transpose.FLIP_LEFT_RIGHT,
    Transpose.ROTATE_180,
    Transpose.FLIP_TOP_BOTTOM,
    Transpose.TRANSPOSE,
    Transpose.ROTATE_270,
    Transpose.TRANSVERSE,
    Transpose.ROTATE_90,
)


class TooLarge(Exception):
    """A picture of more pixels than are allowed; nothing of it was decoded."""

    def __init__(self, pixels: int) -> None:
        super().__init__(f"too large: {pixels:,} pixels")
        self.pixels = pixels


@dataclass(frozen=True)
class Decoding:
    """How pictures become upright 8-bit RGB.

    Attributes:
        exif: turn a picture as its EXIF orientation says; timm does not.
        alpha_fill: colour behind what is transparent, by name or as ``#rrggbb``.
        max_pixels: a picture of more is refused before it is decoded.
    """

    exif: bool = Data.exif
    alpha_fill: str = Data.alpha_fill
    max_pixels: int = Data.max_pixels

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.alpha_fill)
        except ValueError:
            raise UserError(
                f"alpha_fill: {self.alpha_fill!r} is no colour", "a name such as white, or #rrggbb"
            ) from None

    def __call__(self, file: Any) -> Image.Image:
        """Decode a file, by name or open."""
        with self.open(file) as image:
            return self.upright(image)

    def open(self, file: Any) -> Image.Image:
        """The header alone.

        Raises:
            TooLarge: it has more than ``max_pixels``.
        """
        if (own := Image.MAX_IMAGE_PIXELS) is not None and own < self.max_pixels:
            Image.MAX_IMAGE_PIXELS = self.max_pixels  # for the whole process: crops ask for it, too
        try:
            image = Image.open(file)
        except Image.DecompressionBombError as error:
            (pixels, *_) = re.findall(r"\d+", str(error))
            raise TooLarge(int(pixels)) from None
        if (pixels := image.width * image.height) > self.max_pixels:
            image.close()
            raise TooLarge(pixels)
        return image

    def upright(self, image: Image.Image) -> Image.Image:
        """An opened picture, or one of another library, as RGB."""
        image.load()
        orientation = orientation_of(image) if self.exif else 1
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_eight_bits(np.asarray(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            behind = Image.new("RGB", image.size, self.alpha_fill)
            behind.paste(image, mask=image.getchannel("A"))
            image = behind
        elif image.mode != "RGB":
            image = image.convert("RGB")
        # ImageOps.exif_transpose writes the rest of the EXIF anew, and fails where that is odd
        return image.transpose(_TURNS[orientation - 2]) if orientation > 1 else image


def decoding_of(data: Data) -> Decoding:
    """How the request has pictures decoded."""
    return Decoding(data.exif, data.alpha_fill, data.max_pixels)


def orientation_of(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none, or none that can be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's reader of EXIF raises SyntaxError, struct.error, ...
        return 1
    return orientation if orientation in range(1, 9) else 1


def _eight_bits(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Grey values ``[H, W]`` of 16 or 32 bits, or floating point → uint8, by the range of their type.

    Types whose whole range nobody uses are taken by what they hold: 32-bit integers as 8 or 16 bits where
    these hold them, floats in [0, 1] as 0 to 255; all others from their least to their largest value.
    """
    if values.dtype.kind != "f":
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 0xFF and values.itemsize > 2:
            return values.astype(np.uint8)
        if low >= 0 and high <= 0xFFFF:
            return (values >> 8).astype(np.uint8)  # as Pillow reads 16-bit colour
    else:
        finite = values[np.isfinite(values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        if low >= 0 and high <= 1:
            low, high = 0.0, 1.0
    scaled = (values.astype(np.float64) - low) * (255 / (high - low) if high > low else 0)
    return np.nan_to_num(scaled, nan=0, posinf=255, neginf=0).round().astype(np.uint8)
