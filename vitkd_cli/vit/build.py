"""Names and weight files → models, through timm's own builder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.files import damaged
from vitkd_cli.requests import Weights
from vitkd_cli.text import resuming
from vitkd_cli.vit.config import read_config
from vitkd_cli.vit.construct import outline, parse_kwargs
from vitkd_cli.vit.loading import load_file, load_pretrained
from vitkd_cli.vit.model import AnyModel, Model
from vitkd_cli.vit.names import Resolved, resolve
from vitkd_cli.vit.spec import describe
from vitkd_cli.vit.weights import weight_file_of


def build(
    resolved: Resolved,
    weights: Weights,
    *,
    num_classes: int | None = None,
    kwargs: str | None = None,
    file_flag: str = "--checkpoint",
    **arguments: Any,
) -> Model:
    """Build a timm model and load its weights; heads and position embeddings adapt.

    Args:
        resolved: what :func:`vitkd_cli.vit.names.resolve` made of the name.
        weights: random, those that belong to the name, or a file's; and the size of the images.
        num_classes: of the head; None keeps the weights' own.
        kwargs: ``k=v,…`` for the constructor, as a user types it.
        file_flag: the flag that gives a weight file, for messages.
        arguments: more of the constructor, where ``kwargs`` does not say otherwise; None is not given.
    """
    given = parse_kwargs(kwargs)
    for key, value in {"img_size": weights.img_size, **arguments}.items():
        if value is not None:
            given.setdefault(key, value)
    if num_classes is not None:
        given["num_classes"] = num_classes
    if isinstance(given.get("num_classes"), int) and given["num_classes"] < 0:
        raise UserError(f"num_classes is {given['num_classes']}", "0 is a model without a head")
    own = weights.pretrained and weights.checkpoint is None
    file = None if weights.checkpoint is None else Path(weights.checkpoint)
    about: dict[str, Any] = {}
    if resolved.name.startswith("local-dir:"):
        folder = expanded(resolved.name.removeprefix("local-dir:"))
        told = _opened(folder, weights.verify).get("vitkd") or {}
        if own:
            file, about = weight_file_of(folder), told
    elif own:
        _require_weights(resolved, file_flag)
    title = resolved.called(own).removeprefix("local-dir:")
    blank = outline(resolved.name, given, title)
    if file is None:
        net, spec, notes = load_pretrained(resolved.name, blank, title, pretrained=own)
    else:
        net, spec, notes = load_file(resolved.name, blank, title, file, use_ema=weights.use_ema)
    config = dict(getattr(net, "pretrained_cfg", None) or {})
    origin = title
    if resolved.name.startswith("local-dir:"):  # say what its weights began with, not the folder
        tag = config.get("tag") if own and not about else None
        origin = str(about.get("origin") or f"{config['architecture']}{f'.{tag}' if tag else ''}")
    return Model(
        net,
        spec,
        weights=weights.checkpoint or (resolved.name if weights.pretrained else "random"),
        notes=notes,
        labels=_labels(config),
        licence=config.get("license") if own else None,  # of the model's own weights alone
        origin=origin,
        about=about,
    )


def open_model(typed: AnyModel, weights: Weights | None = None, **settings: Any) -> Model:
    """Open a model by name: a timm name, a run folder, ``local-dir:…`` or ``hf-hub:…``.

    Args:
        typed: that name; or a built model, which is taken as it is.
        weights: which ones; with ``pretrained=False`` a timm name is random, which is enough to look at its
            geometry, and a folder keeps its own.
        settings: those of ``weights``, in its place.
    """
    weights = weights or Weights(**settings)
    if weights.use_ema and weights.checkpoint is None:
        raise UserError(
            "--use-ema takes the average out of a weight file, and none is given",
            "--checkpoint FILE, or leave it out",
        )
    if isinstance(typed, nn.Module):
        typed = _as_it_is(typed)
    if isinstance(typed, Model):
        if weights.checkpoint is not None:
            raise UserError("a built model has its weights already", "leave the checkpoint out")
        return typed
    resolved = resolve(typed)
    if resolved.name.startswith("local-dir:"):
        weights = replace(weights, pretrained=True)
    return build(resolved, weights)


def source_of(model: AnyModel) -> str:
    """The name or folder of a model; empty for one that was built elsewhere."""
    if isinstance(model, Model):
        return model.weights if model.weights.startswith("local-dir:") else ""
    return str(model) if isinstance(model, (str, Path)) else ""


def _as_it_is(net: nn.Module) -> Model:
    """A timm model that was built elsewhere."""
    config = dict(getattr(net, "pretrained_cfg", None) or {})
    name = config.get("architecture") or type(net).__name__
    return Model(net, describe(net, name=name), "given", labels=_labels(config), origin=name)


def _labels(config: dict[str, Any]) -> tuple[str, ...] | None:
    labels = config.get("label_names")
    return tuple(map(str, labels)) if isinstance(labels, (list, tuple)) else None


def _opened(folder: Path, verify: bool) -> dict[str, Any]:
    """The configuration of a folder; its files are compared with its manifest if ``verify``."""
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


def weights_at_hand(resolved: Resolved) -> bool:
    """Can a model be opened without fetching anything? Weights that timm fetches elsewhere count as not."""
    return resolved.name.startswith("local-dir:") or _in_cache(*_on_the_hub(resolved))


def _on_the_hub(resolved: Resolved) -> tuple[str, tuple[str, ...]]:
    """The repository of a model's weights, empty if there is none, and the files of which it has one."""
    from timm.models import get_pretrained_cfg

    if resolved.name.startswith("hf-hub:"):
        return resolved.name.removeprefix("hf-hub:").partition("@")[0], ("config.json",)
    config = get_pretrained_cfg(resolved.name)
    hub_id = (config.hf_hub_id or "") if config else ""
    hub_id += resolved.name if hub_id == "timm/" else ""
    return hub_id, ("model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors")


def _in_cache(hub_id: str, files: tuple[str, ...]) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return bool(hub_id) and any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in files)


def _require_weights(resolved: Resolved, file_flag: str) -> None:
    """Refuse a name without weights, and say at once, without retries, that they are out of reach."""
    from huggingface_hub import constants, file_exists, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    if not resolved.has_weights:
        raise UserError(f"{resolved.name} has no pretrained weights in timm", f"give a file with {file_flag}")
    hub_id, files = _on_the_hub(resolved)
    if hub_id and not _in_cache(hub_id, files):  # weights elsewhere are timm's to fetch
        try:
            file_exists(hub_id, files[0])
        except HfHubHTTPError:
            pass  # the Hub answered; downloading says what is wrong
        except Exception:
            raise UserError(
                f"no network, and {files[0]} of {hub_id} is not in the cache ({constants.HF_HUB_CACHE})",
                f"connect once to fetch it, or give a file with {file_flag}",
            ) from None
    if resolved.name.startswith("hf-hub:"):
        revision = resolved.name.partition("@")[2]
        try:
            file = hf_hub_download(hub_id, "config.json", revision=revision or None)
        except Exception as problem:  # of the Hub, of the network, of the name
            raise UserError(
                f"cannot fetch config.json of {hub_id}: {first_line(problem)}",
                "check name, rights and network",
            ) from problem
        read_config(Path(file))
