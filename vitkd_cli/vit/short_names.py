"""Short names → timm's: ``deit3_small``, ``ViT-B/16``, ``dinov2_vits14``, ``dinov3_tiny_eupe``.

The words of a short name must be words of a timm name, or of one of its tags; of the words that were left
unsaid, only those of geometry (``patch16``, ``224``, ``window7``) are free. The cheapest completion is
taken, if it is the only one; two that are equally near are refused.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache

from vitkd_cli.errors import UserError
from vitkd_cli.vit.zoo import fold, sizes_of, tags_of, vits

# What it costs to leave a word of geometry unsaid: the common choice is free.
_PATCH_COST = {16: 0, 14: 1, 32: 5, 8: 6}
_SIZE_COST = {224: 0, 240: 2, 256: 3}
_UNSAID = 100  # any other word: "distilled", "reg4", "clip"
_LETTERS = {"ti": "tiny", "t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}


def completed(typed: str, name: str) -> tuple[str, str | None]:
    """A short name's architecture and tag; None stands for timm's default tag.

    Args:
        typed: what a person typed, for messages.
        name: the same without ``timm/``.
    """
    form, dot, tag = name.partition(".")
    words = fold(form).strip("_").split("_")
    tag = tag.lower()
    tagged = [n for n in vits() if not dot or tag in tags_of(n)]
    # A tag that no candidate has is reported by the caller, against what the words alone would have meant.
    for names in (tagged, vits()):
        for spoken in (words, _expand(words)):
            if candidates := _matching(spoken, names):
                return _cheapest(typed, candidates, Counter(spoken)), tag if dot else None
    return _by_tag(typed, words)


def nearest_hint(folded: str) -> str:
    """A hint that names the models nearest to a folded name."""
    if nearest := difflib.get_close_matches(folded, short_forms(), n=4, cutoff=0.75):
        return "did you mean " + ", ".join(nearest) + "?"
    if within := [form for form in short_forms() if folded in form.split("_")]:
        return f"say more: {_few(within)}"
    return "nothing near; a timm name, such as deit3_small, or hf-hub:OWNER/NAME"


@cache
def short_forms() -> tuple[str, ...]:
    """The short form of every ViT of timm."""
    return tuple(dict.fromkeys(map(short_form, vits())))


def short_form(name: str) -> str:
    """A name without its geometry: ``deit3_small``, ``vit_base_clip``."""
    sizes = sizes_of(name)
    return "_".join(w for w in name.split("_") if w == "vit" or _geometry_cost(w, sizes) is None)


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


def _matching(words: list[str], names: Iterable[str]) -> list[str]:
    """Names that begin with the words; failing these, names that contain all of two or more."""
    begin = [name for name in names if name.split("_")[: len(words)] == words]
    if begin or len(words) < 2:
        return begin
    return [name for name in names if not Counter(words) - Counter(name.split("_"))]


def _by_tag(typed: str, words: list[str]) -> tuple[str, str]:
    """A form some of whose words are a tag's: ``dinov3_tiny_eupe``."""
    for spoken in (words, _expand(words)):
        said, tags = Counter(spoken), {}
        for name in vits():
            left = said - Counter(name.split("_"))
            if left and (found := [tag for tag in tags_of(name) if not left - Counter(tag.split("_"))]):
                tags[name] = found
        if tags:
            best = _cheapest(typed, tags, said, tags)
            if len(tags[best]) == 1:
                return best, tags[best][0]
            raise _ambiguous(typed, [f"{best}.{tag}" for tag in tags[best]])
    raise UserError(f"no model is called {typed!r}", nearest_hint("_".join(words)))


def _cheapest(
    typed: str, candidates: Iterable[str], said: Counter[str], tags: Mapping[str, list[str]] | None = None
) -> str:
    ranked = sorted(((*_unsaid(name, said), name) for name in candidates), key=lambda found: found[0])
    cost, missing, best = ranked[0]
    tie = len(ranked) > 1 and ranked[1][0] == cost
    # With an unsaid word in the best, all must lack the same one, or we would be choosing the model.
    if tie or (missing and any(words != missing for _, words, _ in ranked)):
        raise _ambiguous(typed, [f"{name}.{tags[name][0]}" if tags else name for *_, name in ranked])
    return best


def _unsaid(name: str, said: Counter[str]) -> tuple[int, frozenset[str]]:
    """Cost of the words of a name that were not said, and those which are no geometry."""
    sizes = sizes_of(name)
    left = [(word, _geometry_cost(word, sizes)) for word in (Counter(name.split("_")) - said).elements()]
    strange = frozenset(word for word, cost in left if cost is None)
    return sum(_UNSAID if cost is None else cost for _, cost in left), strange


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


def _ambiguous(typed: str, names: list[str]) -> UserError:
    return UserError(f"{typed!r} is ambiguous", f"say which: {_few(names)}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" … ({len(names)})" if len(names) > 6 else "")
