"""What attention maps and features come to over many images: means, with their standard errors.

Everything is summed image by image, so that memory does not grow with their number. A map whose rows do not
sum to 1 (talking heads, differential attention) counts by the magnitudes of its entries, scaled to do so.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.inspection.kinds import Array, AttentionLayer, TokenMap
from vitkd_cli.inspection.maps import attend
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import in_unit_range

_ROUNDING = 1e-6  # of float32, in which features are computed
FEWEST_FOR_CKA, ENOUGH_FOR_CKA = 4, 512
KEYS = ("entropy", "distance", "prefix_share", "class_prefix_share", "redundancy")


def of_map(layer: AttentionLayer, map_: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """A layer's numbers for each image and head; those that its geometry does not have are left out.

    ``entropy``: of a row, in nats, mean over rows. ``distance``: between the centres of the asking patch and
    of the patches that it asks, weighted by attention among patches, in pixels, mean over patches
    (Dosovitskiy et al. 2021, arXiv:2010.11929, Fig. 7). ``prefix_share``: of a patch's attention that goes
    to prefix tokens; ``class_prefix_share``: of the class token's. ``redundancy``: cosine similarity of a
    head's map to those of the others, mean over them.

    Args:
        map_: ``[B, heads, ...]`` as :func:`vitkd_cli.inspection.maps.attend` hands it on.
        size: rows and columns of the image, in pixels.

    Returns:
        ``[B, heads]`` each.
    """
    map_ = layer.distribution(map_.float())
    found = {"entropy": layer.of_queries(torch.special.entr(map_).sum(-1)).mean(-1)}
    found |= layer.numbers(map_, size)
    heads = map_.shape[1]
    if heads > 1:
        unit = F.normalize(map_.flatten(2), dim=-1)
        found["redundancy"] = ((unit @ unit.transpose(1, 2)).sum(-1) - 1) / (heads - 1)
    return found


class Mean:
    """Mean of a vector over images, and its standard error.

    Attributes:
        count: images so far.
    """

    def __init__(self) -> None:
        self.count = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0

    def add(self, values: Tensor) -> None:
        """Values ``[B, ...]`` of B images."""
        values = values.double().cpu()
        self.count += len(values)
        self._sum += values.sum(0)
        self._squares += values.square().sum(0)

    @property
    def mean(self) -> Array:
        return np.asarray(self._sum / self.count)

    @property
    def error(self) -> Array:
        """The standard error of the mean; NaN for a single image."""
        variance = np.asarray(self._squares / self.count) - self.mean**2
        return np.asarray(np.sqrt(np.maximum(variance, 0) / (self.count - 1 or np.nan)))


class Numbers:
    """:func:`of_map` of every layer of a model, over images of so many rows and columns of pixels."""

    def __init__(self, layers: Sequence[AttentionLayer], size: tuple[int, int]) -> None:
        self.layers, self.size = layers, size
        self._means: dict[tuple[str, str], Mean] = {}

    def add(self, layer: AttentionLayer, map_: Tensor) -> None:
        for key, values in of_map(layer, map_, self.size).items():  # [B, heads]
            with_all = torch.cat([values, values.mean(1, keepdim=True)], 1)
            self._means.setdefault((layer.path, key), Mean()).add(with_all)

    def rows(self) -> list[dict[str, Any]]:
        """One row per layer and head, and one with ``head`` None for the mean over heads.

        Of every number there is its standard error over images, ``…_se``; both are None where the layer
        does not have it.
        """
        rows: list[dict[str, Any]] = []
        for index, layer in enumerate(self.layers):
            facts = {"layer": index, "path": layer.path, "block": layer.block, "kind": layer.kind}
            for head in [None] if layer.why else [*range(layer.heads), None]:
                row, place = {**facts, "head": head}, -1 if head is None else head
                for key in KEYS:
                    mean = self._means.get((layer.path, key))
                    row[key] = float(mean.mean[place]) if mean else None
                    row[f"{key}_se"] = float(mean.error[place]) if mean and mean.count > 1 else None
                rows.append(row)
        return rows


# Two models -----------------------------------------------------------------------------------------------


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions ``[..., N]``, in nats: 0 to ln 2."""
    entropy = torch.special.entr
    return (entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).sum(-1).clamp(min=0)


