"""Find the transformer blocks of a model in one forward, without a table.

An attention event is a fused attention call or a product of two activations. Climbing from the module
that owns it, the first one with another child that is an MLP (two or more linear or convolutional
layers and no attention) is a transformer block. So is a module that attends itself, in a row of its own
kind (attention and MLP in parallel). What contains other blocks is no block but a stage.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {torch.matmul, torch.bmm, torch.einsum, Tensor.matmul, Tensor.bmm, Tensor.__matmul__}
SOFTMAX = {torch.softmax, Tensor.softmax, F.softmax}
_LAYERS = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Event:
    """An attention event, by its shapes.

    Attributes:
        kind: ``fused`` for a fused attention call, ``uneven`` for one whose q, k and v differ in
            shape, else ``product``.
        query: the shape of its first operand, ``[..., queries, width]``.
        scores: ``[..., queries, keys]``: of the product, or what a fused call computes inside.
        softmaxed: a softmax over the keys followed.
    """

    kind: str
    query: tuple[int, ...]
    scores: tuple[int, ...]
    softmaxed: bool = False


@dataclass
class Trace:
    """What one forward showed.

    Attributes:
        events: module path → its attention events, in order.
        inputs, outputs: module path → its first argument and its output, in order of completion.
        norm_before: module path → the norm beside it whose output it took.
    """

    events: dict[str, list[Event]] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    norm_before: dict[str, str] = field(default_factory=dict)

    def maps_of(self, path: str) -> list[Event]:
        """A module's events whose scores become a map: fused calls, and products before a softmax."""
        return [event for event in self.events[path] if event.kind != "product" or event.softmaxed]

    def softmax(self, owner: str, scores: tuple[int, ...]) -> None:
        """Mark the product whose scores these are: the owner's latest, or of a module around it."""
        for events in (self.events[path] for path in _and_above(owner) if path in self.events):
            for index in reversed(range(len(events))):
                if events[index].scores == scores:
                    events[index] = replace(events[index], softmaxed=True)
                    return

    @cached_property
    def attending(self) -> frozenset[str]:
        """Every module that attends, or that holds one which does."""
        return frozenset(above for owner in self.events for above in _and_above(owner))

    @cached_property
    def last_ran(self) -> dict[str, int]:
        """Module path → when it, or the last module inside it, ran."""
        return {above: index for index, path in enumerate(self.outputs) for above in _and_above(path)}


