"""A second data set, made here: letters and digits in fonts that come with matplotlib, harder than the scans.

47 classes, those of EMNIST's balanced split (Cohen et al. 2017, arXiv:1702.05373): digits, capitals, and the
small letters that look unlike their capitals. Training and validation share no family of fonts: what is
learned has to carry over to shapes of letters that were never seen. DejaVu's fonts are under the Bitstream
Vera and Arev licences, STIX under the SIL Open Font License, Computer Modern (BaKoMa) under its own; the
licences lie beside the fonts in matplotlib. Images are made on the user's machine and not distributed.
"""

import random
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFilter, ImageFont

CLASSES = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt"
TRAIN = (
    *("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique"),
    *("DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique"),
    *("STIXGeneral", "STIXGeneralItalic", "STIXGeneralBol", "STIXGeneralBolIta", "cmtt10"),
)
VALIDATION = (
    *("DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic"),
    *("cmss10", "cmr10"),
)
VARIANTS = 4  # of each letter in each font
SIDE = 32  # pixels


def glyphs(folder: Path) -> Path:
    """The data set as class folders, ``train/`` and ``val/``; made once, the same on every machine."""
    if (folder / "done").exists():
        return folder
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for split, names in (("train", TRAIN), ("val", VALIDATION)):
        for letter in CLASSES:
            place = folder / split / f"{kind_of(letter)}-{letter}"
            place.mkdir(parents=True, exist_ok=True)
            for name in names:
                font = ImageFont.truetype(str(fonts / f"{name}.ttf"), 62)
                for variant in range(VARIANTS):
                    drawn(letter, font, random.Random(f"{split} {letter} {name} {variant}")).save(
                        place / f"{name}-{variant}.png"
                    )
    (folder / "done").touch()
    return folder


def kind_of(letter: str) -> str:
    """In a folder's name, for systems that do not tell ``A`` from ``a``."""
    return "digit" if letter.isdigit() else "small" if letter.islower() else "capital"


def drawn(letter: str, font: ImageFont.FreeTypeFont, chance: random.Random) -> Image.Image:
    """A letter, turned, sheared, scaled, moved, blurred and noisy, 32 × 32 grey."""
    canvas = Image.new("L", (96, 96), 0)
    ImageDraw.Draw(canvas).text((48, 48), letter, font=font, fill=255, anchor="mm")
    canvas = canvas.rotate(chance.uniform(-20, 20), Image.Resampling.BICUBIC)
    shear, zoom = chance.uniform(-0.25, 0.25), chance.uniform(0.75, 1.15)
    moved = chance.uniform(-6, 6), chance.uniform(-6, 6)
    matrix = (1 / zoom, shear, 48 - 48 / zoom - 48 * shear + moved[0], 0, 1 / zoom, 48 - 48 / zoom + moved[1])
    canvas = canvas.transform((96, 96), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)
    small = canvas.crop((12, 12, 84, 84)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    small = small.filter(ImageFilter.GaussianBlur(chance.uniform(0, 0.9)))
    paper, ink = chance.uniform(0, 90), chance.uniform(150, 255)
    noise = Image.frombytes("L", small.size, bytes(chance.randrange(256) for _ in range(SIDE * SIDE)))
    lit = small.point(lambda value: paper + (ink - paper) * value / 255)
    return Image.blend(lit, noise, chance.uniform(0.05, 0.2))
