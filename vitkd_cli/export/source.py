"""What is exported: a finished model, with everything that its files say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_cli import __version__
from vitkd_cli.evaluation.accuracy import preprocessing_of
from vitkd_cli.evaluation.metrics import in_unit_range
from vitkd_cli.vit.build import AnyModel, Built, open_model
from vitkd_cli.vit.classes import class_names
from vitkd_cli.vit.spec import ViTSpec, as_seen_by, describe, with_statistics

Model = Callable[[Tensor], list[Tensor]]  # uint8 images [B, C, H, W] -> outputs, [B, ...] each


@dataclass(frozen=True)
class Source:
    """A finished model.

    Attributes:
        built: on the CPU, in eval mode, frozen.
        spec: at the size and with the statistics of ``preprocessing``.
        preprocessing: timm's data configuration, as ``vitkd eval`` uses it.
        class_names: of its logits, in order.
        about: licence, and what its run wrote of it: teacher, objective, metrics, recipe.
    """

    built: Built
    spec: ViTSpec
    preprocessing: dict[str, Any]
    class_names: tuple[str, ...] | None
    about: dict[str, Any]

    @property
    def gives(self) -> str:
        """``logits``; ``embedding``, for want of classes; ``tokens`` of an encoder."""
        if self.spec.num_classes:
            return "logits"
        return "embedding" if self.spec.embed_dim else "tokens"

    def normalised(self, images: Tensor) -> Tensor:
        """uint8 images as the model takes them."""
        return as_seen_by(self.spec, in_unit_range(images, images.device))

    def described(self) -> dict[str, str]:
        """What a file without a configuration beside it has to say, as JSON by key."""
        size, names = list(self.preprocessing["input_size"]), self.class_names
        facts = {
            "model": self.built.origin,
            "vitkd_version": __version__,
            "class_names": list(names) if names else None,
            **{k: self.preprocessing[k] for k in ("mean", "std", "interpolation", "crop_pct", "crop_mode")},
        }
        return {key: json.dumps(value) for key, value in {**facts, "input_size": size}.items()}


def open_source(
    typed: AnyModel,
    *,
    checkpoint: str | None = None,
    use_ema: bool = False,
    pretrained: bool = True,
    img_size: int | None = None,
    verify: bool = True,
) -> Source:
    """Open a model, as :func:`vitkd_cli.vit.build.open_model`."""
    built = open_model(
        typed,
        checkpoint=checkpoint,
        use_ema=use_ema,
        pretrained=pretrained,
        img_size=img_size,
        verify=verify,
    )
    built.model.eval().requires_grad_(False)
    config = preprocessing_of(built.model, img_size=img_size)
    size = (config["input_size"][1], config["input_size"][2])
    spec = describe(built.model, name=built.spec.name, img_size=size)
    return Source(
        built=built,
        spec=with_statistics(spec, config["mean"], config["std"]),
        preprocessing=config,
        class_names=class_names(built),
        # Other weights are not what the name's licence and card are of.
        about={"licence": built.licence if built.weights not in ("random", checkpoint) else None}
        | {"origin": built.origin, **built.about},
    )


def runs(net: nn.Module, source: Source, device: torch.device) -> Model:
    """A network of normalised images as a function of uint8 images; several outputs stay several."""
    net = net.to(device)

    def run(images: Tensor) -> list[Tensor]:
        out = net(source.normalised(images.to(device)))
        return list(out) if isinstance(out, (list, tuple)) else [out]

    return run
