"""timm's constructors: their arguments, the image sizes that they take, and the memory that they need."""

import ast
import contextlib
import logging
import re
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.options import read_literal
from vitkd_cli.vit.config import too_large
from vitkd_cli.vit.spec import ViTSpec, describe

MOST_TENSORS = 5000  # timm's deepest ViT has 1,691
# Arguments of timm.create_model that ask for another kind of model, or for weights from elsewhere.
_NOT_OF_THE_CONSTRUCTOR = (
    *("cache_dir", "checkpoint_path", "exportable", "features_only", "no_jit", "out_indices", "pretrained"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "scriptable"),
)


def parse_kwargs(text: str | None) -> dict[str, Any]:
    """``"depth=4,embed_dim=96"`` → ``{"depth": 4, "embed_dim": 96}``; values are Python literals."""
    if not text:
        return {}
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call) and not call.args
        values = {str(k.arg): read_literal(k.value, bare_words=True) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise UserError(f"cannot read {text!r} as k=v,…", "such as depth=4,embed_dim=96") from None
    for key in values:
        if key in _NOT_OF_THE_CONSTRUCTOR:
            raise UserError(f"{key!r} in k=v,… is no argument of a model's constructor", "leave it out")
    return values


class Outline(NamedTuple):
    """A model on the meta device; the arguments that it takes; the size, where one was asked for."""

    net: nn.Module
    arguments: dict[str, Any]
    size: tuple[int, int] | None = None


def outline(name: str, arguments: dict[str, Any], title: str) -> Outline:
    """A model without memory for its weights, at the size that is asked for.

    Args:
        name: as ``timm.create_model`` takes it.
        title: the model's name in messages.
    """
    if large := next((key for key, value in arguments.items() if too_large(value)), None):
        raise UserError(
            f"{name} cannot be built with {large}={arguments[large]}: no ViT is that large",
            "a smaller number",
        )
    asked = arguments.get("img_size")
    if asked is None:
        return _blank(name, arguments)
    sides = asked if isinstance(asked, tuple) else (asked, asked)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"img_size must be a whole number above 0, not {asked!r}", "such as img_size=224")

    def at(rows: int, columns: int) -> Outline:
        found = _blank(name, {**arguments, "img_size": (rows, columns)})
        _check_size(found.net, describe(found.net, name=title, img_size=(rows, columns)))
        return found._replace(size=(rows, columns))

    try:
        return at(*sides)
    except UserError as problem:
        if "divide into patches" in problem.message:
            raise
        own = describe(_blank(name, _without(arguments, "img_size")).net, name=title).input_size[0]
        fitting: list[str] = []
        for side in (*_sides_near(max(sides)), own):
            with contextlib.suppress(UserError):
                at(side, side)
                fitting.append(f"{side}")
            if len(fitting) == 2:
                break
        if not fitting:
            raise
        raise UserError(problem.message, f"an image size of {' or '.join(fitting)} does") from None


def _sides_near(side: int) -> list[int]:
    """Multiples of what patches and windows usually make up, the nearest first."""
    steps = (16, 14, 32, 42, 56, 64)
    near = {side // step * step + more for step in steps for more in (0, step)} - {0, side}
    return sorted(near, key=lambda other: (abs(other - side), other))


def _check_size(net: nn.Module, spec: ViTSpec) -> None:
    """Refuse an image that the patches do not cover: timm would drop the rest in silence."""
    embed: Any = next((module for module in net.modules() if hasattr(module, "feat_ratio")), None)
    if embed is None or getattr(embed, "dynamic_img_pad", False):  # a padded stem drops nothing
        return
    for side, patch in zip(spec.input_size, embed.feat_ratio(as_scalar=False), strict=True):
        if side % patch:
            nearest = [size for size in (side // patch * patch, (side // patch + 1) * patch) if size]
            raise UserError(
                f"{spec.name}: {side} pixels do not divide into patches of {patch}",
                f"an image size of {' or '.join(map(str, nearest))} does",
            )


def _blank(name: str, arguments: dict[str, Any]) -> Outline:
    """A model on the meta device, refused while it grows if there is no room for its weights."""
    room, total, tensors = psutil.virtual_memory().available, 0, 0

    def count(module: nn.Module, key: str, tensor: Tensor | None) -> None:
        nonlocal total, tensors
        if tensor is not None:
            total, tensors = total + tensor.numel() * tensor.element_size(), tensors + 1
        if total > room or tensors > MOST_TENSORS:
            what = f"at least {total / 2**30:.1f} GiB" if total > room else f"over {MOST_TENSORS:,} tensors"
            raise UserError(
                f"{name} needs {what} for its weights, and {room / 2**30:.1f} GiB are free",
                "a smaller model; or look at its arguments",
            )

    hooks = [
        register_module_buffer_registration_hook(count),
        register_module_parameter_registration_hook(count),
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                return Outline(create(name, arguments), arguments)
            except _TakesNoSize:
                fewer = _without(arguments, "img_size")
                return Outline(create(name, fewer), fewer)
    finally:
        for hook in hooks:
            hook.remove()


class _TakesNoSize(Exception):
    """The family's constructor knows no image size: it takes any, or has one."""


def create(name: str, arguments: dict[str, Any], *, pretrained: bool = False) -> nn.Module:
    """``timm.create_model``, whose errors are the user's."""
    import timm

    # timm tells of resampled embeddings and new heads on its log; our notes say it once, in order.
    logging.getLogger("timm").setLevel(logging.ERROR)
    shown = ", ".join(f"{k}={v}" for k, v in arguments.items() if k != "pretrained_cfg_overlay")
    try:
        net: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    except UserError:
        raise
    except Exception as problem:  # whatever timm or torch makes of arguments or of a folder's configuration
        unknown = re.search(r"unexpected keyword argument.*?'(\w+)'", str(problem))
        if isinstance(problem, TypeError) and unknown:
            word = unknown[1]
            if word == "drop_path_rate" and not arguments.get(word, 1):  # a family without it never drops
                return create(name, _without(arguments, word), pretrained=pretrained)
            if word == "img_size":
                raise _TakesNoSize from None
            raise UserError(
                f"{name} takes no argument {word!r}", "see timm's documentation of the model"
            ) from None
        reason = first_line(problem) if str(problem) else f"timm refuses it ({type(problem).__name__})"
        raise UserError(
            f"{name} cannot be built with {shown or 'its own configuration'}: {reason}",
            "leave one of them out, or choose a size that the patches divide"
            if shown
            else "see to its config.json, or to the network",
        ) from problem
    if not (hasattr(net, "forward_features") and hasattr(net, "forward_head")):
        raise UserError(f"{name} is no whole model with {shown}", "leave out features_only")
    return net


def _without(arguments: dict[str, Any], word: str) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != word}
