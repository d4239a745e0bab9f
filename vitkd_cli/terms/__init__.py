"""The terms of an objective, one file a method: a new file here is a new method.

A term never touches a model. It sizes itself by two :class:`ViTSpec`, names the pairs of taps it
compares, and is handed the tensors.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import ClassVar, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError, expanded
from vitkd_cli.vit.layout import resample
from vitkd_cli.vit.pairing import Blocks, block_index, pair_blocks
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import FINAL, FINAL_PREFIX, Tap


def _alone(tensor: Tensor) -> Tensor:
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
    gather: Callable[[Tensor], Tensor] = _alone

    def rand(self, size: int, columns: int) -> Tensor:
        """Uniform noise ``[size, columns]`` on the CPU, for the ``size`` images at hand.

        It is drawn for the global batch and cut to our rows, so that the number of processes
        and of accumulation steps changes no mask.
        """
        if self.rows is None:
            return torch.rand(size, columns, generator=self.generator)
        return torch.rand(self.global_size, columns, generator=self.generator)[self.rows]


def sent(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on a device that is not waited for: its queue is full of forwards."""
    if device.type != "cuda" or drawn.is_cuda:
        return drawn.to(device)
    return drawn.pin_memory().to(device, non_blocking=True)


class Term(nn.Module):
    """One summand of the objective.

    Subclasses take ``(student, teacher, *, options with defaults)``, set ``compares`` and
    return one scalar from ``forward``. Options, their defaults and help are read off the
    constructor's signature; annotate them ``Annotated[type, "help"]``.

    Attributes:
        compares: pairs ``(student's tap, teacher's tap or None)``; a tap names its block from 0.
        weight: the paper's, where it gives one, for people to read; a formula without a weight means 1.
        uses_labels, uses_teacher, reads_teacher_logits: what a formula with this term needs, known
            before any model is.
        asks_second_view: the student also runs on :meth:`view`; its taps with ``view=1`` are read there.
        warnings: what a user should know of these options with these models; usually nothing.
    """

    weight: ClassVar[float | None] = None
    uses_labels: ClassVar[bool] = False
    uses_teacher: ClassVar[bool] = True
    reads_teacher_logits: ClassVar[bool] = False
    asks_second_view: bool = False
    compares: list[tuple[Tap, Tap | None]]
    warnings: tuple[str, ...] = ()

    def forward(self, pairs: list[tuple[Tensor, Tensor | None]], batch: Batch) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Term:
        """Move or cast; buffers in float64 stay so, for their author has chosen it."""
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
    """Register a term under the word that stands for it in a formula.

    Raises:
        UserError: another module's term has that name. The same one's may be written anew, as in a notebook.
    """

    def register(cls: AnyTerm) -> AnyTerm:
        owner = _registry.get(name, cls).__module__
        if owner != cls.__module__:
            raise UserError(f"the name of the term '{name}' is taken by {owner}", "give it another name")
        _registry[name] = cls
        return cls

    return register


