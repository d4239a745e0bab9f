"""A model's classes by name, and the same model with some of them alone."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from vitkd_cli.errors import UserError
from vitkd_cli.vit.build import Built


def class_names(built: Built) -> tuple[str, ...] | None:
    """A model's own labels, in order, or by the number of its classes ImageNet's synsets."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": built.spec.num_classes})
    return built.class_names or (tuple(ImageNetInfo(subset).label_names()) if subset else None)


def known_names(built: Built) -> dict[str, int]:
    """Every name that one class of a model goes by alone → its index.

    The names are its own labels, or by the number of its classes ImageNet's synsets (timm's
    ``ImageNetInfo``); then their descriptions, whole and item by item ("tench, Tinca tinca"), with
    spaces or underscores, as they are or in lower case.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    config: Any = getattr(built.model, "pretrained_cfg", None) or {}
    subset = infer_imagenet_subset({"num_classes": built.spec.num_classes})
    imagenet = ImageNetInfo(subset or "imagenet-1k")
    labels = class_names(built) or ()
    described = config.get("label_descriptions") or {}
    spelt: dict[str, set[int]] = defaultdict(set)
    for index, label in enumerate(labels):
        text = str(described.get(label, label))
        with contextlib.suppress(KeyError):
            text = imagenet.label_name_to_description(label)
        for name in (text, *text.split(", ")):
            for spelling in (name, name.replace(" ", "_")):
                spelt[spelling].add(index)
                spelt[spelling.lower()].add(index)
    own = {name: min(classes) for name, classes in spelt.items() if len(classes) == 1}
    return own | {label: index for index, label in enumerate(labels)}


def narrowed(built: Built, classes: Sequence[int], names: Sequence[str] | None = None) -> Built:
    """The same model with the logits of these classes alone, in this order.

    The model itself is changed: each of its classifiers keeps K' = ``len(classes)`` rows of its weights,
    so that logits, and probabilities over them, are ``[B, K']``.

    Raises:
        UserError: its classifier is no linear layer with a row a class.
    """
    model: Any = built.model
    rows, paths = list(classes), (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    layers = [model.get_submodule(path) for path in ((paths,) if isinstance(paths, str) else paths)]
    sizes = ["out_channels" if isinstance(layer, nn.Conv2d) else "out_features" for layer in layers]
    if {getattr(layer, size, 0) for layer, size in zip(layers, sizes, strict=True)} != {model.num_classes}:
        raise UserError(
            f"the classifier of {built.spec.name} is no layer with a row a class, so none can be chosen",
            "--finetune-teacher N trains it on the data's classes for N epochs first",
        )
    for layer, size in zip(layers, sizes, strict=True):
        for part in ("weight", "bias"):
            if (tensor := getattr(layer, part)) is not None:
                setattr(layer, part, nn.Parameter(tensor.detach()[rows], tensor.requires_grad))
        setattr(layer, size, len(rows))
    model.num_classes = len(rows)
    spec = replace(built.spec, num_classes=len(rows))
    return replace(built, spec=spec, class_names=tuple(names) if names else None)