class Divergences:
    """Jensen-Shannon divergence between the maps of two models, for pairs of layers of the same patches.

    Head means, mean over queries. One model's maps of a batch are held until the other has seen it. Pairs of
    other kinds, or on grids that differ, are left out.

    Args:
        layers: of the first model (the teacher), and of the second.
        pairs: of their indices, if not all.
    """

    def __init__(
        self,
        layers: tuple[Sequence[AttentionLayer], Sequence[AttentionLayer]],
        pairs: Collection[tuple[int, int]] | None = None,
    ) -> None:
        self.layers = layers
        every = [(i, j) for i in range(len(layers[0])) for j in range(len(layers[1]))]
        self._means = {
            (i, j): Mean()
            for i, j in (every if pairs is None else pairs)
            if isinstance(layers[0][i], TokenMap)
            and isinstance(layers[1][j], TokenMap)
            and layers[0][i].grid == layers[1][j].grid
        }
        self._first: dict[int, Tensor] = {}

    def add(self, model: int, layer: AttentionLayer, map_: Tensor) -> None:
        """A map of a batch; the first model's before the second's."""
        index = self.layers[model].index(layer)
        pairs = [pair for pair in self._means if pair[model] == index]
        if not pairs or not isinstance(layer, TokenMap):
            return
        ours = layer.patch_to_patch(map_)
        if model == 0:
            self._first[index] = ours
        for i, j in pairs if model == 1 else ():
            self._means[i, j].add(divergence(self._first[i], ours).mean(-1))

    def values(self) -> Array:
        """``[first model's layers, second's]``; NaN where a pair was left out."""
        found = np.full([len(layers) for layers in self.layers], np.nan)
        for pair, mean in self._means.items():
            found[pair] = mean.mean
        return found

    @property
    def left_out(self) -> str:
        """How many pairs were, and why; empty if none."""
        missing = len(self.layers[0]) * len(self.layers[1]) - len(self._means)
        return f"{missing} pairs left out: their maps do not relate the same patch tokens" if missing else ""


def unbiased_hsic(first: Tensor, second: Tensor) -> Tensor:
    """HSIC of every pair of Gram matrices ``[a, n, n]`` and ``[b, n, n]``: ``[a, b]``.

    Song et al. 2012 (JMLR 13, 1393-1434), with K and L without their diagonals:
    [tr(KL) + 1'K1 1'L1 / ((n-1)(n-2)) - 2/(n-2) 1'KL1] / (n(n-3)).
    """
    n = first.shape[-1]
    off = 1 - torch.eye(n, dtype=first.dtype)
    k, l = first * off, second * off  # noqa: E741
    traces = torch.einsum("aij,bji->ab", k, l)
    sums = torch.outer(k.sum((1, 2)), l.sum((1, 2))) / ((n - 1) * (n - 2))
    return (traces + sums - 2 / (n - 2) * k.sum(1) @ l.sum(1).T) / (n * (n - 3))


def _centred(features: Tensor) -> Tensor:
    """Features ``[n, D]`` minus their mean, which CKA does not see; 0 where they differ by rounding alone."""
    mean = features.mean(0)
    spread = features - mean
    return spread * (spread.norm() > _ROUNDING * math.sqrt(len(features)) * mean.norm())


