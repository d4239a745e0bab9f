"""Named signals out of one ordinary forward of a vision transformer."""

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vitkd_cli.errors import UserError
from vitkd_cli.vit.attention import AttentionRecorder, beside_checkpoints, used_map, with_heads
from vitkd_cli.vit.layout import in_rows, split_tokens
from vitkd_cli.vit.spec import BlockSpec, ViTSpec, describe


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

    ``block`` counts from 0 and is never negative here; ``view`` is 1 for the same signal of the second view
    that a term may ask for (:meth:`Term.view`).
    """

    kind: str
    block: int | None = None
    view: int = 0

    def __str__(self) -> str:
        name = self.kind if self.block is None else f"{self.kind}({self.block})"
        return f"{name}'" if self.view else name


LOGITS = Tap("logits")
DISTILL_LOGITS = Tap("distill_logits")
EMBEDDING = Tap("embedding")
FINAL = Tap("final")
FINAL_PREFIX = Tap("final_prefix")

_OF_A_BLOCK = ("features", "prefix", "attention_output", "attention", "qkv")


def features(block: int) -> Tap:
    """The tap of a block's output, FFN-out."""
    return Tap("features", block)


class TappedViT(nn.Module):
    """A model whose forward returns its named signals instead of its logits alone.

    The final tokens, the logits and the embedding come from the model's own ``forward_features`` and
    ``forward_head``, so the logits are ``model(images)`` to the bit; block signals are read by hooks on the
    blocks. Tap before ``torch.compile``: hooks that are added later are ignored.

    Args:
        model: any timm vision transformer; it is wrapped, not copied.
        taps: the signals to return.
        spec: ``describe(model)``, if it is known.
        stop_early: run no further than the deepest tap. An exception does it: leave it off where the
            forward is sharded, and :func:`cut` the model where it is compiled.
        on_signal: called with every signal as it comes; then none is kept, and the forward returns nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: Collection[Tap],
        spec: ViTSpec | None = None,
        *,
        stop_early: bool = False,
        on_signal: Callable[[Tap, Tensor], None] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.taps = frozenset(taps)
        self.spec = spec or describe(model)
        self._signals: dict[Tap, Tensor] = {}
        self._on_signal = on_signal
        self._listening = False  # hooks do nothing while the model runs on its own
        self._hooks: list[RemovableHandle] = []
        self._fused: list[nn.Module] = []  # whose attention was not, until it was tapped
        kinds = {tap.kind for tap in self.taps}
        self._recorder = None
        if kinds & {"attention", "qkv"}:
            self._recorder = AttentionRecorder(maps="attention" in kinds, qkv="qkv" in kinds)
        for tap in sorted(self.taps, key=str):
            check_tap(tap, self.spec)
        self._last = _deepest(self.taps) if stop_early else None
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

    def release(self) -> nn.Module:
        """Give the model back as it was, without hooks; this object reads no signal of a block any more."""
        while self._hooks:
            self._hooks.pop().remove()
        while self._fused:
            self._fused.pop().fused_attn = False  # type: ignore[assignment]
        return self.model

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # The copied hooks still write to this object, which is not listening; the copy gets its own.
        model = copy.deepcopy(self.model, memo)
        twin = type(self)(
            model, self.taps, self.spec, stop_early=self._last is not None, on_signal=self._on_signal
        )
        memo[id(self)] = twin
        twin.training = self.training
        return twin

    def _run(self, images: Tensor) -> None:
        model = self.model
        try:
            final: Tensor = model.forward_features(images)  # type: ignore[operator]
        except _DeepEnough:
            return
        if {FINAL, FINAL_PREFIX} & self.taps:
            spec = self.spec
            before, patches = split_tokens(final, spec.final)
            self._keep(FINAL, patches)
            self._keep(FINAL_PREFIX, before)
        if EMBEDDING in self.taps:
            self._keep(EMBEDDING, model.forward_head(final, pre_logits=True))  # type: ignore[operator]
        if DISTILL_LOGITS in self.taps:
            for tap, logits in zip((LOGITS, DISTILL_LOGITS), self._of_both_heads(final), strict=True):
                self._keep(tap, logits)
        elif LOGITS in self.taps:
            self._keep(LOGITS, model.forward_head(final))  # type: ignore[operator]

    def _keep(self, tap: Tap, signal: Tensor) -> None:
        if tap not in self.taps:
            return
        if self._on_signal is None:
            self._signals[tap] = signal
        else:
            self._on_signal(tap, signal)

    def _of_both_heads(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits and distillation logits; timm's model returns their mean."""
        model, training = self.model, self.model.training
        model.set_distilled_training(True)  # type: ignore[operator]
        model.training = True  # this flag alone: its children keep their mode
        try:
            ours, distilled = model.forward_head(final)  # type: ignore[operator]
        finally:
            model.training = training
            model.set_distilled_training(False)  # type: ignore[operator]
        return ours, distilled

    def _tap(self, index: int, block: BlockSpec) -> None:
        feature, prefix, middle, attention, qkv = (
            Tap(kind, index) for kind in ("features", "prefix", "attention_output", "attention", "qkv")
        )
        if {attention, qkv} & self.taps:
            self._tap_attention(attention, qkv, block)
        if middle in self.taps and block.attention_output is not None and block.middle is not None:
            layout = block.middle

            def keep_middle(_module: nn.Module, args: tuple[Any, ...]) -> None:
                if self._listening:
                    with beside_checkpoints():
                        _, tokens = split_tokens(in_rows(self.model, args[0], layout, index), layout)
                    self._keep(middle, tokens)

            attended = self.model.get_submodule(block.attention_output)
            self._hooks.append(attended.register_forward_pre_hook(keep_middle))
        if feature in self.taps or prefix in self.taps or index == self._last:

            def keep(_module: nn.Module, _args: Any, output: Any) -> None:
                if not self._listening:
                    return
                with beside_checkpoints():
                    tokens = in_rows(self.model, output, block.layout, index)
                    before, patches = split_tokens(tokens, block.layout)
                self._keep(feature, patches)
                self._keep(prefix, before)
                if index == self._last:
                    raise _DeepEnough

            self._hooks.append(self.model.get_submodule(block.path).register_forward_hook(keep))

    def _tap_attention(self, tap: Tap, qkv: Tap, block: BlockSpec) -> None:
        recorder = self._recorder
        assert recorder is not None and tap.block is not None
        index = tap.block

        def read(module: nn.Module) -> None:
            if tap in self.taps:
                used = used_map(recorder.maps, block.heads, module)
                self._keep(tap, in_rows(self.model, used, block.layout, index, dims=(-2, -1)))
            if qkv in self.taps:
                [parts] = recorder.qkv
                same = torch.stack([with_heads(part, block.heads) for part in parts])
                self._keep(qkv, in_rows(self.model, same, block.layout, index, dims=(-2,)))

        attention: Any = self.model.get_submodule(block.attention or block.path)
        if qkv in self.taps and getattr(attention, "fused_attn", None) is False:
            attention.fused_attn = True  # queries and keys are read off the fused call
            self._fused.append(attention)
        self._hooks += recorder.listen(attention, read, lambda: self._listening)


