"""Named signals out of one ordinary forward of a vision transformer."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.vit.attention import AttentionRecorder
from vitkd_cli.vit.spec import BlockSpec, ViTSpec, describe, split_tokens


@dataclass(frozen=True, order=True)
class Tap:
    """The name of one signal.

    ============================ ===================================================== ===============
    tap                          tensor                                                shape
    ============================ ===================================================== ===============
    ``logits``                   the model's own output                                [B, K]
    ``distill_logits``           the distillation head's, of a distilled student       [B, K]
    ``embedding``                ``forward_head(pre_logits=True)``                     [B, E]
    ``features(i)``              patch tokens of block i's output (FFN-out), raw       [B, N, D]
    ``final``                    patch tokens after the final norm                     [B, N, D]
    ``final_prefix``             prefix tokens after the final norm                    [B, P, D]
    ``attention_output(i)``      patch tokens after block i's attention (MHA-out)      [B, N, D]
    ``prefix(i)``                prefix tokens of block i's output, raw                [B, P, D]
    ``attention(i)``             softmax(QK^T/sqrt(d) + bias) of block i               [B, heads, N, N]
    ``qkv(i)``                   queries, keys and values of block i, unscaled         [3, B, heads, N, d]
    ============================ ===================================================== ===============

    ``block`` counts from 0 and is never negative here; ``teacher`` tells several teachers apart;
    ``view`` is 1 for the same signal of the second view that a term may ask for (:meth:`Term.view`).
    """

    kind: str
    block: int | None = None
    teacher: int = 0
    view: int = 0

    def __str__(self) -> str:
        name = self.kind if self.block is None else f"{self.kind}({self.block})"
        return f"{name}'" if self.view else name

    def of_teacher(self, index: int) -> Tap:
        return replace(self, teacher=index)


LOGITS = Tap("logits")
DISTILL_LOGITS = Tap("distill_logits")
EMBEDDING = Tap("embedding")
FINAL = Tap("final")
FINAL_PREFIX = Tap("final_prefix")

_OF_A_BLOCK = ("features", "prefix", "attention_output", "attention")


def features(block: int) -> Tap:
    """The tap of a block's output, FFN-out."""
    return Tap("features", block)


