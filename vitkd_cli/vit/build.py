"""Names and weight files → models, through timm's own builder."""

from __future__ import annotations

import ast
import contextlib
import logging
import os
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.files import damaged
from vitkd_cli.options import read_literal
from vitkd_cli.text import resuming
from vitkd_cli.vit.config import read_config, too_large
from vitkd_cli.vit.model import AnyModel, Model
from vitkd_cli.vit.names import Resolved, resolve
from vitkd_cli.vit.spec import ViTSpec, describe
from vitkd_cli.vit.weights import (
    Weights,
    another_architecture,
    came_to,
    classes_in_file,
    is_classifier,
    lenient_loading,
    misfits,
    not_a_number,
    read_weights,
    weight_file_of,
    with_its_head,
)

_MOST_TENSORS = 5000  # timm's deepest ViT has 1,691


def build(
    resolved: Resolved,
    *,
    pretrained: bool,
    checkpoint: str | None = None,
    use_ema: bool = False,
    num_classes: int | None = None,
    img_size: int | tuple[int, int] | None = None,
    in_chans: int | None = None,
    drop_path: float | None = None,
    kwargs: str | None = None,
    file_flag: str = "--checkpoint",
    verify: bool = True,
) -> Model:
    """Build a timm model and load its weights; heads and position embeddings adapt.

    Args:
        resolved: what :func:`vitkd_cli.vit.names.resolve` made of the name.
        pretrained: load the weights that belong to the name, from the hub or a local folder.
        checkpoint: a weight file instead.
        use_ema: take the averaged weights of that file.
        num_classes: of the head; None keeps the weights' own.
        drop_path: stochastic depth.
        kwargs: ``k=v,…`` for the constructor.
        file_flag: the flag by which a user gives such a file, for messages.
        verify: hold a folder to its manifest, where it has one.

    Raises:
        UserError: no network, no weights, another architecture's weights, unsafe pickle, a bad argument,
            a folder that is not as it was written.
    """
    import timm

    folder: Path | None = None
    told: dict[str, Any] = {}
    if resolved.name.startswith("local-dir:"):
        folder = expanded(resolved.name.removeprefix("local-dir:"))
        told = _opened(folder, verify).get("vitkd") or {}
    arguments: dict[str, Any] = dict(parse_kwargs(kwargs))
    for key, value in {"img_size": img_size, "in_chans": in_chans, "drop_path_rate": drop_path}.items():
        if value is not None:
            arguments.setdefault(key, value)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    if isinstance(arguments.get("num_classes"), int) and arguments["num_classes"] < 0:
        raise UserError(f"num_classes is {arguments['num_classes']}", "0 is a model without a head")
    file = None if checkpoint is None else Path(checkpoint)
    if file is None and pretrained and folder is not None:
        file = weight_file_of(folder)
    if file is None and pretrained:
        if not resolved.has_weights:
            raise UserError(
                f"{resolved.name} has no pretrained weights in timm", f"give a file with {file_flag}"
            )
        _require_hub(resolved, file_flag)
        if resolved.name.startswith("hf-hub:"):
            read_config(_hub_config(resolved.name.removeprefix("hf-hub:")))
    title = _title(resolved, pretrained and checkpoint is None)
    outline, arguments, size = _outline(timm, resolved, arguments, title)
    read = Weights({})
    if file is not None:
        read = read_weights(file, use_ema=use_ema, own=outline.state_dict().keys())
    state, notes = read.tensors, read.notes
    tried: dict[str, Tensor] = {}
    if file is not None:
        model, state, tried, said = _loaded(timm, resolved, arguments, outline, state, f"{file}", title)
        notes += said
    elif pretrained:
        with lenient_loading(fit=False) as tried:
            model = _create(timm, resolved, arguments, pretrained=True)
    else:
        model = _create(timm, resolved, arguments, pretrained=False)
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    spec = describe(model, name=title, img_size=size)
    if file is not None and (reasons := misfits(tried, model, spec)):
        raise another_architecture(f"{file}", title, state, reasons)
    if (name := not_a_number(tried)) is not None:
        raise UserError(
            f"{file or resolved.name}: {name} holds NaN or infinite values",
            "the training that left it diverged, or the file is damaged: take an earlier one",
        )
    own = pretrained and checkpoint is None
    about = told if own else {}
    return Model(
        model,
        spec,
        weights=checkpoint or ("random" if not pretrained else resolved.name),
        notes=(*notes, *(came_to(state, tried, model) if file is not None else ())),
        labels=_labels(config),
        licence=config.get("license") if own else None,  # other weights are not what it is of
        origin=_origin(resolved, config, about, own),
        about=about,
    )


