"""Named signals out of one ordinary forward of a vision transformer."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Tap:
    """The name of one signal.

    ============================ ===================================================== ===============
    tap                          tensor                                                shape
    ============================ ===================================================== ===============
    ``logits``                   the model's own output                                [B, K]
    ``embedding``                ``forward_head(pre_logits=True)``                     [B, E]
    ``features(i)``              patch tokens of block i's output (FFN-out), raw       [B, N, D]
    ``final``                    patch tokens after the final norm                     [B, N, D]
    ``attention_output(i)``      patch tokens after block i's attention (MHA-out)      [B, N, D]
    ``prefix(i)``                prefix tokens of block i's output, raw                [B, P, D]
    ``attention(i)``             softmax(QK^T/sqrt(d) + bias) of block i               [B, heads, N, N]
    ============================ ===================================================== ===============

    ``block`` counts from 0 and is never negative here; ``teacher`` tells several teachers apart.
    """

    kind: str
    block: int | None = None
    teacher: int = 0

    def __str__(self) -> str:
        return self.kind if self.block is None else f"{self.kind}({self.block})"

    def of_teacher(self, index: int) -> Tap:
        return replace(self, teacher=index)


LOGITS = Tap("logits")
EMBEDDING = Tap("embedding")
FINAL = Tap("final")


def features(block: int) -> Tap:
    return Tap("features", block)