class TappedViT(nn.Module):
    """A model whose forward returns its named signals instead of its logits alone.

    The final tokens, the logits and the embedding come from the model's own ``forward_features``
    and ``forward_head``, so that the logits are ``model(images)`` to the bit; what lies inside is
    read by hooks on the blocks. Tap before ``torch.compile``: hooks that are added later are ignored.

    Args:
        model: any timm vision transformer; it is wrapped, not copied.
        taps: the signals to return.
        spec: ``describe(model)``, if it is at hand.
        stop_early: run no further than the deepest tap. It is done by an exception: leave it off
            where the forward is compiled or sharded.

    Raises:
        UserError: a tap that this model does not have.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Collection[Tap],
        spec: ViTSpec | None = None,
        *,
        stop_early: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.taps = frozenset(taps)
        self.spec = spec or describe(model)
        self._signals: dict[Tap, Tensor] = {}
        self._listening = False  # the hooks are deaf while the model runs on its own
        self._recorder = AttentionRecorder() if any(t.kind == "attention" for t in self.taps) else None
        for tap in sorted(self.taps, key=str):
            self._check(tap)
        deepest = max((tap.block for tap in self.taps if tap.block is not None), default=None)
        self._last = deepest if stop_early and all(t.kind in _OF_A_BLOCK for t in self.taps) else None
        for index, block in enumerate(self.spec.blocks):
            self._tap(index, block)

    def forward(self, images: Tensor) -> dict[Tap, Tensor]:
        """Signals of images ``[B, C, H, W]`` that are normalised as the model takes them."""
        self._signals.clear()
        self._listening = True
        try:
            if self._recorder is None:
                self._run(images)
            else:
                with self._recorder:
                    self._run(images)
        finally:
            self._listening = False
        signals = dict(self._signals)
        self._signals.clear()
        return signals

    def __deepcopy__(self, memo: dict[int, Any]) -> TappedViT:
        # Our hooks speak to this object only: in the copied model they are deaf, and it gets its own.
        model = copy.deepcopy(self.model, memo)
        twin = TappedViT(model, self.taps, self.spec, stop_early=self._last is not None)
        memo[id(self)] = twin
        twin.training = self.training
        return twin

    def _run(self, images: Tensor) -> None:
        signals, model = self._signals, self.model
        try:
            final: Tensor = model.forward_features(images)  # type: ignore[operator]
        except _DeepEnough:
            return
        if {FINAL, FINAL_PREFIX} & self.taps:
            spec = self.spec
            prefix = spec.num_prefix_tokens if final.ndim == 3 else 0
            before, patches = split_tokens(final, spec.final_grid, prefix, spec.channels_last)
            signals |= {tap: x for tap, x in ((FINAL, patches), (FINAL_PREFIX, before)) if tap in self.taps}
        if EMBEDDING in self.taps:
            signals[EMBEDDING] = model.forward_head(final, pre_logits=True)  # type: ignore[operator]
        if DISTILL_LOGITS in self.taps:
            both = self._of_both_heads(final)
            signals |= {
                tap: x for tap, x in zip((LOGITS, DISTILL_LOGITS), both, strict=True) if tap in self.taps
            }
        elif LOGITS in self.taps:
            signals[LOGITS] = model.forward_head(final)  # type: ignore[operator]

    def _of_both_heads(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and distillation logits apart; on its own timm's model returns their mean."""
        model, training = self.model, self.model.training
        model.set_distilled_training(True)  # type: ignore[operator]
        model.training = True  # the flag alone: its parts stay in their mode
        try:
            ours, distilled = model.forward_head(final)  # type: ignore[operator]
        finally:
            model.training = training
            model.set_distilled_training(False)  # type: ignore[operator]
        return ours, distilled

    def _check(self, tap: Tap) -> None:
        spec = self.spec
        if tap.kind not in (*_OF_A_BLOCK, "logits", "distill_logits", "embedding", "final", "final_prefix"):
            raise UserError(f"there is no tap called {tap}", "see docs/concepts.md for the taps")
        if tap.kind == "distill_logits" and not spec.distilled:
            raise UserError(
                f"{spec.name} has no distillation head", "a distilled student has one: deit_tiny_distilled"
            )
        if tap.kind == "final_prefix" and not spec.num_prefix_tokens:
            raise UserError(
                f"{tap}: {spec.name} has no prefix tokens", 'compare patch tokens: tokens="patch"'
            )
        if tap.kind == "embedding" and not spec.embed_dim:
            raise UserError(f"{spec.name} has no head to read an embedding before")
        if tap.kind not in _OF_A_BLOCK:
            return
        if tap.block is None or not 0 <= tap.block < spec.depth:
            raise UserError(f"{tap}: {spec.name} has blocks 0 to {spec.depth - 1}")
        block = spec.blocks[tap.block]
        if tap.kind == "attention_output" and block.attention_output is None:
            raise UserError(
                f"{tap}: block {tap.block} of {spec.name} runs attention and MLP in parallel",
                'its output has no MHA-out; use at="ffn"',
            )
        if tap.kind == "prefix" and not block.num_prefix_tokens:
            raise UserError(f"{tap}: block {tap.block} of {spec.name} carries no prefix tokens")

    def _tap(self, index: int, block: BlockSpec) -> None:
        module = self.model.get_submodule(block.path)
        feature, prefix, attention = (Tap(kind, index) for kind in ("features", "prefix", "attention"))
        if attention in self.taps:
            self._tap_attention(attention, module)
        middle = Tap("attention_output", index)
        if middle in self.taps and block.attention_output is not None:
            self._tap_input(middle, block)
        if feature in self.taps or prefix in self.taps or index == self._last:

            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                if not self._listening:
                    return
                tokens = output[0] if isinstance(output, (tuple, list)) else output
                before, patches = split_tokens(
                    tokens, block.grid, block.num_prefix_tokens, self.spec.channels_last
                )
                if feature in self.taps:
                    self._signals[feature] = patches
                if prefix in self.taps:
                    self._signals[prefix] = before
                if index == self._last:
                    raise _DeepEnough

            module.register_forward_hook(keep)

    def _tap_input(self, tap: Tap, block: BlockSpec) -> None:
        def keep(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if not self._listening:
                return
            _, self._signals[tap] = split_tokens(
                args[0], block.grid, block.num_prefix_tokens, self.spec.channels_last
            )

        self.model.get_submodule(block.attention_output or "").register_forward_pre_hook(keep)

    def _tap_attention(self, tap: Tap, module: nn.Module) -> None:
        recorder = self._recorder
        assert recorder is not None

        def begin(_module: nn.Module, _args: Any) -> None:
            recorder.maps.clear()
            recorder.recording = self._listening

        def end(_module: nn.Module, _args: Any, _output: Any) -> None:
            recorder.recording = False
            if not self._listening:
                return
            if not recorder.maps:
                raise UserError(f"{tap}: {self.spec.name} computes no attention map in this block")
            self._signals[tap] = recorder.maps[0]
            recorder.maps.clear()

        def used(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if self._listening:
                recorder.maps.append(args[0])

        module.register_forward_pre_hook(begin)
        for name, child in module.named_modules():
            if name.rpartition(".")[2] == "attn_drop":
                child.register_forward_pre_hook(used)
        module.register_forward_hook(end)


class _DeepEnough(Exception):
    """The deepest tap has been read."""
