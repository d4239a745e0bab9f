"""Images to look at, as each of several models is to see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkd_cli.data.images import Images, Stream, loose_images
from vitkd_cli.data.transforms import View, view_of
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.recipe import SAMPLE
from vitkd_cli.vit.model import Model


def images_to_look_at(
    paths: Sequence[str | Path] = (),
    data: str = SAMPLE,
    split: str = "validation",
    count: int = 64,
    models: Sequence[str] = (),
) -> Images:
    """The first ``count`` images of those named, or of all classes of a dataset alike.

    Args:
        models: as they were typed; of a run's data those images are taken that it did not learn from.

    Raises:
        UserError: there are none, or they come as a stream.
    """
    if paths:
        named = loose_images(paths)
        return named.subset(range(min(count, len(named))))
    chosen = Provenance(models).images(data, split)
    if isinstance(chosen.images, Stream):
        raise UserError(
            f"{data} is a stream, whose images cannot be chosen", "name image files with --images"
        )
    found = chosen.images.balanced_subset(count)
    found.notes = (f"images of {chosen.about}", *chosen.notes)
    found.class_names = chosen.names or ()
    return found


def preprocessing(models: Sequence[Model]) -> dict[str, Any]:
    """How all of them see an image: as timm evaluates the last, the student; each at its own size."""
    config = models[-1].preprocessing
    return {key: config[key] for key in ("crop_pct", "crop_mode", "interpolation")}


def views_of(models: Sequence[Model]) -> list[View]:
    """An image as each model is to see it: the same part of it."""
    shared = preprocessing(models)
    return [
        view_of({"input_size": (len(spec.mean), *spec.input_size), "mean": spec.mean, **shared})
        for spec in (built.spec for built in models)
    ]


def batches(images: Images, models: Sequence[Model], size: int) -> Iterator[list[Tensor]]:
    """Batch after batch of the same images, uint8 ``[B, C, H, W]`` for each model.

    Raises:
        UnreadableImage: one cannot be decoded.
    """
    views = views_of(models)
    for start in range(0, len(images), size):
        some = [images[index][0] for index in range(start, min(start + size, len(images)))]
        yield [torch.stack([view(image) for image in some]) for view in views]
