"""timm's vision transformers as a table: the facts of every name, read off the models beforehand.

Building every name takes minutes even without weights, so ``zoo.json`` keeps what :func:`survey` reads.
``python tests/vit/test_zoo.py --write`` writes it, and the test walks over all names again.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from vitkd_cli.vit.spec import ViTSpec, describe

TABLE = Path(__file__).with_name("zoo.json")
# Exported through torch's ONNX exporter and run in ONNX Runtime with another batch size, one model a module:
# as it is, or with every module's fused_attn off. The others were not tried.
ONNX = {
    **dict.fromkeys(
        "cait convit crossvit davit deit edgenext eva levit mobilevit naflexvit pit pvt_v2 qwen3_vit swin_transformer "
        "swin_transformer_v2 swin_transformer_v2_cr tiny_vit tnt vision_transformer volo xcit".split(),
        "yes",
    ),
    **dict.fromkeys(
        "beit hiera maxxvit nest twins vision_transformer_relpos vision_transformer_sam".split(), "unfused"
    ),
}


@cache
def zoo() -> dict[str, dict[str, Any]]:
    """The facts of every timm ViT by name, in timm's natural order."""
    table: dict[str, dict[str, Any]] = json.loads(TABLE.read_text()) if TABLE.is_file() else {}
    return table


def survey(name: str) -> dict[str, Any]:
    """Build a model without weights and read its facts: a row of the table.

    Returns:
        ``family``, ``class`` (of timm), ``depth``, ``widths``, ``grids`` (rows and columns), ``heads``, each
        in the order of the blocks without repetition; ``prefix_tokens``, ``class_token``, ``distilled``,
        ``input_size``, ``num_classes``, ``embed_dim``, ``parameters``; ``body``, tensors and elements of its
        state without the classifier; ``final``, whether patch tokens can be read after the final norm; and
        of how many blocks one can read ``attention_outputs``, ``maps`` (by kind) and ``qkv``.
    """
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model(name)
        return row(model, describe(model, name=name))


def row(model: Any, spec: ViTSpec) -> dict[str, Any]:
    """A row of the table for a model at hand; see :func:`survey`."""
    blocks = spec.blocks
    kinds = [block.maps for block in blocks]
    return {
        "family": type(model).__module__.rpartition(".")[2],
        "class": type(model).__name__,
        "depth": spec.depth,
        "widths": list(dict.fromkeys(block.dim for block in blocks)),
        "grids": [list(grid) for grid in dict.fromkeys(block.grid for block in blocks)],
        "heads": list(dict.fromkeys(block.heads for block in blocks)),
        "prefix_tokens": spec.num_prefix_tokens,
        "class_token": spec.class_token,
        "distilled": spec.distilled,
        "input_size": list(spec.input_size),
        "num_classes": spec.num_classes,
        "embed_dim": spec.embed_dim,
        "parameters": sum(p.numel() for p in model.parameters()),
        "body": list(body_of(model.state_dict(), model.pretrained_cfg.get("classifier"))),
        "final": spec.final_grid != (0, 0),
        "attention_outputs": sum(block.attention_output is not None for block in blocks),
        "maps": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "qkv": sum(block.fused == 1 and block.maps in ("tokens", "windows") for block in blocks),
    }


def body_of(state: dict[str, Tensor], classifier: str | Collection[str] | None) -> tuple[int, int]:
    """Tensors and elements of a state without its classifier: what tells architectures apart."""
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
    body = [t for key, t in state.items() if not any(key.startswith(f"{head}.") for head in heads)]
    return len(body), sum(tensor.numel() for tensor in body)
