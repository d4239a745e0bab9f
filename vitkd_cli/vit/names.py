"""What people type → exactly one timm vision transformer, or a refusal that names the nearest.

Exact names, ``name.tag``, timm's deprecated names, ``hf-hub:`` and ``local-dir:`` addresses and folders
are taken as they are. Anything else is a short name: its words must be words of a timm name, and the
words that were left unsaid may only be geometry (``patch16``, ``224``, ``window7``). What is left open
is refused and never guessed.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from vitkd_cli.errors import UserError
from vitkd_cli.text import resuming
from vitkd_cli.vit.config import classes_of, embeds, read_config
from vitkd_cli.vit.zoo import fold, timm_version, zoo

# Architecture → tag → ImageNet-1k validation top-1, percent, from timm's results/results-imagenet.csv, which
# is no part of its wheel. The last digit differs between timm's releases of that file. caformer's tags at
# 384 px are left out: they cost three times as much.
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
        architecture: timm's name without a tag; empty for an address or a folder.
        tag: which pretrained weights; empty if there are none, or for an address.
        num_classes: classes of the tag's logits, 0 without a head or if the output is an embedding;
            None where only the weights can tell (addresses and folders).
        why: what it was taken for; ``tag`` where :func:`teacher_tag_for` chose the tag.
        embeds: the output is an embedding (CLIP towers), however wide.
        has_weights: timm knows pretrained weights; taken for granted at an address.
        tag_was_typed: the user chose the tag, so nobody else may.
    """

    typed: str
    name: str
    architecture: str
    tag: str
    num_classes: int | None
    why: _Why
    embeds: bool = False
    has_weights: bool = True
    tag_was_typed: bool = False

    def line(self) -> str:
        """One line for the terminal: ``deit3_small → deit3_small_patch16_224.fb_in1k (1000 classes)``."""
        if self.num_classes is None:
            facts = str(self.why)
        elif self.embeds:
            facts = "embeds, no classes"
        else:
            facts = f"{self.num_classes} classes" if self.num_classes else "no head"
        if not self.has_weights:
            facts += ", no pretrained weights"
        if self.why == "deprecated name":
            facts += "; deprecated name, timm renames it"
        if self.why == "tag":
            facts += f"; tag chosen for {self.num_classes} classes"
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

    Raises:
        UserError: nothing fits, more than one model does, it is no vision transformer, or it is a file.
    """
    typed = str(typed).strip()
    if not typed:
        raise UserError(f"the {role}'s name is empty", "name a timm model, such as deit3_small")
    source, colon, address = typed.partition(":")
    source = source.lower().replace("_", "-")
    if colon and source in ("hf-hub", "local-dir"):
        if not address:
            raise UserError(f"there is nothing behind {typed}", f"write {source}:NAME")
        return Resolved(typed, f"{source}:{address}", "", "", None, "address")
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
    return _short(typed, name)


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
    for tag, cfg in _tags(resolved.architecture).items():
        if cfg.has_weights and classes_of(cfg) == num_classes:
            found = _chosen(resolved.typed, resolved.architecture, tag, "tag")
            return replace(found, tag_was_typed=False)
    return resolved


# --- timm's registry ---------------------------------------------------------------------------------
# timm imports torch, which takes seconds: never at the top of this file.


@cache
def _vits() -> dict[str, frozenset[int]]:
    """Every ViT of timm → the image sizes, in pixels, of its tags."""
    import timm

    there = set(timm.list_models())
    names = [name for name in zoo() if name in there]
    return {name: frozenset(cfg.input_size[-1] for cfg in _tags(name).values()) for name in names}


@cache
def _tags(architecture: str) -> dict[str, Any]:
    """Tags of an architecture, timm's default first → its ``PretrainedCfg``; the tag "" where it has none."""
    from timm.models import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(architecture)
    return {name.partition(".")[2]: cfg for name, cfg in cfgs.items()}


def _chosen(typed: str, architecture: str, tag: str | None, why: _Why) -> Resolved:
    """One architecture of timm with this tag, or with timm's default tag."""
    tags = _tags(architecture)
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
            raise UserError(f"timm has removed {architecture}", _nearest_hint(architecture))
        why = "deprecated name"
        architecture, dot, tag = renamed.partition(".")
    if architecture in _vits() or _is_new_vit(architecture):
        return _chosen(typed, architecture, tag if dot else None, why)
    if architecture not in deprecated and timm.is_model(architecture):
        raise UserError(
            f"{architecture} is a timm model but no ViT", "vitkd distils vision transformers: try deit3_small"
        )
    return None


def _is_new_vit(architecture: str) -> bool:
    """A name that the table lacks, for it came with a newer timm: is it a ViT? The model itself says."""
    import timm

    if timm.__version__ == timm_version() or not timm.is_model(architecture):
        return False
    import torch

    from vitkd_cli.vit.spec import describe

    with contextlib.suppress(UserError), torch.device("meta"):
        describe(timm.create_model(architecture))
        return True
    return False


# --- short names -------------------------------------------------------------------------------------

