"""The models of a request, and its images as each of them is to see them."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vitkd_cli.data.images import Images, Stream
from vitkd_cli.data.transforms import View, view_of
from vitkd_cli.data.webdataset import named_images
from vitkd_cli.device import device_named
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.requests import InspectRequest
from vitkd_cli.vit.build import open_model, source_of
from vitkd_cli.vit.model import Model


def sources_of(request: InspectRequest) -> list[str]:
    """The names, folders and weight files that its models come by."""
    *above, last = request.models
    return [name for name in (*map(source_of, above), request.checkpoint or source_of(last)) if name]


def open_models(request: InspectRequest) -> list[Model]:
    """Its models, on its device; a weight file is the last one's."""
    place, others = device_named(request.device), replace(request, checkpoint=None, use_ema=False)
    *above, last = request.models
    opened = [*(open_model(model, others) for model in above), open_model(last, request)]
    return [model.to(place) for model in opened]


def images_of(request: InspectRequest) -> Images:
    """The first of the images that are named, or some of every class of its data.

    Of a run's data those are taken that its models did not learn from.
    """
    provenance, count = Provenance(sources_of(request)), request.num_images
    [first, *_] = request.images or [None]
    if isinstance(first, Images):
        return first.subset(range(min(count, len(first))))  # decoded as its owner decodes it
    if request.images:
        named = named_images(request.images)
        found = named.subset(range(min(count, len(named))))
    else:
        data = provenance.data(request.data)
        chosen = provenance.images(data, request.split)
        if isinstance(chosen.images, Stream):
            raise UserError(
                f"{data} is a stream, whose images cannot be chosen", "name image files with --images"
            )
        found = chosen.images.balanced_subset(count)
        found.notes = (f"images of {chosen.about}", *chosen.notes)
        found.class_names = chosen.names or ()
    found.decode_by(provenance.decoding(request))
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
        for spec in (model.spec for model in models)
    ]


def batches(images: Images, models: Sequence[Model], size: int) -> Iterator[list[Tensor]]:
    """Batch after batch of the same images, uint8 ``[B, C, H, W]`` for each model."""
    views = views_of(models)
    for start in range(0, len(images), size):
        some = [images[index][0] for index in range(start, min(start + size, len(images)))]
        yield [torch.stack([view(image) for image in some]) for view in views]