def _loaded(
    timm: Any,
    resolved: Resolved,
    arguments: dict[str, Any],
    outline: nn.Module,
    state: dict[str, Tensor],
    file: str,
    title: str,
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Tensor], tuple[str, ...]]:
    """A model with the tensors of a file, as far as they fit it.

    Returns:
        The model; the file's tensors, their head under the model's name; what timm made of them; notes.
    """
    config: dict[str, Any] = dict(outline.pretrained_cfg)  # type: ignore[arg-type]
    width: Any = getattr(outline, "head_hidden_size", None) or outline.num_features
    state, notes = with_its_head(state, config.get("classifier"), width)
    arguments = dict(arguments)
    if _averages(state, outline):
        arguments["global_pool"] = "avg"
        notes += ("patch tokens are averaged (global_pool=avg): the file has fc_norm in place of norm",)
    classes = classes_in_file(state, config.get("classifier"))
    arguments.setdefault("num_classes", classes)  # a file without a head makes a model without one
    # A folder or address is a source, before which timm forgets the state dict.
    overlay = {"state_dict": state, "num_classes": classes, "custom_load": False, "source": ""}
    try:
        with lenient_loading(fit=True) as tried:
            model = _create(timm, resolved, {**arguments, "pretrained_cfg_overlay": overlay}, pretrained=True)
    except UserError:  # the model can be built: its conversion met what it was not made for
        if reasons := misfits(state, outline, describe(outline)):
            raise another_architecture(file, title, state, reasons) from None
        raise
    for holder in (model.pretrained_cfg, getattr(model, "default_cfg", {})):
        if isinstance(holder, dict):
            holder.pop("state_dict", None)  # or a second copy of the weights stays in memory
    if arguments["num_classes"] == classes and is_classifier(tried, config.get("classifier"), classes):
        model.tells_classes = True  # type: ignore[assignment]
    return model, state, tried, notes


def _averages(state: dict[str, Tensor], model: nn.Module) -> bool:
    """Is a file of a model that averages patch tokens before its norm, where this one reads its class token?

    Such are MAE's after fine-tuning; timm's ViT is built for either.
    """
    norms = (f"{norm}.weight" in state for norm in ("fc_norm", "norm"))
    return tuple(norms) == (True, False) and isinstance(getattr(model, "fc_norm", None), nn.Identity)


def open_model(
    typed: AnyModel,
    *,
    checkpoint: str | None = None,
    use_ema: bool = False,
    pretrained: bool = True,
    img_size: int | tuple[int, int] | None = None,
    verify: bool = True,
) -> Model:
    """A finished model by the name that a person types: a timm name, run folder, ``local-dir:``, ``hf-hub:``.

    Args:
        typed: that name; or a built model, which is taken as it is.
        checkpoint: weights in place of its own.
        use_ema: the averaged ones of that file.
        pretrained: False leaves a timm name at random, which is enough to look at its geometry.
        verify: as for :func:`build`.

    Raises:
        UserError: as :func:`build` and :func:`vitkd_cli.vit.names.resolve`.
    """
    if use_ema and checkpoint is None:
        raise UserError(
            "--use-ema takes the average out of a weight file, and none is given",
            "--checkpoint FILE, or leave it out",
        )
    if isinstance(typed, nn.Module):
        typed = _as_it_is(typed)
    if isinstance(typed, Model):
        if checkpoint is not None:
            raise UserError("a built model has its weights already", "leave the checkpoint out")
        return typed
    resolved = resolve(typed)
    pretrained = checkpoint is None and (pretrained or resolved.name.startswith("local-dir:"))
    return build(
        resolved,
        pretrained=pretrained,
        checkpoint=checkpoint,
        use_ema=use_ema,
        img_size=img_size,
        verify=verify,
    )


def source_of(model: AnyModel) -> str:
    """The name or folder that a model came by; empty for one that somebody built."""
    if isinstance(model, Model):
        return model.weights if model.weights.startswith("local-dir:") else ""
    return str(model) if isinstance(model, (str, Path)) else ""


