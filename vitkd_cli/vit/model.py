"""A built model and what is known of it: what training, scoring, exporting and looking all take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vitkd_cli.errors import UserError
from vitkd_cli.text import listed
from vitkd_cli.vit.spec import ViTSpec, as_seen_by, describe


@dataclass(frozen=True)
class Model:
    """A timm vision transformer, its facts, and where its weights come from.

    Attributes:
        net: the module.
        spec: its facts, for the image size and the image statistics that it is used with.
        weights: where they come from: a name, a file's path, or ``random``.
        notes: what was dropped, missing or resampled on loading.
        labels: class names of its own head, where its configuration has them.
        licence: of its weights, where its configuration names one.
        origin: timm's name with the tag, or the Hub's, of the weights that it began with, or the architecture
            alone; never a folder.
        about: what a run wrote of it into its folder's ``config.json``.
        prepared_by: timm's data configuration, where :meth:`prepared` chose it.
    """

    net: nn.Module
    spec: ViTSpec
    weights: str
    notes: tuple[str, ...] = ()
    labels: tuple[str, ...] | None = None
    licence: str | None = None
    origin: str = ""
    about: dict[str, Any] = field(default_factory=dict)
    prepared_by: Mapping[str, Any] | None = None

    # Images ---------------------------------------------------------------------------------------------

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """How its images are prepared: timm's data configuration, for the size and statistics of ``spec``."""
        if self.prepared_by is not None:
            return dict(self.prepared_by)
        spec = self.spec
        return _data_config(
            self.net, input_size=(len(spec.mean), *spec.input_size), mean=spec.mean, std=spec.std
        )

    def prepared(self, **given: Any) -> Self:
        """The same model for images prepared as timm evaluates it, but for what is given.

        Args:
            given: of timm's data configuration: ``img_size``, ``input_size``, ``crop_pct``, ``crop_mode``,
                ``interpolation``, ``mean``, ``std``; ``use_train_size``: not the size and crop that timm
                recommends for testing. None is not given.
        """
        config = _data_config(self.net, **given)
        size = (int(config["input_size"][1]), int(config["input_size"][2]))
        spec = describe(self.net, name=self.spec.name, img_size=size)
        spec = replace(spec, mean=config["mean"], std=config["std"])
        return replace(self, spec=spec, prepared_by=config)

    def normalised(self, images: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` in [0, 1] as the model takes them."""
        return as_seen_by(self.spec, images)

    # Answers --------------------------------------------------------------------------------------------

    def logits(self, images: Tensor) -> Tensor:
        """Of images ``[B, C, H, W]`` in [0, 1]: ``[B, K]``."""
        scores: Tensor = self.net(self.normalised(images))
        return scores

    def embedding(self, images: Tensor) -> Tensor:
        """Of images ``[B, C, H, W]`` in [0, 1]: ``[B, E]``."""
        net: Any = self.net
        vectors: Tensor = net.forward_head(net.forward_features(self.normalised(images)), pre_logits=True)
        return vectors

    @property
    def gives(self) -> str:
        """What its forward returns: ``logits``, an ``embedding``, or an encoder's ``tokens``."""
        if self.spec.num_classes:
            return "logits"
        return "embedding" if self.spec.embed_dim else "tokens"

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Of its logits, in order: its own labels, or ImageNet's synsets if it has as many classes."""
        from timm.data import ImageNetInfo, infer_imagenet_subset

        count, own = self.spec.num_classes, self.labels
        if not count:
            return None
        if own is not None and len(own) != count:
            raise UserError(
                f"{self.spec.name} has {count} classes, and its label_names are {len(own)}: {listed(own)}",
                "correct label_names in its config.json, or take them out",
            )
        subset = infer_imagenet_subset({"num_classes": count})
        return own or (tuple(ImageNetInfo(subset).label_names()) if subset else None)

    def with_classes(self, classes: Sequence[int], names: Sequence[str] | None = None) -> Self:
        """The same model with the logits of these classes alone, in this order.

        The network itself is changed: each of its classifiers keeps K' = ``len(classes)`` rows of its
        weights, so that logits, and probabilities over them, are ``[B, K']``.
        """
        net: Any = self.net
        rows, paths = list(classes), (getattr(net, "pretrained_cfg", None) or {}).get("classifier") or ()
        layers = [net.get_submodule(path) for path in ((paths,) if isinstance(paths, str) else paths)]
        sizes = ["out_channels" if isinstance(layer, nn.Conv2d) else "out_features" for layer in layers]
        if {getattr(layer, size, 0) for layer, size in zip(layers, sizes, strict=True)} != {net.num_classes}:
            raise UserError(
                f"the classifier of {self.spec.name} is no layer with one row per class, so none can "
                "be chosen",
                "--finetune-teacher N trains it on the data's classes for N epochs first",
            )
        for layer, size in zip(layers, sizes, strict=True):
            for part in ("weight", "bias"):
                if (tensor := getattr(layer, part)) is not None:
                    setattr(layer, part, nn.Parameter(tensor.detach()[rows], tensor.requires_grad))
            setattr(layer, size, len(rows))
        net.num_classes = len(rows)
        spec = replace(self.spec, num_classes=len(rows))
        return replace(self, spec=spec, labels=tuple(names) if names else None)

    # The module -----------------------------------------------------------------------------------------

    @property
    def provenance(self) -> dict[str, Any]:
        """Licence, origin, and what a run wrote of it."""
        return {"licence": self.licence, "origin": self.origin, **self.about}

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Self:
        """Move the module, in place."""
        self.net.to(device, dtype)
        return self

    @property
    def parameters(self) -> int:
        """How many it has."""
        return sum(p.numel() for p in self.net.parameters())

    @cached_property
    def multiply_adds(self) -> int:
        """Of one image."""
        from torch.utils.flop_counter import FlopCounterMode

        parameter, training = next(self.net.parameters()), self.net.training
        image = parameter.new_zeros(1, len(self.spec.mean), *self.spec.input_size)
        self.net.eval()
        # The counter hooks gradients onto what requires them, which fails for CaiT's class token without a
        # graph.
        weights = {name: weight.detach() for name, weight in self.net.named_parameters()}
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            functional_call(self.net, weights, (image,))
        self.net.train(training)
        return int(counter.get_total_flops()) // 2


AnyModel = str | Path | Model | nn.Module
"""A model as the functions of Python take it: its name, its folder, or itself."""


def _data_config(net: nn.Module, *, use_train_size: bool = False, **given: Any) -> dict[str, Any]:
    """timm's evaluation preprocessing for a network, with what is given in its place."""
    from timm.data.model_config import resolve_input_data_config

    chosen = {key: value for key, value in given.items() if value is not None}
    try:
        return resolve_input_data_config(net, args=chosen, use_test_size=not use_train_size)
    except ValueError as problem:
        sized = {"img_size", "input_size"} & chosen.keys()
        hint = "leave the size out, or build the model for it" if sized else "give one value per channel"
        raise UserError(str(problem), hint) from None
