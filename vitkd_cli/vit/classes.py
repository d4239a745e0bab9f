"""A model's classes, matched with the data's by name."""

import contextlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from vitkd_cli.errors import UserError
from vitkd_cli.text import listed, nfc
from vitkd_cli.vit.model import Model

MAP = "--class-map FILE lists the data's class folders in the order of the model's classes, one per line"


@dataclass(frozen=True)
class Match:
    """A model's classes beside the data's.

    Attributes:
        indices: the model's class for each class of the data, then the others that it keeps. None: both have
            the same order.
        names: of these classes, as far as they are known.
        note: what a person should know of it.
    """

    indices: tuple[int, ...] | None
    names: tuple[str, ...]
    note: str = ""

    def taken(self, logits: Tensor) -> Tensor:
        """The model's logits ``[B, K]`` in the order of the data's classes."""
        return logits if self.indices is None else logits[:, list(self.indices)]


def match_classes(
    model: Model, names: Sequence[str] | None, data: str, *, mapped: bool = False, cure: str = MAP
) -> Match:
    """Match the data's classes with the model's: by name wherever both have names, never by order instead.

    A subset of the model's classes is kept where a class map asks for it, or where model and data are
    recognised as ImageNet's; else all are.

    Args:
        names: of the data's classes, in the order of its labels; None if nobody knows them.
        data: as a person calls it.
        mapped: a class map has put the data's classes in the model's order; the names of a model that was
            trained with them go before it.
        cure: what to do about classes that the model lacks.
    """
    title, count, sure = model.spec.name, model.spec.num_classes, model.labels is not None
    own = model.class_names or ()
    if names is None:
        return Match(None, (), f"{data} names no classes: its labels count as those of {title}")
    known, ours = known_names(model), [nfc(name) for name in names]
    rows = [known[name] for name in ours if name in known]
    strange = [name for name in ours if name not in known]
    if mapped and len(names) <= count and (strange or not sure):
        # Its order is the model's, unless a name says otherwise.
        if not sure and len(names) == count:
            return Match(None, tuple(names))
        if strange and all(known.get(name, index) == index for index, name in enumerate(ours)):
            return Match(None, tuple(names))
    if strange and (rows or sure or (own and len(names) != count)):
        raise UserError(
            f"{data} has classes that {title} lacks: {listed(strange)}; its own are {listed(own)}", cure
        )
    if strange:
        if len(names) != count:
            raise UserError(f"{data} has {len(names)} classes, {title} has {count}", cure)
        taken = f"its {count} classes are taken to be {listed(names)}, in this order"
        return Match(None, tuple(names), f"{title} knows no class names: {taken}")
    if len(set(rows)) < len(rows):
        twice = [name for name, row in zip(names, rows, strict=True) if rows.count(row) > 1]
        raise UserError(f"several folders of {data} are one class of {title}: {listed(twice)}", cure)
    if rows == list(range(count)):
        return Match(None, tuple(names))
    if len(rows) == count or mapped or (len(rows) > 1 and _of_imagenet(ours, count)):
        return Match(tuple(rows), tuple(names))
    # The same order for every model of these classes, whatever its own is.
    rest = sorted(set(range(count)) - set(rows), key=lambda row: nfc(own[row]))
    some = f"{data} has {len(rows)} of the {count} classes of {title}, which may answer any of them"
    return Match((*rows, *rest), (*names, *(own[row] for row in rest)), some)


def known_names(model: Model) -> dict[str, int]:
    """Every name that means one class of a model alone, normalised by :func:`vitkd_cli.text.nfc` → its index.

    The names are its own labels, or ImageNet's synsets if it has as many classes; then their descriptions,
    whole and item by item ("tench, Tinca tinca"), with spaces or underscores, also in lower case.
    """
    from timm.data import infer_imagenet_subset

    config: Any = getattr(model.net, "pretrained_cfg", None) or {}
    subset = infer_imagenet_subset({"num_classes": model.spec.num_classes})
    return _spelt(model.class_names or (), config.get("label_descriptions") or {}, subset)


def _spelt(labels: Sequence[str], described: dict[str, str], subset: str | None) -> dict[str, int]:
    from timm.data import ImageNetInfo

    imagenet = ImageNetInfo(subset or "imagenet-1k")
    spelt: dict[str, set[int]] = defaultdict(set)
    for index, label in enumerate(labels):
        text = str(described.get(label, label))
        with contextlib.suppress(KeyError):
            text = imagenet.label_name_to_description(label)
        for name in map(nfc, (text, *text.split(", "))):
            for spelling in (name, name.replace(" ", "_")):
                spelt[spelling].add(index)
                spelt[spelling.lower()].add(index)
    own = {name: min(classes) for name, classes in spelt.items() if len(classes) == 1}
    return own | {nfc(label): index for index, label in enumerate(labels)}


def _of_imagenet(names: Sequence[str], count: int) -> bool:
    """Do synsets, or descriptions of them, name some classes of as many as ImageNet has?"""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return subset is not None and set(names) <= _spelt(ImageNetInfo(subset).label_names(), {}, subset).keys()