def _deepest(taps: Collection[Tap]) -> int | None:
    """The last block that a forward has to run; None where it has to run to its end."""
    blocks = [tap.block for tap in taps if tap.block is not None and tap.kind in _OF_A_BLOCK]
    return max(blocks) if blocks and len(blocks) == len(taps) else None


def cut(model: nn.Module, taps: Collection[Tap], spec: ViTSpec) -> nn.Module:
    """A copy of a model, on the same weights, whose blocks behind the deepest tap pass their input through.

    Returns:
        The model itself where a tap needs all of it, or where it does not run without these blocks, as where
        blocks change the width of their tokens.
    """
    last = _deepest(taps)
    if last in (None, spec.depth - 1):
        return model
    tensors = [*model.parameters(), *model.buffers()]
    short = copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    for block in spec.blocks[last + 1 :]:
        short.set_submodule(block.path, _Through())
    like = next(model.parameters())
    blank = torch.zeros(1, len(spec.mean), *spec.input_size, dtype=like.dtype, device=like.device)
    try:
        with torch.no_grad():
            short.forward_features(blank)  # type: ignore[operator]
    except Exception:
        return model
    return short


class _Through(nn.Module):
    """The identity, with any further arguments."""

    def forward(self, tokens: Any, *_args: Any, **_options: Any) -> Any:
        return tokens


def check_tap(tap: Tap, spec: ViTSpec) -> None:
    """Refuse a tap that a model does not have."""
    if tap.kind not in (*_OF_A_BLOCK, "logits", "distill_logits", "embedding", "final", "final_prefix"):
        raise UserError(f"there is no tap called {tap}", "see docs/concepts.md for the taps")
    if tap.kind == "distill_logits" and not spec.distilled:
        raise UserError(
            f"{spec.name} has no distillation head", "a distilled student has one: deit_tiny_distilled"
        )
    if tap.kind == "final" and spec.final_grid == (0, 0):
        raise UserError(
            f"{spec.name} does not end in one sequence of patch tokens", 'read its last block: norm="raw"'
        )
    if tap.kind == "final_prefix" and not spec.num_prefix_tokens:
        raise UserError(f"{tap}: {spec.name} has no prefix tokens", 'compare patch tokens: tokens="patch"')
    if tap.kind in ("logits", "embedding") and not spec.embed_dim:
        raise UserError(
            f"{spec.name} has no head to read {tap} from", "compare patch tokens: mimic, generate"
        )
    if tap.kind not in _OF_A_BLOCK:
        return
    if tap.block is None or not 0 <= tap.block < spec.depth:
        raise UserError(f"{tap}: {spec.name} has blocks 0 to {spec.depth - 1}")
    block = spec.blocks[tap.block]
    here = f"{tap}: block {tap.block} of {spec.name}"
    if tap.kind == "attention_output" and block.attention_output is None:
        raise UserError(
            f"{here} runs attention and MLP in parallel", 'its output has no MHA-out; use at="ffn"'
        )
    if tap.kind == "prefix" and not block.num_prefix_tokens:
        raise UserError(f"{here} carries no prefix tokens", 'compare patch tokens: tokens="patch"')
    if tap.kind == "attention" and block.maps == "none":
        raise UserError(
            f"{here} has no attention map of its tokens: it attends over channels, linearly, or among "
            "pooled tokens",
            "compare block outputs instead, with mimic or generate",
        )
    if tap.kind == "qkv" and not block.qkv:
        raise UserError(
            f"{here} does not attend by one fused call over its tokens, so its queries, keys and values "
            "cannot be read",
            "compare block outputs instead, with mimic or generate",
        )


class _DeepEnough(Exception):
    """The deepest tap has been read."""
