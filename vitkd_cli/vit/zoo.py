"""What is known of timm's vision transformers without building one."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

_TABLE = Path(__file__).with_name("zoo.json")
# Heads change with the classes, position tables with the image, and fixed tables come and go with timm.
_PASSING = re.compile(
    r"(aux_)?(head|classifier)|.*(pos_embed|rel_pos|relative_position|attention_bias|attn_mask|rope)"
)


@cache
def zoo() -> dict[str, dict[str, Any]]:
    """Every ViT of timm by name, with its ``body_tensors`` and ``body_parameters`` (see :func:`anatomy`)."""
    return json.loads(_TABLE.read_text()) if _TABLE.exists() else {}


def anatomy(state: Mapping[str, Tensor]) -> dict[str, int]:
    """Number of tensors and of their elements in a state dict, without head and position tables."""
    body = [t for name, t in state.items() if t.is_floating_point() and not _PASSING.match(name)]
    return {"body_tensors": len(body), "body_parameters": sum(t.numel() for t in body)}
