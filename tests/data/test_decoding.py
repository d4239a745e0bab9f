"""Pictures of real life: every kind of file becomes upright 8-bit RGB; what is too large is not decoded."""

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import loose_images
from vitkd_cli.data.keyed import keyed_generators
from vitkd_cli.data.transforms import train_view, view_of
from vitkd_cli.errors import UserError

GENERATOR = np.random.default_rng(0)
COLOUR = np.kron(GENERATOR.integers(0, 256, (4, 6, 3), np.uint8), np.ones((8, 8, 1), np.uint8))  # [32, 48, 3]
GREY = np.asarray(Image.fromarray(COLOUR).convert("L"))
PLAIN = Image.fromarray(COLOUR)
Kind = tuple[str, Image.Image, dict[str, Any], np.ndarray[Any, Any]]


def alike(grey: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(grey[..., None], 3, -1)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def lying(orientation: int) -> Image.Image:
    """The picture as a camera stores it that says how to turn it."""
    turn = Image.Transpose
    undone = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_90,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_270,
    }
    return PLAIN.transpose(undone[orientation])


def seen_through(alpha: int) -> Image.Image:
    image = PLAIN.convert("RGBA")
    image.putalpha(alpha)
    return image


def on_white(alpha: int) -> np.ndarray[Any, Any]:
    return np.round(COLOUR * (alpha / 255) + (255 - alpha)).astype(np.uint8)


FLOAT = GREY.astype(np.float32)
STRETCHED = np.round((FLOAT - FLOAT.min()) / (FLOAT.max() - FLOAT.min()) * 255).astype(np.uint8)
BLACK = Image.new("RGB", PLAIN.size)
KINDS: dict[str, Kind] = {
    "RGB": ("png", PLAIN, {}, COLOUR),
    "JPEG": ("jpg", PLAIN, {"quality": 95, "subsampling": 0}, COLOUR),
    "BMP": ("bmp", PLAIN, {}, COLOUR),
    "WebP": ("webp", PLAIN, {"lossless": True}, COLOUR),
    "TIFF": ("tiff", PLAIN, {}, COLOUR),
    "CMYK": ("jpg", PLAIN.convert("CMYK"), {"quality": 95, "subsampling": 0}, COLOUR),
    "palette": ("png", PLAIN.quantize(24), {}, COLOUR),
    "grey": ("png", Image.fromarray(GREY), {}, alike(GREY)),
    "1 bit": ("png", Image.fromarray(GREY > 99), {}, alike(255 * (GREY > 99).astype(np.uint8))),
    "16 bits": ("png", Image.fromarray(GREY.astype(np.uint16) * 257), {}, alike(GREY)),
    "16 bits, dark": ("png", Image.fromarray(GREY.astype(np.uint16)), {}, alike(0 * GREY)),
    "16 bits, TIFF": ("tiff", Image.fromarray(GREY.astype(np.uint16) * 256), {}, alike(GREY)),
    "32 bits": ("tiff", Image.fromarray(GREY.astype(np.int32) * 10**6), {}, alike(STRETCHED)),
    "32 bits that hold 8": ("tiff", Image.fromarray(GREY.astype(np.int32)), {}, alike(GREY)),
    "float of one value": ("tiff", Image.fromarray(0 * FLOAT + 7), {}, alike(0 * GREY)),
    "float": ("tiff", Image.fromarray(FLOAT / 255), {}, alike(GREY)),
    "float of any range": ("tiff", Image.fromarray(FLOAT * 7 - 900), {}, alike(STRETCHED)),
    "opaque": ("png", seen_through(255), {}, COLOUR),
    "half see-through": ("png", seen_through(128), {}, on_white(128)),
    "see-through": ("png", seen_through(0), {}, 0 * COLOUR + 255),
    "grey and alpha": ("png", seen_through(0).convert("LA"), {}, 0 * COLOUR + 255),
    "see-through colour": ("png", BLACK, {"transparency": (0, 0, 0)}, 0 * COLOUR + 255),
    "animated": ("gif", PLAIN.quantize(24), {"save_all": True, "append_images": [BLACK]}, COLOUR),
    **{f"EXIF {n}": ("png", lying(n), {"exif": exif(n)}, COLOUR) for n in range(2, 9)},
    "EXIF in JPEG": ("jpg", lying(6), {"exif": exif(6), "quality": 95, "subsampling": 0}, COLOUR),
    "EXIF in TIFF": ("tiff", lying(6), {"exif": exif(6)}, COLOUR),
    "EXIF out of range": ("png", PLAIN, {"exif": exif(9)}, COLOUR),
    "EXIF that is none": (
        "jpg",
        PLAIN,
        {"exif": b"Exif\0\0no TIFF at all", "quality": 95, "subsampling": 0},
        COLOUR,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_becomes_upright_rgb(kind: str, tmp_path: Path) -> None:
    suffix, image, options, wanted = KINDS[kind]
    file = tmp_path / f"photo.{suffix}"
    image.save(file, **options)
    found, _ = loose_images([file])[0]
    assert found.mode == "RGB" and found.size == (wanted.shape[1], wanted.shape[0])
    difference = np.abs(np.asarray(found).astype(int) - wanted).max()
    assert difference <= (12 if suffix == "jpg" else 1 if "half" in kind else 0)


def test_asked_otherwise_a_picture_lies_as_timm_has_it_and_on_any_colour(tmp_path: Path) -> None:
    lying(6).save(tmp_path / "6.jpg", exif=exif(6))
    seen_through(0).save(tmp_path / "clear.png")
    images = loose_images([tmp_path / "6.jpg", tmp_path / "clear.png"])
    images.decode_by(Decoding(exif=False, alpha_fill="#102030"))
    assert images[0][0].size == (32, 48)
    assert images[1][0].getpixel((5, 5)) == (16, 32, 48)
    with pytest.raises(UserError, match="alpha_fill: 'wite' is no colour"):
        Decoding(alpha_fill="wite")


@pytest.mark.parametrize("in_chans", [3, 1])
def test_views_of_every_kind_are_uint8(in_chans: int, tmp_path: Path) -> None:
    deep = tmp_path / "deep.tiff"
    Image.fromarray(GREY.astype(np.uint16) * 257).save(deep)
    image, _ = loose_images([deep])[0]
    mean = (0.5,) * in_chans
    for view in (view_of({"input_size": (in_chans, 16, 16)}), train_view((16, 16), mean=mean, std=mean)):
        with keyed_generators(0):
            assert view(image).shape == (in_chans, 16, 16)


def bomb(file: Path, width: int, height: int) -> Path:
    """A PNG's header with these sizes, and no pixel behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    return file


@pytest.mark.parametrize("side", [13_000, 20_000, 60_000])  # below and above what Pillow itself refuses
def test_too_large_a_picture_is_refused_before_it_is_decoded(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = loose_images([bomb(tmp_path / "scan.png", side, side)])
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it is decoded"))
    with pytest.raises(UserError, match=f"scan.png: too large: {side * side:,} pixels") as caught:
        images[0]
    assert caught.value.hint.endswith(f"--max-pixels {side * side}") and "delete" not in caught.value.hint


def test_a_picture_below_the_limit_passes_whatever_pillow_thinks(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "scan.png")
    images = loose_images([tmp_path / "scan.png"])
    images.decode_by(Decoding(max_pixels=200_000_000))
    with Decoding(max_pixels=200_000_000).open(tmp_path / "scan.png") as image:
        assert image.size == (20_000, 10_000)
    images.decode_by(Decoding(max_pixels=199_999_999))
    with pytest.raises(UserError, match="too large: 200,000,000 pixels"):
        images[0]