@contextmanager
def watch(modules: dict[str, nn.Module]) -> Iterator[Trace]:
    """Trace the forward that runs inside the block."""
    trace = Trace()
    running: list[str] = [""]
    recent: deque[tuple[str, Tensor]] = deque(maxlen=3)  # held, or their storage could be reused

    class Events(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            owner = running[-1]
            if func is F.scaled_dot_product_attention:
                query, key, value = args[:3]
                kind = "fused" if query.shape == key.shape == value.shape else "uneven"
                scores = (*query.shape[:-1], key.shape[-2])
                trace.events.setdefault(owner, []).append(Event(kind, tuple(query.shape), scores))
            elif is_product(func, args):
                first = next(a for a in args if isinstance(a, Tensor))
                event = Event("product", tuple(first.shape), tuple(out.shape))
                trace.events.setdefault(owner, []).append(event)
            elif func in SOFTMAX and (args[1:] or [(kwargs or {}).get("dim")])[0] in (-1, out.ndim - 1):
                trace.softmax(owner, tuple(out.shape))
            return out

    def enter(path: str) -> Callable[..., None]:
        siblings = path.rpartition(".")[0]

        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            running.append(path)
            taken = args[0] if args else None
            trace.inputs[path] = shape_of(taken)
            for other, output in recent:
                if other.rpartition(".")[0] == siblings and same_storage(taken, output):
                    trace.norm_before[path] = other

        return hook

    def leave(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            running.pop()
            trace.outputs.pop(path, None)
            trace.outputs[path] = shape_of(output)
            if isinstance(output, Tensor) and is_norm(module):
                recent.append((path, output))

        return hook

    handles: list[Any] = []
    for path, module in modules.items():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(leave(path)))
    try:
        with Events():
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def is_product(func: Any, args: Any) -> bool:
    """Whether it is a product of two activations, as in attention."""
    if func not in _PRODUCTS:
        return False
    tensors = [a for a in args if isinstance(a, Tensor)]
    return len(tensors) == 2 and all(t.ndim >= 3 and not isinstance(t, nn.Parameter) for t in tensors)


@dataclass(frozen=True)
class Block:
    """A transformer block: its path, the module in it that attends, and its MLP, where it has one."""

    path: str
    attention: str
    mlp: str | None


def transformer_blocks(modules: dict[str, nn.Module], trace: Trace) -> list[Block]:
    """The blocks of a model, in the order in which they ran."""
    found: dict[str, str] = {}
    for owner in trace.events:
        climbed = _climb(owner, modules, trace)
        if climbed is None and _is_one_of_many(owner, modules):
            climbed = owner
        if climbed is not None:
            found[climbed] = owner  # TNT attends twice: among pixels, then among patches
    inside = {path: [p for p in found if p.startswith(f"{path}.")] for path in found}
    # A block inside a block belongs to its attention; a module that holds several is a stage.
    stages = {path for path, blocks in inside.items() if len(blocks) > 1}
    nested = {p for path, blocks in inside.items() if path not in stages for p in blocks}
    kept = sorted(set(found) - stages - nested, key=trace.last_ran.__getitem__)
    return [Block(path, found[path], mlp_of(path, modules, trace)) for path in kept]


def _is_one_of_many(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether it is one of a row of its own kind, as blocks are that attend themselves."""
    row, _, place = path.rpartition(".")
    return place.isdigit() and {type(part) for part in modules[row].children()} == {type(modules[path])}


def _climb(owner: str, modules: dict[str, nn.Module], trace: Trace) -> str | None:
    path = owner
    while path:
        path = path.rpartition(".")[0]
        if path and path in trace.outputs and mlp_of(path, modules, trace) is not None:
            # In a row of blocks its neighbour is another block, not its MLP.
            return None if isinstance(modules[path], nn.Sequential) else path
    return None


def mlp_of(path: str, modules: dict[str, nn.Module], trace: Trace) -> str | None:
    """The last child of a module to run that is an MLP; the first of a list of parallel ones."""
    children = [f"{path}.{name}" for name, _ in modules[path].named_children()]
    mlps = [
        child
        for child in children
        if child in trace.last_ran
        and child not in trace.attending
        and sum(isinstance(layer, _LAYERS) for layer in modules[child].modules()) >= 2
    ]
    if not mlps:
        return None
    last = max(mlps, key=trace.last_ran.__getitem__)
    return f"{last}.0" if isinstance(modules[last], nn.ModuleList) else last


def widths_of(mlp: nn.Module) -> tuple[int, int]:
    """Widths of the tokens that an MLP takes and returns."""
    layers = [layer for layer in mlp.modules() if isinstance(layer, _LAYERS)]
    first, last = layers[0], layers[-1]
    return (
        first.in_features if isinstance(first, nn.Linear) else first.in_channels,
        last.out_features if isinstance(last, nn.Linear) else last.out_channels,
    )


def shape_of(output: Any) -> Any:
    """The shapes in an output, as ``torch.Size`` wherever there is a tensor."""
    if isinstance(output, (tuple, list)):
        return [shape_of(entry) for entry in output]
    return _Shape(tuple(output.shape)) if isinstance(output, Tensor) else None


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


def _and_above(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation: by its name, and it has no matrices."""
    return "norm" in type(module).__name__.lower() and all(p.ndim == 1 for p in module.parameters())


def same_storage(a: Any, b: Tensor) -> bool:
    """Whether they share their memory, whatever their shapes."""
    return isinstance(a, Tensor) and a.untyped_storage()._cdata == b.untyped_storage()._cdata
