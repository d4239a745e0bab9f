"""How good features are without a head: a linear classifier on them, the features frozen.

    min over W, b:  C Σ_i -log softmax(W x_i + b)[y_i] + ½ ‖W‖²

Multinomial logistic regression with an L2 penalty, as in CLIP (Radford et al. 2021, arXiv:2103.00020) and
DINOv2 (Oquab et al. 2023, arXiv:2304.07193), on features x with mean 0 and standard deviation 1 over the
training images. Of two classes the penalty is ‖W‖², that of the difference of their rows; so C means what it
means in scikit-learn.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vitkd_cli.data.datasets import draw_by_class
from vitkd_cli.evaluation.metrics import Metrics, per_image

HELD_OUT, SEED = 0.2, 0
DECADES = range(-6, 6)  # of C, as in DINOv2
UNCHOSEN = 1.0  # where no class has two images
_STEPS = 2000
_NUMBERS = 2**24  # in a chunk: 128 MiB


@dataclass(frozen=True)
class Linear:
    """A classifier of features ``[N, E]``.

    Attributes:
        mean, scale: ``[E]`` float64, of the training images.
        weight: ``[K, E + 1]`` float64, the bias last, for the K classes that had images.
        classes: ``[K]``, which these are.
        c: the inverse of the penalty's weight.
        converged: whether it is the minimum.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    classes: Tensor
    c: float
    converged: bool

    def judge(self, features: Tensor, labels: Tensor) -> Metrics:
        """What it says of images: ``[N, E]`` and their classes ``[N]``."""
        rows, start = [], 0
        for part in _Mapped(features, self.mean, (1 / self.scale).diag(), len(self.classes)):
            logits = part @ self.weight[:, :-1].T + self.weight[:, -1]
            every = logits.new_full((len(part), max(int(self.classes.max()) + 1, 5)), -torch.inf)
            every[:, self.classes] = logits
            rows.append(per_image(every, labels[start : start + len(part)]))
            start += len(part)
        return Metrics.from_rows(torch.cat(rows))


