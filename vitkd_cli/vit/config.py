"""A folder's ``config.json`` in timm's hub format, its values of the types that timm takes for granted."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vitkd_cli.errors import UserError

LARGEST = 200_000  # no number among a ViT's arguments is larger (timm: 115,217 classes)


def too_large(value: Any) -> bool:
    """Is a number, or one in a list, beyond what any ViT is built with?"""
    if isinstance(value, (list, tuple)):
        return any(map(too_large, value))
    return isinstance(value, (int, float)) and not abs(value) <= LARGEST


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 64 and all(map(_number, value))


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# A test of a value, and what the value must be.
_Check = tuple[Callable[[Any], bool], str]
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "hamming", "box", "random")
_CROPS = ("center", "squash", "border")
_TEXT: _Check = (lambda value: isinstance(value, str), "text")
_TEXTS: _Check = (lambda value: isinstance(value, str) or _texts(value), "text or a list of texts")
_SIZE: _Check = (
    lambda value: (
        isinstance(value, list) and len(value) == 3 and all(_count(side) and side for side in value)
    ),
    "three whole numbers above 0",
)
_SHARE: _Check = (lambda value: _number(value) and 0 < value <= 10, "a number above 0")
_WHOLE: _Check = (_count, f"a whole number of at most {LARGEST:,}")
_NAMES: _Check = (lambda value: _texts(value) or isinstance(value, dict), "a list of names")
_OBJECT: _Check = (lambda value: isinstance(value, dict), "an object")
_OWN: dict[str, _Check] = {
    "architecture": _TEXT,
    "num_classes": _WHOLE,
    "num_features": _WHOLE,
    "global_pool": _TEXT,
    "label_names": _NAMES,
    "label_descriptions": _OBJECT,
    "pretrained_cfg": _OBJECT,
    "model_args": _OBJECT,
    "vitkd": _OBJECT,
}
_PRETRAINED: dict[str, _Check] = {
    "num_classes": _WHOLE,
    "input_size": _SIZE,
    "test_input_size": _SIZE,
    "min_input_size": _SIZE,
    "mean": (_numbers, "a list of numbers"),
    "std": (lambda value: _numbers(value) and min(value) > 0, "a list of numbers above 0"),
    "crop_pct": _SHARE,
    "test_crop_pct": _SHARE,
    "interpolation": (lambda value: value in _INTERPOLATIONS, " or ".join(_INTERPOLATIONS)),
    "crop_mode": (lambda value: value in _CROPS, " or ".join(_CROPS)),
    "first_conv": _TEXTS,
    "classifier": _TEXTS,
    "label_offset": _WHOLE,
    "label_names": _NAMES,
    "label_descriptions": _OBJECT,
    "license": _TEXT,
    "tag": _TEXT,
}


def read_config(file: Path) -> dict[str, Any]:
    """A ``config.json``, refused if it names no architecture or has a value that no model can have."""
    try:
        content = json.loads(file.read_bytes())
    except OSError as problem:
        raise UserError(f"cannot read {file}: {problem.strerror}", "check the path") from None
    except (ValueError, RecursionError):
        raise UserError(f"{file} is not JSON", "write the folder again") from None
    if not isinstance(content, dict) or "architecture" not in content:
        raise UserError(
            f"{file} names no timm architecture",
            "transformers' folders are another format; name the timm model, and give the weight file in it",
        )
    _check(_OWN, content, file)
    # timm once wrote the model's own facts and those of its weights side by side
    _check(_PRETRAINED, content.get("pretrained_cfg") or content, file)
    for key, value in (content.get("model_args") or {}).items():
        if too_large(value):
            raise UserError(f"{file}: {key} = {value} is more than any ViT has", "write the folder again")
    return content


def _check(checks: dict[str, _Check], content: dict[str, Any], file: Path) -> None:
    for key, (fits, expected) in checks.items():
        if (value := content.get(key)) is not None and not fits(value):
            raise UserError(f"{file}: {key} must be {expected}, not {value!r:.60}", "write the folder again")


def is_embedding(num_classes: int, has_labels: bool = False) -> bool:
    """Is an output of this width an embedding, as CLIP towers have, rather than logits?

    Widths of embeddings are multiples of 64 from 384 on (timm: 384, 512, 640, 768, 1024, 1152, 1280). Label
    sets are not (timm: 1000, 11221, 11821, 19168, 21841, 21843, 115217), unless someone trained on such a
    set; then the model's configuration names its labels.

    Args:
        num_classes: width of the output.
        has_labels: the configuration names the classes.
    """
    return not has_labels and num_classes >= 384 and num_classes % 64 == 0


def embeds(pretrained_cfg: Any) -> bool:
    """Is the output that a pretrained configuration promises an embedding?"""
    return is_embedding(*_output(pretrained_cfg))


def classes_of(pretrained_cfg: Any) -> int:
    """Classes of the logits that a pretrained configuration promises.

    Args:
        pretrained_cfg: timm's ``PretrainedCfg``, or the dict that a built model carries.

    Returns:
        0 for headless models, and for those whose output is an embedding.
    """
    return 0 if embeds(pretrained_cfg) else _output(pretrained_cfg)[0]


def _output(cfg: Any) -> tuple[int, bool]:
    """Width of the output, and whether the configuration names its classes."""
    read = cfg.get if isinstance(cfg, Mapping) else lambda key: getattr(cfg, key, None)
    return int(read("num_classes") or 0), bool(read("label_names"))
