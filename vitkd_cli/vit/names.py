"""What people type → exactly one timm vision transformer, or a refusal that names the nearest.

Exact names, ``name.tag``, timm's deprecated names, ``hf-hub:`` and ``local-dir:`` addresses and folders
are taken as they are; anything else is a short name. What is left open is refused and never guessed.
"""

import contextlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vitkd_cli.errors import UserError
from vitkd_cli.text import listed, resuming
from vitkd_cli.vit.config import classes_of, embeds, read_config
from vitkd_cli.vit.short_names import completed, nearest_hint
from vitkd_cli.vit.zoo import fold, tags_of, timm_version, vits

# Architecture → tag → ImageNet-1k validation top-1 in %, from timm's results/results-imagenet.csv, which
# its wheel lacks. The last digit differs between releases of that file. caformer's tags at 384 px are left
# out: they cost three times as much.
PUBLISHED_TOP1: dict[str, dict[str, float]] = json.loads(
    Path(__file__).with_name("top1.json").read_text(encoding="utf-8")
)


_Why = Literal[
    "exact", "timm/ prefix dropped", "deprecated name", "short name", "tag", "address", "folder", "run folder"
]


@dataclass(frozen=True)
class Resolved:
    """What a typed model name stands for.

    Attributes:
        typed: as it was typed.
        name: what ``timm.create_model`` is handed: ``deit3_small_patch16_224.fb_in1k``, ``hf-hub:…``
            or ``local-dir:…``.
        why: how ``typed`` was read; ``tag`` where :func:`teacher_tag_for` chose the tag.
        architecture: timm's name without a tag; empty for an address or a folder.
        tag: which pretrained weights; empty for an address, or where timm has none.
        num_classes: classes of the tag's logits, 0 without a head or if the output is an embedding;
            None where only the weights can tell (addresses and folders).
        embeds: the output is an embedding (CLIP towers), however wide.
        has_weights: timm knows pretrained weights; taken for granted at an address.
        tag_was_typed: the user chose the tag, so nobody else may.
    """

    typed: str
    name: str
    why: _Why
    architecture: str = ""
    tag: str = ""
    num_classes: int | None = None
    embeds: bool = False
    has_weights: bool = True
    tag_was_typed: bool = False

    def line(self) -> str:
        """One line for the terminal: ``deit3_small → deit3_small_patch16_224.fb_in1k (1000 classes)``."""
        classes = f"{self.num_classes} classes"
        facts = "embeds, no classes" if self.embeds else classes if self.num_classes else "no head"
        if self.num_classes is None:
            facts = self.why
        if not self.has_weights:
            facts += ", no pretrained weights"
        if self.why == "deprecated name":
            facts += "; deprecated name, timm renames it"
        if self.why == "tag":
            facts += f"; tag chosen for {classes}"
        arrow = "" if self.typed == self.name else f"{self.typed} → "
        return f"{arrow}{self.name} ({facts})"

    def called(self, own_weights: bool) -> str:
        """Its name, without the tag where it has other weights: a tag names weights."""
        return self.name if own_weights or not self.architecture else self.architecture


def resolve(typed: str | Path, *, role: str = "model") -> Resolved:
    """What people type → one timm model.

    Args:
        typed: a timm name with or without its tag, a short form of one (``deit3_small``, ``ViT-B/16``,
            ``dinov2_vits14``), a folder that holds ``config.json`` or ``student/config.json``, or an address.
        role: ``teacher``, ``student`` or ``model``; decides which flag a hint names.
    """
    typed = str(typed).strip()
    if not typed:
        raise UserError(f"the {role}'s name is empty", "name a timm model, such as deit3_small")
    source, colon, address = typed.partition(":")
    source = source.lower().replace("_", "-")
    if colon and source in ("hf-hub", "local-dir"):
        if not address:
            raise UserError(f"there is nothing behind {typed}", f"write {source}:NAME")
        return Resolved(typed, f"{source}:{address}", "address")
    if folder := _folder(typed):
        return folder
    if os.path.isfile(os.path.expanduser(typed)):  # False for a name that no file can have
        raise _file(typed, role)

    name = typed.removeprefix("timm/")  # timm's own repositories on the Hub are its names
    for spelling in (name, fold(name)):  # as typed, then as timm would write it
        if found := _exact(typed, spelling):
            return replace(found, why="timm/ prefix dropped") if name != typed else found
    if Path(name).suffix in _WEIGHT_FILES:  # only now: ".pt" is a tag of BEiT-3
        raise _file(typed, role)
    owner, slash, repository = name.partition("/")
    if slash and not repository.isdigit():  # but ViT-B/16
        raise _hub_id_or_path(typed, owner, repository)
    return _chosen(typed, *completed(typed, name), "short name")


def published_top1(name: str) -> float | None:
    """ImageNet-1k top-1, in percent, of ``architecture.tag``, where our table has it."""
    architecture, _, tag = name.partition(".")
    return PUBLISHED_TOP1.get(architecture, {}).get(tag)


