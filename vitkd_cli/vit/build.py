"""Names and weight files → models, through timm's own builder."""

from __future__ import annotations

import ast
import json
import logging
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from torch import nn

from vitkd_cli.errors import UserError
from vitkd_cli.files import damaged
from vitkd_cli.vit.names import Resolved, resolve
from vitkd_cli.vit.spec import ViTSpec, describe
from vitkd_cli.vit.weights import (
    another_architecture,
    came_to,
    classes_in_file,
    lenient_loading,
    misfits,
    read_weights,
)


@dataclass(frozen=True)
class Built:
    """A model, its facts, and what a person should know of how it came about.

    Attributes:
        weights: where they came from, such as ``hub``, a file's path, or ``random``.
        notes: what was dropped, missing or resampled on loading.
        class_names: of its own head, where its configuration names them.
        licence: of its weights, where its configuration names one.
        origin: timm's name, with the tag, or the Hub's of the weights that it began with, or the architecture
            alone; never a folder.
        about: what our run wrote of it into its folder's ``config.json``.
    """

    model: nn.Module
    spec: ViTSpec
    weights: str
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    licence: str | None = None
    origin: str = ""
    about: dict[str, Any] = field(default_factory=dict)


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
) -> Built:
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

    if verify and resolved.name.startswith("local-dir:"):
        _verified(Path(resolved.name.removeprefix("local-dir:")))
    arguments: dict[str, Any] = dict(parse_kwargs(kwargs))
    for key, value in {"img_size": img_size, "in_chans": in_chans, "drop_path_rate": drop_path}.items():
        if value is not None:
            arguments.setdefault(key, value)
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    state = None
    if checkpoint is not None:
        state = read_weights(checkpoint, use_ema=use_ema)
        reference = _create(timm, resolved, dict(arguments, num_classes=0), pretrained=False)
        config: dict[str, Any] = dict(reference.pretrained_cfg)  # type: ignore[arg-type]
        classes = classes_in_file(state, config.get("classifier"))
        arguments.setdefault("num_classes", classes)  # a file without a head makes a model without one
        # A folder or address is a source, before which timm forgets the state dict.
        overlay = {"state_dict": state, "num_classes": classes, "custom_load": False, "source": ""}
        arguments["pretrained_cfg_overlay"] = overlay
    elif pretrained and resolved.name.startswith("local-dir:"):
        _require_folder(resolved.name.removeprefix("local-dir:"))
    elif pretrained:
        if not resolved.has_weights:
            raise UserError(
                f"{resolved.name} has no pretrained weights in timm", f"give a file with {file_flag}"
            )
        _require_hub(resolved, file_flag)
    if state is None:
        model, tried = _create(timm, resolved, arguments, pretrained=pretrained), {}
    else:
        try:
            with lenient_loading() as tried:
                model = _create(timm, resolved, arguments, pretrained=True)
        except Exception as problem:  # the model can be built: its conversion met what it was not made for
            reasons = misfits(state, reference, describe(reference)) or [repr(problem)]
            raise another_architecture(str(checkpoint), _title(resolved, False), state, reasons) from problem
        for holder in (model.pretrained_cfg, getattr(model, "default_cfg", {})):
            if isinstance(holder, dict):
                holder.pop("state_dict", None)  # or a second copy of the weights stays in memory
    config = dict(getattr(model, "pretrained_cfg", None) or {})
    labels = config.get("label_names")
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    spec = describe(model, name=_title(resolved, pretrained), img_size=size)
    if arguments.get("img_size") is not None:
        _check_size(model, spec)
    if state is not None and (reasons := misfits(tried, model, spec)):
        raise another_architecture(str(checkpoint), _title(resolved, False), state, reasons)
    own = pretrained and checkpoint is None
    about = _told_of(resolved) if own else {}
    return Built(
        model,
        spec,
        weights=checkpoint or ("random" if not pretrained else resolved.name),
        notes=came_to(state, tried, model) if state else (),
        class_names=tuple(map(str, labels)) if isinstance(labels, (list, tuple)) else None,
        licence=config.get("license"),
        origin=_origin(resolved, config, about, own),
        about=about,
    )


def open_model(
    typed: str,
    *,
    checkpoint: str | None = None,
    use_ema: bool = False,
    pretrained: bool = True,
    img_size: int | tuple[int, int] | None = None,
    verify: bool = True,
) -> Built:
    """A finished model by the name that a person types: a timm name, run folder, ``local-dir:``, ``hf-hub:``.

    Args:
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


def _told_of(resolved: Resolved) -> dict[str, Any]:
    """What a run wrote of its student into the folder's configuration."""
    if not resolved.name.startswith("local-dir:"):
        return {}
    config = json.loads(Path(resolved.name.removeprefix("local-dir:"), "config.json").read_bytes())
    about = config.get("vitkd")
    return about if isinstance(about, dict) else {}


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
        values = {str(k.arg): _literal(k.value) for k in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise UserError(f"cannot read {text!r} as k=v,…", "such as depth=4,embed_dim=96") from None
    for key in values:
        if key in _NOT_OF_THE_CONSTRUCTOR:
            raise UserError(f"{key!r} in k=v,… is no argument of a model's constructor", "leave it out")
    return values


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # a bare word is text, as on any command line
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), node.id)
    return ast.literal_eval(node)


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
    except TypeError as problem:
        if "unexpected keyword argument" not in str(problem):
            raise
        word = str(problem).rpartition(" ")[2].strip("'\"")
        if word == "drop_path_rate" and not arguments[word]:  # a family without it never drops
            fewer = {key: value for key, value in arguments.items() if key != word}
            return _create(timm, resolved, fewer, pretrained=pretrained)
        raise UserError(
            f"{resolved.name} takes no argument {word!r}",
            "leave out --img-size" if word == "img_size" else "see timm's documentation of the model",
        ) from None
    except (AssertionError, RuntimeError) as problem:
        if isinstance(problem, RuntimeError) and "greater than 0" not in str(problem):
            raise  # else the image is smaller than a patch: its embeddings have no positions left
        raise UserError(
            f"{resolved.name} cannot be built with {_spelled(arguments)}: {problem or 'timm refuses it'}",
            "leave one of them out, or choose a size that the patches divide",
        ) from None
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


def _verified(folder: Path) -> None:
    """Refuse a folder whose files are not those that were written."""
    if wrong := damaged(folder):
        name, what = next(iter(wrong.items()))
        raise UserError(
            f"{folder} is damaged or was changed: {name} {what}",
            "copy or export it again; --no-verify takes it as it is",
        )


def _require_folder(path: str) -> None:
    folder = Path(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json", "name a folder in timm's hub format")
    if not any(folder.glob("*.safetensors")):
        raise UserError(f"{folder} has no .safetensors weights", "save the model with safe serialization")


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
