"""The terms of an objective, one file a method: a new file here is a new method.

A term never touches a model. It sizes itself by two :class:`ViTSpec`, names the pairs of taps it
compares, and is handed the tensors.
"""

import hashlib
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError, expanded
from vitkd_cli.options import declared
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import Tap


def _identity(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Batch:
    """What a term may know of the images beside their signals.

    Attributes:
        targets: ``[B]`` int64 classes, or ``[B, K]`` mixed labels that sum to 1, always
            unsmoothed; None where the images have no labels.
        update: optimizer updates done so far.
        rows: ``[B]`` this batch's rows of the global batch; None if it is the global batch.
        global_size: images of the global batch, over processes and accumulation.
        generator: the term's own source of randomness, on the CPU.
        mask: ``[B, N]``, 1 = masked, in place of a drawn one; for tests.
        gather: this process's ``[B, ...]`` → all processes' ``[B * processes, ...]``, with gradient; for
            terms that compare images with each other.
    """

    targets: Tensor | None = None
    update: int = 0
    rows: Tensor | None = None
    global_size: int = 0
    generator: torch.Generator | None = None
    mask: Tensor | None = None
    gather: Callable[[Tensor], Tensor] = _identity

    def rand(self, size: int, columns: int) -> Tensor:
        """Uniform noise ``[size, columns]`` on the CPU, for the ``size`` images at hand.

        It is drawn for the global batch and cut to our rows, so that the number of processes
        and of accumulation steps changes no mask.
        """
        if self.rows is None:
            return torch.rand(size, columns, generator=self.generator)
        return torch.rand(self.global_size, columns, generator=self.generator)[self.rows]


def to_device(drawn: Tensor, device: torch.device) -> Tensor:
    """Copy what was drawn on the CPU to a device, without waiting for the forwards that it is busy with."""
    if device.type != "cuda" or drawn.is_cuda:
        return drawn.to(device)
    return drawn.pin_memory().to(device, non_blocking=True)


def exactly(tokens: Tensor) -> torch.autocast:
    """A context in which nothing is rounded to bfloat16.

    For what a ReLU, a softmax or a difference of nearly equal products follows: rounding before a ReLU moves
    its zeros, and with them the gradient by 4 %, where a linear layer's is off by 0.3 %.
    """
    return torch.autocast(tokens.device.type, enabled=False)


class Term(nn.Module):
    """One summand of the objective.

    An option is declared in the class body: ``gamma: Annotated[float, "What it is."] = 1.0``, with an
    :class:`Option` in place of the text where it has a range. Subclasses set ``compares`` and return one
    scalar from ``forward``; those with layers make them in ``__init__(student, teacher, **options)``.
    Keyword-only arguments of a constructor, annotated likewise, are options too.

    Attributes:
        word: what the term is called in a formula; :func:`term` sets it.
        compares: pairs ``(student's tap, teacher's tap or None)``; a tap names its block from 0.
        weight: the paper's, where it gives one, for people to read; a formula without a weight means 1.
        uses_labels, uses_teacher, reads_teacher_logits: what a formula with this term needs, known
            before any model is.
        asks_second_view: the student also runs on :meth:`view`; its taps with ``view=1`` are read there.
        warnings: what a user should know of these options with these models; usually nothing.
    """

    word: ClassVar[str] = "term"
    weight: ClassVar[float | None] = None
    uses_labels: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = True
    reads_teacher_logits: ClassVar[bool] = False
    asks_second_view: bool = False
    compares: Sequence[tuple[Tap, Tap | None]]
    warnings: tuple[str, ...] = ()

    def __init__(
        self, student: ViTSpec | None = None, teacher: ViTSpec | None = None, **options: Any
    ) -> None:
        super().__init__()
        known = declared(type(self), self.word)
        for name, value in options.items():
            if name not in known:
                raise TypeError(f"{self.word} has no option '{name}'")
            setattr(self, name, known[name].check(value))

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast; buffers in float64 keep their type, which their author has chosen."""
        chosen = [
            (module._buffers, name, buffer)
            for module in self.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and buffer.dtype is torch.float64
        ]
        super()._apply(fn, recurse)
        for buffers, name, buffer in chosen:
            moved = buffers[name]
            if moved is not None and moved.device.type != "mps":  # which has no float64
                buffers[name] = buffer.to(moved.device)
        return self

    def view(self, images: Tensor, batch: Batch) -> Tensor:
        """The images ``[B, C, H, W]`` as the student sees them → a second view of them, same shape.

        ``batch.rand`` draws here what it draws first in :meth:`forward`.
        """
        raise NotImplementedError


AnyTerm = TypeVar("AnyTerm", bound=type[Term])
_registry: dict[str, type[Term]] = {}


def term(name: str) -> Callable[[AnyTerm], AnyTerm]:
    """Register a term under its word in a formula, which no other module may have taken."""

    def register(cls: AnyTerm) -> AnyTerm:
        owner = _registry.get(name, cls).__module__
        if owner != cls.__module__:
            raise UserError(f"the name of the term '{name}' is taken by {owner}", "give it another name")
        cls.word = name
        _registry[name] = cls
        return cls

    return register


def registered_terms() -> dict[str, type[Term]]:
    """Every term by name: this package's, those of installed packages, those of plugins loaded so far."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    _import_installed()
    return dict(sorted(_registry.items()))


@cache
def _import_installed() -> None:
    for point in entry_points(group="vitkd.terms"):
        with _their_code(f"the term '{point.name}' of an installed package ({point.value})"):
            point.load()


def plugin_files(plugin: str | None) -> list[Path]:
    """The files that a recipe's ``plugin`` lists, comma-separated."""
    return [expanded(file.strip()).resolve() for file in (plugin or "").split(",") if file.strip()]


def load_plugins(
    plugin: str | None, *, trusted: bool = True, tell: Callable[[str], None] = lambda line: None
) -> None:
    """Run Python files that register terms; a file that ran before runs again.

    Args:
        trusted: the user has named them; otherwise a recipe or a run did, and they are refused.
        tell: is told the path and SHA-256 of each before it runs.
    """
    registered_terms()  # first, so that a name that is taken is the plugin's mistake
    texts = {path: _read(path) for path in plugin_files(plugin)}
    shown = {path: f"{path} (SHA-256 {hashlib.sha256(text).hexdigest()})" for path, text in texts.items()}
    if texts and not trusted:
        raise UserError(
            f"this runs the code of a plugin that nobody here has named: {', '.join(shown.values())}",
            "read it; then --trust-plugin runs it, or --plugin FILE",
        )
    for path, text in texts.items():
        tell(f"plugin   {shown[path]}")
        module = ModuleType(re.sub(r"\W", "_", str(path)))
        module.__file__ = str(path)
        sys.modules[module.__name__] = module
        with _their_code(f"the plugin {path}"):
            exec(compile(text, path, "exec", dont_inherit=True), vars(module))
        if not any(cls.__module__ == module.__name__ for cls in _registry.values()):
            raise UserError(f"the plugin {path} adds no term", 'write @term("NAME") above a class of it')


def _read(plugin: Path) -> bytes:
    try:
        return plugin.read_bytes()
    except OSError as problem:
        raise UserError(
            f"there is no plugin {plugin}: {problem.strerror}", "--plugin takes Python files, comma-separated"
        ) from None


@contextmanager
def _their_code(what: str) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except Exception as problem:
        trace = problem.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next  # its author needs the lines of the plugin, not ours
        text = "".join(traceback.format_exception(type(problem), problem, trace)).strip()
        raise UserError(f"{what} cannot be imported\n{text}", "mend it where its traceback ends") from None