class CKA:
    """Linear CKA of two models' features, block by block (Nguyen et al. 2021, arXiv:2010.15327).

    HSIC is estimated without bias in every minibatch, and averaged before the division.

    Args:
        minibatch: images in each; the last takes what is left, up to twice as many.

    Attributes:
        count: images so far.
    """

    def __init__(self, minibatch: int = 64) -> None:
        self.minibatch, self.count = minibatch, 0
        self._waiting: list[list[Tensor]] = []
        self._sums: list[Tensor] = []  # HSIC between them, of the first's own, of the second's own

    def add(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        """Features ``[B, D]`` of the same B images, one a block of each model."""
        self.count += len(first[0])
        new = [[block.double().cpu() for block in blocks] for blocks in (first, second)]
        if self._waiting:
            new = [
                [torch.cat(pair) for pair in zip(*both, strict=True)]
                for both in zip(self._waiting, new, strict=True)
            ]
        while len(new[0][0]) >= 2 * self.minibatch:
            self._sums = self._with([[block[: self.minibatch] for block in blocks] for blocks in new])
            new = [[block[self.minibatch :] for block in blocks] for blocks in new]
        self._waiting = new

    def _with(self, features: list[list[Tensor]]) -> list[Tensor]:
        """The sums with a minibatch more."""
        k, l = (torch.stack([x @ x.T for x in map(_centred, blocks)]) for blocks in features)  # noqa: E741
        found = [unbiased_hsic(k, l), unbiased_hsic(k, k).diagonal(), unbiased_hsic(l, l).diagonal()]
        return [a + b for a, b in zip(self._sums, found, strict=True)] if self._sums else found

    def values(self) -> Array:
        """``[first's blocks, second's]``; NaN with fewer than four images, or where features are constant."""
        if len(self._waiting[0][0]) < FEWEST_FOR_CKA:  # only where there are no more
            return np.full([len(blocks) for blocks in self._waiting], np.nan)
        between, first, second = self._with(self._waiting)
        scale = (first.clamp(min=0)[:, None] * second.clamp(min=0)).sqrt()
        return torch.where(scale > 0, between / scale, torch.nan).numpy()


def rough_cka(images: int, *, undefined: bool = False) -> str:
    """A warning where CKA has seen too few images, or features that do not differ between them."""
    if images < FEWEST_FOR_CKA:
        return f"CKA needs {FEWEST_FOR_CKA} images, and there {'is 1' if images == 1 else f'are {images}'}"
    if undefined:
        return "CKA is undefined where a block has the same features for every image"
    enough = images >= ENOUGH_FOR_CKA
    return "" if enough else f"CKA of {images} images is rough: --num-images {ENOUGH_FOR_CKA} or more"


def survey(
    models: Sequence[tuple[Model, Sequence[AttentionLayer]]],
    batches: Iterable[Sequence[Tensor]],
    *,
    pairs: Collection[tuple[int, int]] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[tuple[Numbers, ...], Divergences | None, CKA | None]:
    """One pass of one or two models over images, each in one ordinary forward.

    Args:
        models: with all their layers; the teacher, then the student.
        batches: uint8 views ``[B, C, H, W]``, one per model, of the same images.
        pairs: of layers whose maps are compared, if not all.
        progress: told the images done after every batch.
    """
    numbers = tuple(Numbers(layers, built.spec.input_size) for built, layers in models)
    divergences = cka = None
    if len(models) == 2:
        divergences, cka = Divergences((models[0][1], models[1][1]), pairs), CKA()
    done = 0

    def add_map(model: int, layer: AttentionLayer, map_: Tensor) -> None:
        numbers[model].add(layer, map_)
        if divergences is not None:
            divergences.add(model, layer, map_)

    for views in batches:
        pooled: list[list[Tensor]] = []  # [B, D] of every block of each model
        for index, ((built, layers), view) in enumerate(zip(models, views, strict=True)):
            features: dict[int, Tensor] = {}

            def pool(block: int, tokens: Tensor, features: dict[int, Tensor] = features) -> None:
                features[block] = tokens.mean(1)

            images = built.normalised(in_unit_range(view, built.device))
            attend(built, layers, images, partial(add_map, index), pool if cka else None)
            pooled.append([features[block] for block in sorted(features)])
        if cka is not None:
            cka.add(*pooled)
        done += len(views[0])
        progress(done)
    return numbers, divergences, cka