def better_tags(resolved: Resolved) -> list[tuple[str, float]]:
    """Tags of the same architecture with a better published top-1, the best first.

    Returns:
        ``(tag, top-1 in percent)``; empty where the model's own figure is unknown.
    """
    own = published_top1(resolved.name)
    if own is None:
        return []
    tags = PUBLISHED_TOP1[resolved.architecture].items()
    return sorted(((tag, top1) for tag, top1 in tags if top1 > own), key=lambda pair: -pair[1])


def teacher_tag_for(resolved: Resolved, num_classes: int) -> Resolved:
    """The tag whose logits fit the data's classes.

    timm's default tag stays where it fits, where nothing of the same architecture does, and where the
    user typed the tag; else the first that fits is taken.
    """
    if resolved.tag_was_typed or resolved.num_classes is None or resolved.num_classes == num_classes:
        return resolved
    for tag, cfg in tags_of(resolved.architecture).items():
        if cfg.has_weights and classes_of(cfg) == num_classes:
            found = _chosen(resolved.typed, resolved.architecture, tag, "tag")
            return replace(found, tag_was_typed=False)
    return resolved


def _chosen(typed: str, architecture: str, tag: str | None, why: _Why) -> Resolved:
    """One architecture of timm with this tag, or with timm's default tag."""
    tags = tags_of(architecture)
    if tag is not None and tag not in tags:
        raise UserError(
            f"{architecture} has no tag {tag}", "it has: " + (", ".join(filter(None, tags)) or "none at all")
        )
    chosen = next(iter(tags), "") if tag is None else tag
    cfg = tags.get(chosen)
    return Resolved(
        typed=typed,
        name=f"{architecture}.{chosen}" if chosen else architecture,
        architecture=architecture,
        tag=chosen,
        num_classes=None if cfg is None else classes_of(cfg),
        why=why,
        embeds=cfg is not None and embeds(cfg),
        has_weights=cfg is not None and bool(cfg.has_weights),
        tag_was_typed=tag is not None,
    )


def _exact(typed: str, name: str) -> Resolved | None:
    """A name that timm has today or had once."""
    import timm
    from timm.models import get_deprecated_models

    architecture, dot, tag = name.partition(".")
    why: _Why = "exact"
    deprecated = get_deprecated_models()
    if architecture in deprecated and not dot:
        renamed = deprecated[architecture]
        if renamed is None:
            raise UserError(f"timm has removed {architecture}", nearest_hint(architecture))
        why = "deprecated name"
        architecture, dot, tag = renamed.partition(".")
    if architecture in vits() or _is_new_vit(architecture):
        return _chosen(typed, architecture, tag if dot else None, why)
    if architecture not in deprecated and timm.is_model(architecture):
        raise UserError(
            f"{architecture} is a timm model but no ViT", "vitkd distils vision transformers: try deit3_small"
        )
    return None


def _is_new_vit(architecture: str) -> bool:
    """Is it a ViT that came with a newer timm than the table's? The model itself says."""
    import timm
    import torch

    from vitkd_cli.vit.spec import describe

    if timm.__version__ != timm_version() and timm.is_model(architecture):
        with contextlib.suppress(UserError), torch.device("meta"):
            return bool(describe(timm.create_model(architecture)))
    return False


# Folders and files ------------------------------------------------------------------------------------

_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def _folder(typed: str) -> Resolved | None:
    """A folder in timm's hub format, or a run folder; None if it is meant as a name."""
    folder = Path(os.path.expanduser(typed))
    if not os.path.isdir(folder):
        return None
    for path in (folder, folder / "student"):
        if (path / "config.json").is_file():
            read_config(path / "config.json")
            return Resolved(typed, f"local-dir:{path}", "folder" if path == folder else "run folder")
    if (folder / "recipe.toml").is_file():
        raise UserError(f"the run in {typed} has left no student yet", f"{resuming(typed)} finishes it")
    if not _looks_like_a_path(typed):
        return None  # a folder that happens to be called deit_tiny
    raise UserError(
        f"{typed} holds neither config.json nor student/config.json",
        "name a run folder, or a folder in timm's hub format",
    )


def _looks_like_a_path(typed: str) -> bool:
    return typed.startswith((".", "~", "/")) or os.sep in typed


def _file(typed: str, role: str) -> UserError:
    flag = {"teacher": "--teacher-checkpoint", "student": "--initial-checkpoint"}.get(role, "--checkpoint")
    what = "is a file" if os.path.isfile(os.path.expanduser(typed)) else "looks like a file"
    return UserError(
        f"{typed} {what}, and weights name no architecture", f"name the timm model, and add {flag} {typed}"
    )


def _hub_id_or_path(typed: str, owner: str, repository: str) -> UserError:
    if typed.startswith((".", "~", "/")) or "/" in repository:
        return UserError(f"there is no folder {typed}", "name a run folder or a timm model")
    if os.path.isdir(owner):
        inside = sorted(place.name for place in os.scandir(owner) if place.is_dir())
        near = f"{owner} has {listed(inside)}" if inside else f"{owner} holds no folder"
        return UserError(f"there is no folder {typed}", f"{near}; a model of the Hub is hf-hub:{typed}")
    hint = f"write hf-hub:{typed} (timm format only)"
    with contextlib.suppress(UserError):  # timm knows few names of the Hub
        hint += f", or did you mean {resolve(repository).architecture}?"
    return UserError(f"{typed} is no folder, and looks like a Hub id of {owner}", hint)