class _Mapped:
    """Features ``[N, E]`` in chunks ``[b, E]`` of float64, centred and multiplied by a matrix ``[E, E]``.

    They are kept where they are few.
    """

    def __init__(self, features: Tensor, mean: Tensor, matrix: Tensor, classes: int) -> None:
        self.features, self.mean, self.matrix = features, mean, matrix
        self.rows = max(1, _NUMBERS // (features.shape[1] + classes))
        self.kept = [*self._chunks()] if features.numel() <= _NUMBERS else None

    def _chunks(self) -> Iterator[Tensor]:
        return ((part.double() - self.mean) @ self.matrix for part in self.features.split(self.rows))

    def __iter__(self) -> Iterator[Tensor]:
        return self._chunks() if self.kept is None else iter(self.kept)


@dataclass(frozen=True)
class _Space:
    """Features as they are standardised, and the axes along which they vary.

    Attributes:
        mean, scale: ``[E]`` float64.
        axes: ``[E, E]``, in columns, of the standardised features; ``variances``: ``[E]`` along each.
    """

    mean: Tensor
    scale: Tensor
    axes: Tensor
    variances: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Self:
        """Of features ``[N, E]``; one that does not vary is divided by 1."""
        count, width = features.shape
        rows = max(1, _NUMBERS // width)
        none = torch.zeros(width, dtype=torch.float64, device=features.device)
        mean = sum((part.double().sum(0) for part in features.split(rows)), none) / count
        centred = (part.double() - mean for part in features.split(rows))
        products = sum((part.T @ part for part in centred), none) / count  # [E, E]
        scale = products.diag().sqrt()
        scale = scale.where(scale > 1e-7 * mean.abs(), 1.0)  # float32 rounds at 6e-8
        variances, axes = torch.linalg.eigh(products / scale / scale[:, None])
        return cls(mean, scale, axes, variances.clamp(min=0))


def fit_linear(
    features: Tensor, labels: Tensor, *, tell: Callable[[int, int], None] = lambda done, total: None
) -> Linear:
    """Choose C on a fifth of every class's images, drawn by a seed, and fit to all.

    C goes through the decades from 1e-6 to 1e5 until the cross-entropy on the fifth has risen twice; then
    through quarters of a decade around the best. Accuracy would be too coarse on few images. Where no class
    has two images C is 1.

    Args:
        features, labels: ``[N, E]`` and ``[N]``, of two or more classes.
        tell: told fits done and in all, at most.
    """
    held = draw_by_class(
        labels.tolist(), lambda images: min(max(1, round(images * HELD_OUT)), images - 1), SEED
    )
    space = _Space.of(features)
    if not len(held):
        return fit_with(features, labels, UNCHOSEN, space)
    kept = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
    kept[held] = False
    rest, tried = (features[kept], labels[kept]), (features[~kept], labels[~kept])
    found: dict[float, tuple[float, Linear]] = {}  # exponent of C → cross-entropy, classifier
    total = len(DECADES) + 7

    def attempt(exponent: float, start: Linear | None) -> None:
        model = fit_with(*rest, 10.0**exponent, space, start=start, precision=1e-8)
        loss = model.judge(*tried).loss
        found[exponent] = math.inf if loss is None else loss, model
        tell(len(found), total)

    def best() -> float:
        return min(found, key=lambda exponent: found[exponent][0])

    latest: Linear | None = None
    for decade in DECADES:
        attempt(decade, latest)
        latest = found[decade][1]
        if decade - best() >= 2:
            break
    middle = best()
    for quarter in (-0.75, -0.5, -0.25, 0.25, 0.5, 0.75):
        attempt(middle + quarter, found[middle][1])
    chosen = best()
    fitted = fit_with(features, labels, 10.0**chosen, space, start=found[chosen][1])
    tell(total, total)
    return fitted


def fit_with(
    features: Tensor,
    labels: Tensor,
    c: float,
    space: _Space,
    *,
    start: Linear | None = None,
    precision: float = 1e-14,
) -> Linear:
    """The classifier for one C, by L-BFGS in float64.

    Features of networks are so much alike that plain L-BFGS needs tens of thousands of steps; it runs along
    their axes, each stretched by what the objective curves there where nothing is known yet. The minimum is
    the same.

    Args:
        start: one of the same classes, from where fewer steps are needed.
        precision: relative decrease of the objective below which it ends.
    """
    from scipy.optimize import minimize

    classes, targets = labels.unique(return_inverse=True)
    count, shape = len(labels), (len(classes), features.shape[1] + 1)
    penalty = (2 if len(classes) == 2 else 1) / (c * count)
    stretch = (space.variances / len(classes) + penalty).rsqrt()  # [E]
    along = space.axes * stretch  # [E, E]: standardised weights = weights here @ along.T
    x = _Mapped(features, space.mean, along / space.scale[:, None], len(classes))
    pull = penalty * stretch.square()

    def objective(flat: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        """Mean loss and penalty at ``[K * (E + 1)]``, and their gradient."""
        weight = torch.from_numpy(flat).to(features.device).view(shape)
        slope = torch.zeros_like(weight)
        slope[:, :-1] = pull * weight[:, :-1]
        loss = 0.5 * (slope * weight).sum()
        for part, y in zip(x, targets.split(x.rows), strict=True):
            log_p = F.log_softmax(torch.addmm(weight[:, -1], part, weight[:, :-1].T), 1)
            loss = loss - log_p.gather(1, y[:, None]).sum() / count
            error = log_p.exp_()  # of the logits: probability minus one-hot
            error[torch.arange(len(y), device=y.device), y] -= 1
            slope[:, :-1].addmm_(error.T, part, alpha=1 / count)
            slope[:, -1] += error.sum(0) / count
        return float(loss), slope.cpu().numpy().ravel()

    first = torch.zeros(shape, dtype=torch.float64)
    if start is not None:
        first = start.weight.clone()
        first[:, :-1] = first[:, :-1] @ (space.axes / stretch)
    options = {
        "maxiter": _STEPS,
        "maxfun": 2 * _STEPS,
        "gtol": 1e-12,
        "ftol": precision,
        "maxls": 50,
        "maxcor": 30,
    }
    done = minimize(objective, first.cpu().numpy().ravel(), jac=True, method="L-BFGS-B", options=options)
    weight = torch.from_numpy(done.x).to(features.device).view(shape).clone()
    weight[:, :-1] = weight[:, :-1] @ along.T
    return Linear(space.mean, space.scale, weight, classes, c, converged=done.status != 1)
