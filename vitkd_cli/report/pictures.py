"""Small pictures inside the page: validation images, and attention over them."""

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from vitkd_cli.data.images import Images
from vitkd_cli.data.transforms import View
from vitkd_cli.errors import UserError
from vitkd_cli.inspection.draw import Cell, over_cells
from vitkd_cli.inspection.images import views_of
from vitkd_cli.inspection.kinds import AttentionLayer
from vitkd_cli.inspection.maps import attention_layers, image_attention
from vitkd_cli.vit.model import Model

SIDE, THUMB = 96, 72  # pixels of a picture of attention, and of an image
LAYERS = 4  # that are shown of a model, first and last among them


@dataclass(frozen=True)
class Picture:
    """A picture that carries its pixels.

    Attributes:
        source: a ``data:`` address.
        words: what is to be seen, for who cannot see it.
        below: print under it.
        small: it has few pixels of its own, which are not blurred.
    """

    source: Markup
    words: str
    below: str = ""
    small: bool = False


@dataclass(frozen=True)
class AttentionRow:
    """One model's layers over one image."""

    title: str
    pictures: Sequence[Picture]


def thumbnail(images: Images, index: int, words: str, below: str = "") -> Picture:
    """One of the images; a small one keeps its own pixels."""
    image = images[index][0].convert("RGB")
    image.thumbnail((THUMB, THUMB))
    return Picture(_source(image), words, below, small=max(image.size) <= SIDE // 2)


def attention_rows(models: Sequence[tuple[str, Model]], images: Images) -> list[list[AttentionRow]]:
    """For each image a row per model: where its class token looks, or its patches on the average.

    Args:
        models: what the page calls them, and themselves; both see the same part of an image.

    Raises:
        UserError: none of them has a map.
    """
    views = views_of([model for _, model in models])
    layers = [attention_layers(model) for _, model in models]
    if all(layer.why for some in layers for layer in some):
        raise UserError(f"no layer has a map to read ({layers[0][0].why})")
    known = [pair for pair in zip(models, views, layers, strict=True) if any(not la.why for la in pair[2])]
    return [
        [_row(title, model, view, some, images[index][0]) for (title, model), view, some in known]
        for index in range(len(images))
    ]


def _row(
    title: str, model: Model, view: View, layers: Sequence[AttentionLayer], image: Image.Image
) -> AttentionRow:
    seen = image_attention(model, tuple(layers), view(image))
    readable = [index for index, layer in enumerate(layers) if not layer.why]
    at = np.linspace(0, len(readable) - 1, min(LAYERS, len(readable))).round().astype(int)
    query = "cls" if any(layer.class_token for layer in layers) else "all"
    cells = over_cells(seen.chosen([readable[i] for i in at]), query, SIDE)
    says = f"{title}: {seen.prediction}" if seen.prediction else title
    return AttentionRow(says, [_of_cell(cell, title) for cell in cells])


def _of_cell(cell: Cell, title: str) -> Picture:
    pixels = Image.fromarray(np.round(255 * cell.picture).astype(np.uint8))
    most = cell.below.partition("\n")[0]
    words = f"{title}, {cell.above}" + (f", at most {most} on one patch" if most else "")
    return Picture(_source(pixels), words, f"{cell.above} {most}".rstrip())


def _source(image: Image.Image) -> Markup:
    """PNG or JPEG, whichever is smaller."""
    files = []
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 78})):
        file = io.BytesIO()
        image.save(file, kind, **options)
        files.append((len(file.getvalue()), kind, file.getvalue()))
    _, kind, content = min(files)
    return Markup(f"data:image/{kind};base64,{b64encode(content).decode()}")