def registered_terms() -> dict[str, type[Term]]:
    """Every term by name: this package's, those of installed packages, those of plugins loaded so far.

    Raises:
        UserError: an installed package's term cannot be imported.
    """
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
    """Run Python files that register terms; one that was run before is run anew.

    Args:
        trusted: whoever sits here has named them; a recipe or a run that was read has not.
        tell: is told the path and SHA-256 of each before it runs.

    Raises:
        UserError: a file is missing, is not trusted, adds no term, adds one whose name is taken, or fails;
            its author's traceback is part of the message.
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
            trace = trace.tb_next  # whoever wrote it needs their own lines, not ours
        text = "".join(traceback.format_exception(type(problem), problem, trace)).strip()
        raise UserError(f"{what} cannot be imported\n{text}", "mend it where its traceback ends") from None


# What feature terms share -----------------------------------------------------------------------------

At = Literal["ffn", "mha"]
Which = Literal["patch", "class"]
Norm = Literal["auto", "raw", "final"]
Reduce = Literal["sum", "mean"]
TargetNorm = Literal["none", "layer"]
ALIGN_HELP = "A linear layer where the widths are equal too, as the paper's text has it."
AT_HELP = "Read a block's output (ffn), or the residual stream after its attention (mha)."
WHICH_HELP = "Compare the patch tokens or the class token."
NORM_HELP = "Read the last block after the final norm (auto), never (raw), or nothing else (final)."
REDUCE_HELP = "Sum over tokens and channels, mean over images (sum); or a plain mean (mean)."
TARGET_NORM_HELP = "Leave the teacher's tokens as they are (none) or standardise each one (layer)."


class Tokens(NamedTuple):
    """Where a feature term reads one model: tokens ``[B, rows * columns, dim]``; a class token is 1 × 1."""

    tap: Tap
    dim: int
    grid: tuple[int, int]


class Site(NamedTuple):
    """A pair of places that a feature term compares."""

    student: Tokens
    teacher: Tokens

    @property
    def taps(self) -> tuple[Tap, Tap]:
        return self.student.tap, self.teacher.tap

    def align(self, always: bool = False) -> nn.Module:
        """A linear layer between both widths; nothing where they are equal, unless asked."""
        ours, theirs = self.student.dim, self.teacher.dim
        return nn.Linear(ours, theirs) if always or ours != theirs else nn.Identity()

    def target(self, teacher: Tensor, norm: TargetNorm = "none") -> Tensor:
        """The teacher's tokens ``[B, N_t, D]`` on the student's grid ``[B, N, D]``, standardised if asked."""
        teacher = resample(teacher, self.teacher.grid, self.student.grid)
        return layer_normed(teacher) if norm == "layer" else teacher


def sites_of(
    student: ViTSpec,
    teacher: ViTSpec,
    blocks: Blocks | int,
    method: str,
    *,
    at: At = "ffn",
    norm: Norm = "auto",
    tokens: Which = "patch",
) -> list[Site]:
    """Where a feature term compares the two models, a site a pair of blocks.

    Raises:
        UserError: a block, or a token in it, that one of the models does not have.
    """
    return [
        Site(
            tokens_of(student, ours, method, at=at, norm=norm, tokens=tokens),
            tokens_of(teacher, theirs, method, at=at, norm=norm, tokens=tokens),
        )
        for ours, theirs in pair_blocks(blocks, student, teacher, method)
    ]


def tokens_of(
    vit: ViTSpec, block: int, method: str, *, at: At = "ffn", norm: Norm = "auto", tokens: Which = "patch"
) -> Tokens:
    """The tokens of a block, counted from 0 or, if negative, from this model's end.

    One rule for every feature term: the last block is read after the final norm and every other one raw,
    unless ``norm`` says otherwise; an attention output is always raw.

    Raises:
        UserError: there is no such block; ``norm="final"`` is asked of one but the last; the class token
            is asked of a block that carries none.
    """
    block = block_index(block, vit, method)
    ends_here = vit.num_prefix_tokens if tokens == "class" else vit.final_grid != (0, 0)
    normed = bool(ends_here) and block == vit.depth - 1 and norm != "raw" and at == "ffn"
    if norm == "final" and not normed:
        raise UserError(
            f'{method}: norm="final" is defined for the last block\'s output only, and block {block} of '
            f"{vit.name} is not its last ({vit.depth - 1})",
            'norm="auto" reads the last block after the final norm and every other block raw',
        )
    spec = vit.blocks[block]
    if tokens == "class":
        if at == "mha":
            raise UserError(
                f'{method}: at="mha" reads patch tokens, not the class token', 'tokens="patch", or at="ffn"'
            )
        if not vit.class_token or not (normed or spec.num_prefix_tokens):
            raise UserError(f"{method}: block {block} of {vit.name} carries no class token", 'tokens="patch"')
        tap, dim = (FINAL_PREFIX, vit.final_dim) if normed else (Tap("prefix", block), spec.dim)
        return Tokens(tap, dim, (1, 1))
    if normed:
        return Tokens(FINAL, vit.final_dim, vit.final_grid)
    # not taps.features(): the term of that name is a module of this package, and would take its place here
    if at == "mha":
        return Tokens(Tap("attention_output", block), spec.attention_dim, spec.grid)
    return Tokens(Tap("features", block), spec.dim, spec.grid)


def summed(squares: Iterable[Tensor], reduce: Reduce) -> Tensor:
    """Squares ``[B, ...]``, a tensor a block: summed, mean over images; or the mean of their plain means."""
    if reduce == "mean":
        return torch.stack([each.mean() for each in squares]).mean()
    return torch.stack([each.sum() / len(each) for each in squares]).sum()


def class_token(tokens: Tensor) -> Tensor:
    """The class token ``[B, 1, D]`` of prefix tokens ``[B, P, D]``."""
    return tokens[:, :1]


def layer_normed(tokens: Tensor) -> Tensor:
    """Each token standardised over its channels, without weights."""
    # 1e-6 is what the norms of timm's vision transformers use
    return nn.functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
