"""What scoring and predicting share: a model on its device, its view of an image, a look at the files."""

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Split
from vitkd_cli.data.keyed import View, val_loader
from vitkd_cli.data.scan import image_files, scan, unreadable
from vitkd_cli.device import tensor_float32
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.cache import digest_of_weights
from vitkd_cli.evaluation.metrics import pass_over
from vitkd_cli.requests import EvalRequest, PredictRequest, Preprocessing
from vitkd_cli.vit.model import Model

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
ON_A_CPU = 32  # images whose signals fit its caches: 256, as on a GPU, take half as long again
Progress = Callable[[str, int, int], None]


def prepared_for(model: Model, request: Preprocessing, place: torch.device) -> Model:
    """A model on its device, in eval mode, for images prepared as the request says."""
    settings = ("img_size", "use_train_size", "crop_pct", "crop_mode", "interpolation", "mean", "std")
    model = model.prepared(**{key: getattr(request, key) for key in settings})
    config = model.preprocessing
    if config["crop_pct"] > 1 and config["crop_mode"] != "border":  # the rest of the image would be black
        raise UserError(
            f"--crop-pct {config['crop_pct']:g} is more than the whole image",
            "at most 1, or --crop-mode border",
        )
    if request.test_time_pool:
        model = _test_pooled(model)
    model.net.eval()
    return model.to(place)


def _test_pooled(model: Model) -> Model:
    """With timm's pooling of a bigger image's map, where timm does it."""
    from timm.layers import apply_test_time_pool

    config = model.preprocessing
    with torch.inference_mode():
        net, pooled = apply_test_time_pool(copy.deepcopy(model.net), config)
        try:
            net.eval()(torch.zeros(1, *config["input_size"]))
        except (RuntimeError, TypeError, AttributeError) as problem:
            raise UserError(
                f"timm's test-time pooling does not fit {model.spec.name}: its head pools no map",
                "leave out --test-time-pool",
            ) from problem
    return replace(model, net=net, prepared_by=config | ({"crop_pct": 1.0} if pooled else {}))


def seen_by(model: Model) -> dict[str, Any]:
    """All of its preprocessing that changes pixels; normalisation comes later."""
    config = model.preprocessing
    view = {key: config[key] for key in ("input_size", "crop_pct", "crop_mode", "interpolation")}
    return view | {"mean": config["mean"] if config["crop_mode"] == "border" else (0.0,)}


def facts_of(model: Model) -> list[Any]:
    """What its answers depend on, but for the images."""
    # timm wraps what it pools in another type
    return [digest_of_weights(model.net), type(model.net).__name__, model.preprocessing]


def over_images(
    answer: Callable[..., Tensor],
    images: Split,
    view: View,
    table: Tensor,
    request: EvalRequest | PredictRequest,
    *,
    accelerator: Any = None,
    advance: Callable[[int], None],
) -> Tensor:
    """Fill a table with what models answer of images, shared among the processes, as the request computes.

    Args:
        answer, table: as :func:`vitkd_cli.evaluation.metrics.pass_over` takes them.
        advance: told, after every batch, how many images all processes have answered with it.
    """
    place, dtype = table.device, AUTOCAST[request.mixed_precision]
    world = accelerator.num_processes if accelerator else 1
    loader = val_loader(
        images,
        view,
        request.batch_size or (256 if place.type == "cuda" else ON_A_CPU),
        rank=accelerator.process_index if accelerator else 0,
        world=world,
        workers=min(request.workers, os.cpu_count() or 1),
        pin_memory=place.type == "cuda",
    )

    def cast(labels: Tensor, *seen: Tensor) -> Tensor:
        with torch.autocast(place.type, dtype=dtype, enabled=dtype is not None):
            return answer(labels, *seen)

    def reduce(table: Tensor) -> Tensor:
        return accelerator.reduce(table, "sum") if accelerator else table

    with tensor_float32(place, allowed=True):  # as timm's validate.py has it
        return pass_over(cast, loader, table, reduce=reduce, advance=lambda count: advance(count * world))


def counting(tell: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """What is told how many more are done, and tells how many are by now, and of how many."""
    done = 0

    def advance(more: int) -> None:
        nonlocal done
        done = min(done + more, total)
        tell(done, total)

    return advance


def look_at(
    parts: Sequence[Split], decoding: Decoding, accelerator: Any, progress: Progress
) -> tuple[str, ...]:
    """Refuse files that cannot be read, all at once; a note on those that are not upright."""
    files = image_files(*parts)
    seen = scan(files, decoding, partial(progress, "looking at the files"), accelerator)
    if seen.broken:
        raise unreadable(seen.broken, len(files), "repair or delete them: eval leaves out none")
    if not seen.turned or decoding.exif:
        return ()
    return (
        f"{seen.turned:,} of {len(files):,} files carry an EXIF turn, which is not made, as in timm; "
        "--exif makes it",
    )
