"""Top-1, top-5 and loss over a dataset, sample-exact."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitkd_cli.data import Images, open_data, open_split, val_loader, val_view
from vitkd_cli.data.images import Relabelled
from vitkd_cli.errors import UserError
from vitkd_cli.recipe import Recipe
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.classes import known_names, narrowed
from vitkd_cli.vit.spec import as_seen_by, describe, with_statistics


@dataclass(frozen=True)
class Metrics:
    """What one pass over a dataset showed.

    Attributes:
        top1, top5: percent.
        loss: mean cross-entropy, in nats; None for nearest neighbours, which have no logits.
        count: images that were counted; each of the dataset's once.
        predictions: ``[count]`` the class named first for each image, in the dataset's order.
    """

    top1: float
    top5: float
    loss: float | None
    count: int
    predictions: Tensor

    def agreement(self, other: Metrics) -> float:
        """Share of images, in percent, on which two models name the same class."""
        return 100 * float((self.predictions == other.predictions).double().mean())


@torch.inference_mode()
def measure(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    total: int,
    *,
    device: torch.device,
    reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    each: Callable[[int], None] = lambda images: None,
) -> Metrics:
    """Run a model over this process's share of a dataset and add the shares up.

    Args:
        logits: images ``[B, C, H, W]`` in [0, 1] on ``device`` → ``[B, K]``.
        batches: uint8 images, labels and positions in the dataset.
        total: images of the whole dataset.
        reduce: sums a tensor over the processes.
        each: told the number of images after every batch.
    """
    # correct at 1, correct at 5, images: whole numbers below 2^53 are exact in float64.
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    predictions = torch.zeros(total, dtype=torch.int64, device=device)
    for images, labels, positions in batches:
        labels = labels.to(device)
        # In float64 the sum does not depend on how the images were batched.
        scores = logits(images.to(device, non_blocking=True).float().div(255)).double()
        best = scores.topk(min(5, scores.shape[1])).indices  # [B, 5]
        hits = best == labels[:, None]
        sums[0] += hits[:, 0].sum()
        sums[1] += hits.any(1).sum()
        sums[2] += F.cross_entropy(scores, labels, reduction="sum")
        sums[3] += len(labels)
        predictions[positions.to(device)] = best[:, 0]
        each(len(labels))
    sums, predictions = reduce(sums), reduce(predictions)
    count = int(sums[3])
    top1, top5, loss = (float(value) for value in sums[:3] / count)
    return Metrics(100 * top1, 100 * top5, loss, count, predictions.cpu())


def device_named(name: str | None) -> torch.device:
    """What ``--device`` means; unset, a GPU where there is one.

    Raises:
        UserError: there is no such device.
    """
    if name not in (None, "cpu", "cuda"):
        raise UserError(f"there is no device {name!r}", "--device cpu or --device cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no GPU that torch can use", "--device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


@dataclass(frozen=True)
class Evaluation:
    """A model's metrics, with the preprocessing that they hold for.

    Attributes:
        classes: that were scored, and that the model has.
    """

    model: str
    data: str
    metrics: Metrics
    preprocessing: dict[str, Any]
    parameters: int
    classes: tuple[int, int]


def preprocessing_of(model: nn.Module, **overrides: Any) -> dict[str, Any]:
    """timm's evaluation preprocessing for a model, with what is given in its place."""
    from timm.data.model_config import resolve_input_data_config

    given = {key: value for key, value in overrides.items() if value is not None}
    try:
        return resolve_input_data_config(model, args=given)
    except ValueError as problem:
        raise UserError(str(problem), "leave the size out, or build the model for it") from None


def evaluate(
    model: str,
    data: str,
    *,
    split: str = "validation",
    checkpoint: str | None = None,
    use_ema: bool = False,
    batch_size: int = 256,
    workers: int = 4,
    img_size: int | None = None,
    crop_pct: float | None = None,
    interpolation: str | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    device: str | None = None,
    data_dir: str | None = None,
    class_map: str | None = None,
    accelerator: Any = None,
    each: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Top-1 and top-5 of any timm model, run folder or weight file on a labelled folder.

    Args:
        model: a name, ``local-dir:…``, ``hf-hub:…`` or run folder.
        data: a folder with the split, or the split's own folder, or a timm dataset.
        checkpoint: weights for ``model`` in place of its own.
        use_ema: the averaged ones of that file.
        class_map: label order. Without it, a folder of some of the model's classes is scored among these.
        accelerator: an ``accelerate.Accelerator`` to share the images among its processes.
        each: told images done and in all.

    Raises:
        UserError: the model has no classes, or not those of the data.
    """
    place = accelerator.device if accelerator else device_named(device)
    built = open_model(model, checkpoint=checkpoint, use_ema=use_ema, img_size=img_size)
    if not built.spec.num_classes:
        raise UserError(
            f"{built.spec.name} has no classes to score: its output is an embedding or it has no head",
            "fine-tune it first: vitkd distill --student … --pretrained --loss labels",
        )
    own = built.spec.num_classes
    parameters = sum(p.numel() for p in built.model.parameters())
    images = held_out(model, data, split) or open_split(
        data,
        split,
        data_dir=data_dir,
        class_map=class_map,
        class_names=known_names(built),
        guessed=built.class_names is None,
        num_classes=own,
    )
    if isinstance(images, Relabelled) and len(images.classes) < own:
        built, images = narrowed(built, images.classes), images.images
    config = preprocessing_of(
        built.model,
        img_size=img_size,
        crop_pct=crop_pct,
        interpolation=interpolation,
        mean=mean,
        std=std,
    )
    size = (config["input_size"][1], config["input_size"][2])
    spec = with_statistics(
        describe(built.model, name=built.spec.name, img_size=size), config["mean"], config["std"]
    )
    view = val_view(
        size,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        interpolation=config["interpolation"],
        in_chans=config["input_size"][0],
    )
    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    loader = val_loader(images, view, batch_size, rank=rank, world=world, workers=workers)
    net = built.model.to(place).eval()
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count * world
        each(min(done, len(images)), len(images))

    metrics = measure(
        lambda batch: net(as_seen_by(spec, batch)),
        loader,
        len(images),
        device=place,
        reduce=(lambda t: accelerator.reduce(t, "sum")) if accelerator else lambda t: t,
        each=progress,
    )
    return Evaluation(spec.name, data, metrics, config, parameters, (built.spec.num_classes, own))


def run_of(model: str) -> Path | None:
    """The folder of the run that a student's folder belongs to; None if there is none."""
    path = Path(model.removeprefix("local-dir:")).expanduser()
    # RUN, RUN/student, RUN/teacher/student or RUN/distilled-42/student
    return next((p for p in (path, *path.parents[:2]) if (p / "recipe.toml").is_file()), None)


def held_out(model: str, data: str, split: str) -> Images | None:
    """The images that a run set aside itself, if this is that run and the folder it learned from."""
    run = run_of(model)
    if run is None or not (run / "split.json").is_file() or split != "validation":
        return None
    recipe = Recipe.from_toml(run / "recipe.toml")
    if Path(recipe.data or "").expanduser().resolve() != Path(data).expanduser().resolve():
        return None
    listed = json.loads((run / "split.json").read_text())
    return open_data(data, class_map=recipe.class_map, split_files=listed).val
