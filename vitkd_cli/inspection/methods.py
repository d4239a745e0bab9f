"""What may stand in a formula: every term and macro, what it needs, what it costs, where it comes from."""

import inspect
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vitkd_cli.errors import UserError
from vitkd_cli.inspection.counted import STUDENT, TEACHER
from vitkd_cli.objective import MACROS, SCHEDULES, Objective, options_for, parse, words
from vitkd_cli.options import literal
from vitkd_cli.requests import Weights
from vitkd_cli.terms import Batch
from vitkd_cli.vit.build import build
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import resolve
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import DISTILL_LOGITS, Tap, TappedViT

_READ = {"logits": "teacher's logits", "attention": "attention maps", "qkv": "queries, keys and values"}


@dataclass(frozen=True)
class Method:
    """A term or a macro, read off its declaration and the docstrings of its file.

    Attributes:
        summary: one paragraph, with its paper.
        details: further paragraphs, on values and units.
        equation, symbols: those that a term's file opens with, if it does.
        formula: what a macro stands for; None for a term.
        weight: what a term's paper multiplies it with, if it says so.
        options: of each its name, its default as a formula writes it, and its help with its range.
        file: where it is written.
    """

    name: str
    summary: str
    details: tuple[str, ...]
    equation: str
    symbols: str
    formula: str | None
    weight: float | None
    options: tuple[dict[str, str], ...]
    file: str


def method(name: str) -> Method:
    """The term or macro of that name."""
    options = options_for(name).values()
    word, is_macro = words()[name], name in MACROS
    module = sys.modules[word.__module__]
    opening = "" if is_macro else (inspect.getdoc(module) or "")
    equation, _, below = opening.partition("\n\n    ")[2].partition("\n\n")
    about = (inspect.getdoc(word) or "").partition("\n\nRaises:")[0]
    summary, *details = _paragraphs(about) or [""]
    return Method(
        name,
        summary,
        tuple(details),
        inspect.cleandoc(f"    {equation}"),
        next(iter(_paragraphs(below)), ""),
        str(parse(name)) if is_macro else None,
        None if is_macro else word.weight,  # type: ignore[attr-defined]
        tuple(
            {
                "name": option.name,
                "default": literal(option.default),
                "help": f"{option.option.help} {option.range}".strip(),
            }
            for option in options
        ),
        str(module.__file__),
    )


def _paragraphs(text: str) -> list[str]:
    return [" ".join(paragraph.split()).replace("``", "`") for paragraph in text.split("\n\n") if paragraph]


@cache
def blank(name: str, role: str) -> Model:
    """A model without memory for its weights, by the name that a run would take."""
    with torch.device("meta"):
        return build(resolve(name, role=role), Weights(pretrained=False))


def needs(name: str, student: ViTSpec, teacher: ViTSpec) -> tuple[str, ...]:
    """What a term or macro reads besides the student's own signals, in words."""
    objective = Objective(name, student, teacher)
    found = ["labels"] if objective.uses_labels else []
    found += sorted({_READ.get(tap.kind, "teacher's features") for tap in objective.teacher_taps})
    if DISTILL_LOGITS in objective.student_taps:
        found.append("distilled student")
    if any(tap.view for tap in objective.student_taps):
        found.append("second view of the images")
    return tuple(found)


def cost(name: str, student: Model, teacher: Model) -> tuple[int, int]:
    """Parameters of a term's own layers, and floating-point operations of its forward per image.

    As torch counts them: products and convolutions, two per multiply-add; without the models' forwards.
    """
    objective = Objective(name, student.spec, teacher.spec)
    signals = [_noise(student, objective.student_taps), _noise(teacher, objective.teacher_taps)]
    batch = Batch(torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        objective(*signals, batch)
    return sum(p.numel() for p in objective.parameters()), counter.get_total_flops() // 2


def rows(names: Iterable[str], teacher: str, student: str) -> dict[str, dict[str, Any]]:
    """Each word as a :class:`Method`, with what it needs and what it costs for a pair."""
    methods = [method(name) for name in names]  # a word that there is not is refused before models are built
    pair = blank(student, "student"), blank(teacher, "teacher")
    fitting = blank(STUDENT, "student").spec, blank(TEACHER, "teacher").spec
    found: dict[str, dict[str, Any]] = {}
    for each in methods:
        row = found[each.name] = asdict(each) | {"needs": needs(each.name, *fitting)}
        row |= {"student": pair[0].spec.name, "teacher": pair[1].spec.name}
        try:
            row["parameters"], row["flops"] = cost(each.name, *pair)
        except UserError as problem:
            row["problem"] = problem.message
    return found


def schedules() -> list[tuple[str, str]]:
    """Each factor over time, as it is written, and what it is."""
    found = []
    for name, schedule in SCHEDULES.items():
        _, *numbers = inspect.signature(schedule).parameters
        found.append((f"{name}({', '.join(numbers)})", inspect.getdoc(schedule) or ""))
    return found


def _noise(vit: Model, taps: frozenset[Tap]) -> dict[Tap, Tensor]:
    """Noise of the shapes that a model's signals have for two images."""
    images = torch.zeros(2, len(vit.spec.mean), *vit.spec.input_size, device="meta")
    signals = TappedViT(vit.net.eval(), {replace(tap, view=0) for tap in taps}, vit.spec)(images)
    return {tap: torch.rand(signals[replace(tap, view=0)].shape) for tap in taps}
