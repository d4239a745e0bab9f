"""timm's vision transformers as a table: the facts of every name, read off the models beforehand.

Building every name takes minutes even without weights, so ``zoo.json`` keeps the facts.
``python tests/vit/test_zoo.py --write`` writes it, and the test holds the models to it.
"""

import difflib
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vitkd_cli.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# Heads vary with the classes, position tables with the image, and fixed tables with timm's version.
_PASSING = re.compile(
    r"(aux_)?(head|classifier)|.*(pos_embed|rel_pos|relative_position|attention_bias|attn_mask|rope)"
)
TABLE = Path(__file__).with_name("zoo.json")
# One small model per family was exported by torch's ONNX exporter and run in ONNX Runtime with another batch
# size: as it is, or with every module's fused_attn off. The other families were not tried.
ONNX = {
    "yes": """cait convit crossvit davit deit edgenext eva levit mobilevit naflexvit pit pvt_v2 qwen3_vit tnt
        swin_transformer swin_transformer_v2 swin_transformer_v2_cr tiny_vit vision_transformer volo xcit""",
    "unfused": "beit hiera maxxvit nest twins vision_transformer_relpos vision_transformer_sam",
}


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def zoo() -> dict[str, dict[str, Any]]:
    """The facts of every timm ViT by name, in timm's natural order.

    Returns:
        ``family`` (timm's module), ``class``; ``depth``; ``widths``, ``grids`` and ``heads``, each in the
        order of the blocks without repetition; ``prefix_tokens``, ``class_token``, ``distilled``,
        ``input_size``, ``num_classes``, ``embed_dim``, ``parameters``; ``body_tensors`` and
        ``body_parameters`` (:func:`anatomy`); ``tags``: pretrained tag → classes of its logits, null where
        it has no weights; ``final``: patch tokens can be read after the final norm; and how many blocks have
        ``attention_outputs``, ``maps`` (by what they relate) and ``qkv``.
    """
    models: dict[str, dict[str, Any]] = _table()["models"]
    return models


@cache
def vits() -> tuple[str, ...]:
    """Every ViT that the installed timm has."""
    import timm  # which imports torch, which takes seconds

    return tuple(name for name in zoo() if timm.is_model(name))


@cache
def sizes_of(architecture: str) -> frozenset[int]:
    """The image sizes, in pixels, of an architecture's tags."""
    return frozenset(cfg.input_size[-1] for cfg in tags_of(architecture).values())


@cache
def tags_of(architecture: str) -> dict[str, Any]:
    """Tags of an architecture, timm's default first → its ``PretrainedCfg``; the tag "" where it has none."""
    from timm.models import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(architecture)
    return {name.partition(".")[2]: cfg for name, cfg in cfgs.items()}


def matching(pattern: str | None) -> dict[str, dict[str, Any]]:
    """The rows of the names that a pattern matches: that very name, a part of one with its tag, or a glob."""
    if pattern is None or pattern in zoo():
        return zoo() if pattern is None else {pattern: zoo()[pattern]}
    folded = fold(pattern)
    globbed = folded if set(folded) & set("*?[") else f"*{folded}*"
    found = {
        name: facts
        for name, facts in zoo().items()
        if any(fnmatch(full, globbed) for full in (name, *(f"{name}.{tag}" for tag in facts["tags"])))
    }
    if not found:
        near = difflib.get_close_matches(folded, zoo(), 3)
        hint = f"did you mean {', '.join(near)}?" if near else "part of a name, such as deit3 or vit_small"
        raise UserError(f"no timm vision transformer matches {pattern!r}", hint)
    return found


def fold(name: str) -> str:
    """A name as timm would write it: ``DeiT3-Small`` → ``deit3_small``."""
    return re.sub(r"[-/\s_]+", "_", name.lower())


def timm_version() -> str:
    """The version of timm that the table was read off."""
    return str(_table()["timm"])


@cache
def installed_timm() -> str:
    """The version of timm that is installed, which need not be imported for it."""
    return version("timm")


def anatomy(state: Mapping[str, "Tensor"]) -> dict[str, int]:
    """Number of tensors and of their elements in a state dict, without head and position tables."""
    body = [t for name, t in state.items() if t.is_floating_point() and not _PASSING.match(name)]
    return {"body_tensors": len(body), "body_parameters": sum(t.numel() for t in body)}


def onnx_of(family: str) -> str:
    """``yes``, ``unfused`` or ``untried``."""
    return next((verdict for verdict, families in ONNX.items() if family in families.split()), "untried")