def _as_it_is(net: nn.Module) -> Model:
    """A model of timm's that somebody built."""
    config = dict(getattr(net, "pretrained_cfg", None) or {})
    name = config.get("architecture") or type(net).__name__
    return Model(net, describe(net, name=name), "given", labels=_labels(config), origin=name)


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    labels = config.get("label_names")
    return tuple(map(str, labels)) if isinstance(labels, (list, tuple)) else None


def _origin(resolved: Resolved, config: dict[str, Any], about: dict[str, Any], own: bool) -> str:
    """What the weights began with; a folder says it, and names none of its kind."""
    if not resolved.name.startswith("local-dir:"):
        return _title(resolved, own)
    tag = config.get("tag") if own and not about else None
    return str(about.get("origin") or f"{config['architecture']}{f'.{tag}' if tag else ''}")


def _title(resolved: Resolved, pretrained: bool) -> str:
    """A tag names weights: a model with others goes by its architecture, a folder by its path."""
    if resolved.name.startswith("local-dir:"):
        return resolved.name.removeprefix("local-dir:")
    return resolved.name if pretrained or not resolved.architecture else resolved.architecture


# What timm.create_model takes beside them: another kind of model, or weights from elsewhere.
_NOT_OF_THE_CONSTRUCTOR = (
    "cache_dir",
    "checkpoint_path",
    "exportable",
    "features_only",
    "no_jit",
    "out_indices",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "scriptable",
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


def _outline(
    timm: Any, resolved: Resolved, arguments: dict[str, Any], title: str
) -> tuple[nn.Module, dict[str, Any], tuple[int, int] | None]:
    """The model without memory for its weights, at the size that is asked for.

    Returns:
        The model; the arguments that it takes; the size, where one was asked for.

    Raises:
        UserError: it cannot be built, the machine has no room for it, or it does not take that size.
    """
    if large := next((key for key, value in arguments.items() if too_large(value)), None):
        raise UserError(
            f"{resolved.name} cannot be built with {large}={arguments[large]}: no ViT is that large",
            "a smaller number",
        )
    asked = arguments.get("img_size")
    if asked is None:
        return (*_blank(timm, resolved, arguments), None)
    sides = asked if isinstance(asked, tuple) else (asked, asked)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise UserError(f"img_size must be a whole number above 0, not {asked!r}", "such as img_size=224")

    def at(size: tuple[int, int]) -> tuple[nn.Module, dict[str, Any], tuple[int, int]]:
        model, taken = _blank(timm, resolved, {**arguments, "img_size": size})
        _check_size(model, describe(model, name=title, img_size=size))
        return model, taken, size

    try:
        return at((sides[0], sides[1]))
    except UserError as problem:
        if "divide into patches" in problem.message:
            raise
        fitting = []
        own = describe(_blank(timm, resolved, _without_size(arguments))[0], name=title).input_size[0]
        for side in (*_sides_near(max(sides)), own):
            with contextlib.suppress(UserError):
                at((side, side))
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


def _blank(timm: Any, resolved: Resolved, arguments: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """A model on the meta device, if there is room for its weights; and the arguments that it takes."""
    room, total, tensors = psutil.virtual_memory().available, 0, 0

    def count(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal total, tensors
        if tensor is not None:
            total, tensors = total + tensor.numel() * tensor.element_size(), tensors + 1
        if total > room or tensors > _MOST_TENSORS:
            what = f"at least {total / 2**30:.1f} GiB" if total > room else f"over {_MOST_TENSORS:,} tensors"
            raise UserError(
                f"{resolved.name} needs {what} for its weights, and {room / 2**30:.1f} GiB are free",
                "a smaller model; or look at its arguments",
            )

    hooks = [
        register_module_buffer_registration_hook(count),
        register_module_parameter_registration_hook(count),
    ]
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            try:
                return _create(timm, resolved, arguments, pretrained=False), arguments
            except _TakesNoSize:
                fewer = _without_size(arguments)
                return _create(timm, resolved, fewer, pretrained=False), fewer
    finally:
        for hook in hooks:
            hook.remove()


def _without_size(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arguments.items() if key != "img_size"}


class _TakesNoSize(Exception):
    """The family's constructor knows no image size: it takes any, or has one."""


def _create(
    timm: Any,
    resolved: Resolved,
    arguments: dict[str, Any],
    *,
    pretrained: bool,
) -> nn.Module:
    # timm tells of resampled embeddings and new heads on its log; our notes say it once, in order.
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        model: nn.Module = timm.create_model(resolved.name, pretrained=pretrained, **arguments)
    except UserError:
        raise
    except Exception as problem:  # whatever timm or torch makes of arguments or of a folder's configuration
        unknown = re.search(r"unexpected keyword argument.*?'(\w+)'", str(problem))
        if isinstance(problem, TypeError) and unknown:
            word = unknown[1]
            if word == "drop_path_rate" and not arguments.get(word, 1):  # a family without it never drops
                fewer = {key: value for key, value in arguments.items() if key != word}
                return _create(timm, resolved, fewer, pretrained=pretrained)
            if word == "img_size":
                raise _TakesNoSize from None
            raise UserError(
                f"{resolved.name} takes no argument {word!r}", "see timm's documentation of the model"
            ) from None
        reason = first_line(problem) if str(problem) else f"timm refuses it ({type(problem).__name__})"
        given = _spelled(arguments)
        raise UserError(
            f"{resolved.name} cannot be built with {given or 'its own configuration'}: {reason}",
            "leave one of them out, or choose a size that the patches divide"
            if given
            else "see to its config.json, or to the network",
        ) from problem
    if not (hasattr(model, "forward_features") and hasattr(model, "forward_head")):
        raise UserError(
            f"{resolved.name} is no whole model with {_spelled(arguments)}", "leave out features_only"
        )
    return model


def _spelled(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items() if key != "pretrained_cfg_overlay")


def _check_size(model: nn.Module, spec: ViTSpec) -> None:
    """Refuse an image that the patches do not cover: timm would drop the rest in silence."""
    embed: Any = next((module for module in model.modules() if hasattr(module, "feat_ratio")), None)
    if embed is None or getattr(embed, "dynamic_img_pad", False):  # a padded stem drops nothing
        return
    for side, patch in zip(spec.input_size, embed.feat_ratio(as_scalar=False), strict=True):
        if side % patch:
            nearest = [size for size in (side // patch * patch, (side // patch + 1) * patch) if size]
            raise UserError(
                f"{spec.name}: {side} pixels do not divide into patches of {patch}",
                f"an image size of {' or '.join(map(str, nearest))} does",
            )


def _opened(folder: Path, verify: bool) -> dict[str, Any]:
    """The configuration of a folder whose files are those that were written."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", "name a folder in timm's hub format")
    if verify and (wrong := damaged(folder)):
        name, what = next(iter(wrong.items()))
        of_a_run = (folder.parent / "recipe.toml").is_file()
        cure = f"{resuming(folder.parent)} writes it anew" if of_a_run else "copy or export it again"
        raise UserError(
            f"{folder} is damaged or was changed: {name} {what}", f"{cure}; --no-verify takes it as it is"
        )
    return read_config(folder / "config.json")


def _require_hub(resolved: Resolved, file_flag: str) -> None:
    """Say that the weights are out of reach at once, instead of after a minute of retries."""
    from huggingface_hub import constants, try_to_load_from_cache
    from timm.models import get_pretrained_cfg

    if resolved.name.startswith("hf-hub:"):
        hub_id = resolved.name.removeprefix("hf-hub:").partition("@")[0]
        files: tuple[str, ...] = ("config.json",)
    else:
        config = get_pretrained_cfg(resolved.name)
        hub_id = (config.hf_hub_id or "") if config else ""
        if not hub_id:
            return  # plain address outside the hub: timm downloads it
        if hub_id == "timm/":
            hub_id += resolved.name
        files = ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")
    if any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files):
        return
    host = urlparse(constants.ENDPOINT).hostname or ""
    reachable = not constants.HF_HUB_OFFLINE
    if reachable and not (os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")):
        try:
            socket.create_connection((host, 443), timeout=10).close()
        except OSError:
            reachable = False
    if not reachable:
        raise UserError(
            f"no network, and {files[0]} of {hub_id} is not in the cache ({constants.HF_HUB_CACHE})",
            f"connect once to fetch it, or give a file with {file_flag}",
        )


def _hub_config(address: str) -> Path:
    from huggingface_hub import hf_hub_download

    hub_id, _, revision = address.partition("@")
    try:
        return Path(hf_hub_download(hub_id, "config.json", revision=revision or None))
    except Exception as problem:  # of the Hub, of the network, of the name
        raise UserError(
            f"cannot fetch config.json of {hub_id}: {first_line(problem)}",
            "check name, rights and network",
        ) from problem