# What it costs to leave a word of geometry unsaid: the common choice is free.
_PATCH_COST = {16: 0, 14: 1, 32: 5, 8: 6}
_SIZE_COST = {224: 0, 240: 2, 256: 3}
_UNSAID = 100  # any other word: "distilled", "reg4", "clip"
_LETTERS = {"ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}


def _expand(words: list[str]) -> list[str]:
    """``dinov2 vits14`` → ``dinov2 vit small patch14``; ``vit b 16`` → ``vit base patch16``."""
    expanded: list[str] = []
    for word in words:
        if joint := re.fullmatch(r"vit([tsblhg])(8|14|16|32)(plus)?", word):
            letter, patch, plus = joint.groups()
            expanded += ["vit", _LETTERS[letter], f"patch{patch}", *([plus] if plus else [])]
        elif word in ("8", "14", "16", "32"):
            expanded.append(f"patch{word}")
        else:
            expanded.append(_LETTERS.get(word, word))
    return expanded


def _geometry_cost(word: str, sizes: frozenset[int]) -> int | None:
    """What leaving this word unsaid costs; None if it is no geometry."""
    if word == "vit":
        return 0  # dinov2_small, siglip_base
    if patch := re.fullmatch(r"(?:patch|p)(\d+)", word):
        return _PATCH_COST.get(int(patch[1]), 7)
    if word.startswith("window"):
        return 0 if word in ("window7", "window8") else 1
    if re.fullmatch(r"\d+to\d+", word):  # Swin V2, trained at one size and tuned at another
        return 4
    # Only a number that is an image size: levit_256 is as wide as that, and runs at 224 px.
    return _SIZE_COST.get(int(word), 4) if word.isdigit() and int(word) in sizes else None


def _unsaid(name: str, said: Counter[str]) -> tuple[int, frozenset[str]]:
    """Cost of the words of a name that were not said, and those which are no geometry."""
    cost, words = 0, set()
    for word in (Counter(name.split("_")) - said).elements():
        geometry = _geometry_cost(word, _vits()[name])
        cost += _UNSAID if geometry is None else geometry
        if geometry is None:
            words.add(word)
    return cost, frozenset(words)


def _matching(words: list[str], names: list[str]) -> list[str]:
    """Names that begin with the words; failing these, names that contain all of two or more."""
    begin = [name for name in names if name.split("_")[: len(words)] == words]
    if begin or len(words) < 2:
        return begin
    return [name for name in names if not Counter(words) - Counter(name.split("_"))]


def _short(typed: str, name: str) -> Resolved:
    """A short form: the cheapest completion, if it is the only one that needs no unsaid word."""
    form, dot, tag = name.partition(".")
    words = fold(form).strip("_").split("_")
    tag = tag.lower()
    tagged = [n for n in _vits() if not dot or tag in _tags(n)]
    # A tag that no candidate has is reported below, against what the words alone would have meant.
    for names in (tagged, list(_vits())):
        for spoken in (words, _expand(words)):
            if candidates := _matching(spoken, names):
                best = _cheapest(typed, candidates, Counter(spoken))
                return _chosen(typed, best, tag if dot else None, "short name")
    return _by_tag(typed, words)


def _by_tag(typed: str, words: list[str]) -> Resolved:
    """A form some of whose words are a tag's: ``dinov3_tiny_eupe``."""
    for spoken in (words, _expand(words)):
        said, tags = Counter(spoken), {}
        for name in _vits():
            left = said - Counter(name.split("_"))
            if left and (found := [tag for tag in _tags(name) if not left - Counter(tag.split("_"))]):
                tags[name] = found
        if tags:
            best = _cheapest(typed, list(tags), said, tags)
            if len(tags[best]) == 1:
                return _chosen(typed, best, tags[best][0], "short name")
            raise UserError(
                f"{typed!r} is ambiguous", f"say which: {_few([f'{best}.{t}' for t in tags[best]])}"
            )
    raise UserError(f"no model is called {typed!r}", _nearest_hint("_".join(words)))


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" … ({len(names)})" if len(names) > 6 else "")


def _cheapest(
    typed: str, candidates: list[str], said: Counter[str], tags: Mapping[str, list[str]] | None = None
) -> str:
    ranked = sorted(candidates, key=lambda name: _unsaid(name, said)[0])
    cost, missing = _unsaid(ranked[0], said)
    tie = len(ranked) > 1 and _unsaid(ranked[1], said)[0] == cost
    # With an unsaid word in the best, all must lack the same one, or we would be choosing the model.
    disagree = missing and any(_unsaid(name, said)[1] != missing for name in ranked)
    if tie or disagree:
        shown = [f"{name}.{tags[name][0]}" if tags else name for name in ranked]
        raise UserError(f"{typed!r} is ambiguous", f"say which: {_few(shown)}")
    return ranked[0]


def _short_form(name: str) -> str:
    """A name without its geometry: ``deit3_small``, ``vit_base_clip``."""
    sizes = _vits()[name]
    return "_".join(w for w in name.split("_") if w == "vit" or _geometry_cost(w, sizes) is None)


@cache
def _short_forms() -> tuple[str, ...]:
    return tuple(dict.fromkeys(_short_form(name) for name in _vits()))


def _nearest_hint(folded: str) -> str:
    if nearest := difflib.get_close_matches(folded, _short_forms(), n=4, cutoff=0.75):
        return "did you mean " + ", ".join(nearest) + "?"
    if within := [form for form in _short_forms() if folded in form.split("_")]:
        return f"say more: {_few(within)}"
    return "nothing near; a timm name, such as deit3_small, or hf-hub:OWNER/NAME"


# --- folders and files -------------------------------------------------------------------------------


_WEIGHT_FILES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")


def _folder(typed: str) -> Resolved | None:
    """A folder in the form of timm's hub, or one of our run folders; None if it is meant as a name."""
    folder = Path(os.path.expanduser(typed))
    if not os.path.isdir(folder):
        return None
    for path in (folder, folder / "student"):
        if (path / "config.json").is_file():
            read_config(path / "config.json")
            why: _Why = "folder" if path == folder else "run folder"
            return Resolved(typed, f"local-dir:{path}", "", "", None, why)
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
    hint = f"write hf-hub:{typed} (timm format only)"
    with contextlib.suppress(UserError):  # most names on the Hub say nothing to timm
        hint += f", or did you mean {resolve(repository).architecture}?"
    return UserError(f"{typed} is no folder, and looks like a Hub id of {owner}", hint)
