"""What is minimised: a formula such as ``labels + 3e-5*mimic(blocks=(0,1)) + nkd(gamma=1)``, and its value.

A formula is a sum of terms, each with an optional weight and options. No term is implied. A weight is a
number times schedules that change it over the run: ``0.5*kd*cosine(1, 0)``; or it is estimated, so that the
term has a share of the student's gradient: ``mimic(balance=0.1)``. Python's own grammar reads the formula
(``ast``); nothing in it is evaluated.
"""

import ast
import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from vitkd_cli.balance import Balance
from vitkd_cli.errors import UserError
from vitkd_cli.options import Field, Option, declared, literal, read_literal
from vitkd_cli.terms import Batch, Term, registered_terms
from vitkd_cli.terms.bases import At, Norm, Reduce, TargetNorm
from vitkd_cli.terms.generate import Generate, Mask
from vitkd_cli.terms.mimic import Mimic
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.taps import DISTILL_LOGITS, EMBEDDING, LOGITS, Tap

# Shares of the student's gradient. In docs/study.md terms of features above the first cost accuracy; below
# the second the student was hardly better than alone.
_DROWNS, _DROWNED = 0.9, 0.01
EXAMPLE = 'an example: "labels + 3e-5*mimic(blocks=(0,1)) + nkd(gamma=1)"'
SCHEDULE_EXAMPLES = "as in kd*cosine(1, 0), kd*linear(1, 0.5), kd*warmup(epochs=5), kd*until(epoch=100)"


# Weights -----------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """A point of a run: epochs done, and the share of its updates, 0 at the first and 1 at the last."""

    epoch: float
    progress: float


@dataclass(frozen=True)
class Clock:
    """The length of a run, by default a single update."""

    updates: int = 1
    updates_per_epoch: int = 1

    def at(self, update: int) -> Moment:
        """The moment of the update that follows ``update`` others."""
        progress = update / max(self.updates - 1, 1)
        return Moment(update / self.updates_per_epoch, min(progress, 1.0))


def cosine(now: Moment, start: float, end: float) -> float:
    """From start to end over the whole run, along half a cosine."""
    return end + (start - end) * (1 + math.cos(math.pi * now.progress)) / 2


def linear(now: Moment, start: float, end: float) -> float:
    """From start to end over the whole run, along a line."""
    return start + (end - start) * now.progress


def warmup(now: Moment, epochs: float) -> float:
    """From 0 to 1 over the first epochs, along a line; 1 from there on."""
    return min(now.epoch / epochs, 1.0)


def until(now: Moment, epoch: float) -> float:
    """1 before an epoch, 0 from it on; epochs count from 0."""
    return float(now.epoch < epoch)


def since(now: Moment, epoch: float) -> float:
    """0 before an epoch, 1 from it on; epochs count from 0."""
    return float(now.epoch >= epoch)


# A schedule is a function from a moment and its numbers to a factor. This is the whole list.
SCHEDULES: dict[str, Callable[..., float]] = {
    schedule.__name__: schedule for schedule in (cosine, linear, warmup, until, since)
}


@dataclass(frozen=True)
class Schedule:
    """A factor that changes over the run, as a formula writes it: ``warmup(epochs=5)``."""

    name: str
    numbers: tuple[tuple[str, float], ...]

    def at(self, now: Moment) -> float:
        return SCHEDULES[self.name](now, **dict(self.numbers))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{key}={literal(value)}' for key, value in self.numbers)})"


@dataclass(frozen=True)
class Weight:
    """A number, times the schedules that change it over the run.

    Attributes:
        balance: in place of the number, the share of the student's gradient that the term is to have;
            schedules change the share.
    """

    number: float = 1.0
    schedules: tuple[Schedule, ...] = ()
    balance: float | None = None

    def __mul__(self, other: Self) -> Self:
        schedules = sorted(self.schedules + other.schedules, key=str)  # their order is no difference
        return replace(self, number=self.number * other.number, schedules=tuple(schedules))

    @property
    def moves(self) -> bool:
        """Is it another one from update to update?"""
        return bool(self.schedules) or self.balance is not None

    def at(self, now: Moment) -> float:
        """The weight; of a balanced term, the share."""
        start = self.number if self.balance is None else self.balance
        return math.prod((schedule.at(now) for schedule in self.schedules), start=start)

    def __str__(self) -> str:
        if self.balance is not None:
            return f"share {replace(self, number=self.balance, balance=None)}"
        number = [] if self.number == 1 and self.schedules else [literal(self.number)]
        return "*".join([*number, *map(str, self.schedules)])


# The formula -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summand:
    """One term of a formula: its weight, its name, and every option it has, defaults filled in.

    ``written`` are the options that the formula names itself.
    """

    weight: Weight
    name: str
    options: tuple[tuple[str, Any], ...] = ()
    written: tuple[str, ...] = field(default=(), compare=False)

    def __str__(self) -> str:
        known = declared(registered_terms()[self.name], self.name)
        chosen = {name: value for name, value in self.options if value != known[name].default}
        if self.weight.balance is not None:
            chosen[_BALANCE] = self.weight.balance
        inside = ", ".join(f"{name}={literal(value)}" for name, value in chosen.items())
        factor = replace(self.weight, balance=None)
        weight = "" if factor == Weight() else f"{factor}*"
        return weight + self.name + (f"({inside})" if inside else "")


@dataclass(frozen=True)
class Formula:
    """A sum of terms. ``str()`` is its canonical form: macros written out, defaults left out."""

    summands: tuple[Summand, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.summands)).replace("+ -", "- ")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(summand.name for summand in self.summands)

    @property
    def uses_labels(self) -> bool:
        return any(registered_terms()[name].uses_labels for name in self.names)

    @property
    def uses_teacher(self) -> bool:
        return any(registered_terms()[name].uses_teacher for name in self.names)

    @property
    def reads_teacher_logits(self) -> bool:
        return any(registered_terms()[name].reads_teacher_logits for name in self.names)


def every_term(
    *,
    balance: Annotated[
        float | None,
        Option(
            "Share of the student's gradient that the weight is to give the term, in place of a number.",
            above=0,
            below=1,
        ),
    ] = None,
) -> None:
    """What every term takes beside its own options: it is the weight's, and no term knows its weight."""


_BALANCE = "balance"


def vitkd(
    *,
    alpha: Annotated[float, "α: weight of mimic."] = Mimic.weight,
    beta: Annotated[float, "β: weight of generate."] = Generate.weight,
    mask: Mask = 0.5,
    reduce: Reduce = "sum",
    target_norm: TargetNorm = "none",
    norm: Norm = "auto",
    at: At = "ffn",
    balance: Annotated[
        float | None,
        Option(
            "Share of the student's gradient that both terms together are to have, half of it each, in place "
            "of α and β.",
            above=0,
            below=1,
        ),
    ] = None,
) -> str:
    """ViTKD (Yang et al. 2022, arXiv:2209.02432): mimic blocks 0 and 1, generate the last one."""
    shared = f'reduce="{reduce}", target_norm="{target_norm}", norm="{norm}", at="{at}"'
    if balance is not None:
        if (alpha, beta) != (Mimic.weight, Generate.weight):
            raise UserError(
                "vitkd: alpha and beta are weights, which balance estimates",
                "leave balance out, or alpha and beta; mimic(balance=0.02) + generate(balance=0.08) has two "
                "shares",
            )
        alpha = beta = 1.0
        shared += f", balance={balance / 2!r}"
    return f"{alpha!r}*mimic(blocks=(0, 1), {shared}) + {beta!r}*generate(block=-1, mask={mask!r}, {shared})"


# A macro is a function from options to a formula. This is the whole list.
MACROS: dict[str, Callable[..., str]] = {"vitkd": vitkd}


def words() -> dict[str, Callable[..., Any]]:
    """Every term and macro by its word."""
    terms = registered_terms()
    for name in terms.keys() & {*MACROS, *SCHEDULES}:
        raise UserError(
            f"the term '{name}' of {terms[name].__module__} has a name that formulas use already",
            "give it another name",
        )
    return {**terms, **MACROS}


def parse(formula: str) -> Formula:
    """Read a formula; builds nothing.

    Args:
        formula: sums of terms and macros, products by numbers and schedules on either side,
            parentheses, and options by name. Values are numbers, strings, tuples, ``true``,
            ``false``, ``none``.
    """
    words()  # refuses a term that is called like a schedule or a macro
    formula = " ".join(formula.split())
    if not formula:
        raise UserError("the objective is empty", EXAMPLE)
    try:
        summands = tuple(_summands(ast.parse(formula, mode="eval").body, Weight()))
    except SyntaxError as error:
        place = f"at character {error.offset}" if error.offset else "at its end"
        message = f'the objective "{_shortened(formula)}" cannot be read: {error.msg} {place}'
        raise UserError(message, EXAMPLE) from None
    except (ValueError, OverflowError, RecursionError, MemoryError):  # absurdly long numbers, deep nesting
        raise UserError(f'the objective "{_shortened(formula)}" cannot be read', EXAMPLE) from None

    seen: set[tuple[str, Any]] = set()
    for summand in summands:
        if (summand.name, summand.options) in seen:
            raise UserError(
                f"the objective has {replace(summand, weight=Weight())} twice",
                "write it once with the sum of both weights",
            )
        seen.add((summand.name, summand.options))
    balanced = [summand.weight.balance is not None for summand in summands]
    if any(balanced) and all(one or s.weight.number == 0 for one, s in zip(balanced, summands, strict=True)):
        raise UserError(
            f'the objective "{_shortened(formula)}" has no term to balance the others against',
            "give one a weight of its own, as in labels + mimic(balance=0.1)",
        )
    return Formula(summands)


def _shortened(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:99]}…"


def _summands(node: ast.expr, weight: Weight) -> Iterable[Summand]:
    """The terms below ``node``, each times ``weight``."""
    if _weight(node) is not None:
        raise UserError(f"{ast.unparse(node)} is a weight, not a term", "multiply it with one: 0.5*labels")
    match node:
        case ast.BinOp(left, ast.Add(), right):
            yield from _summands(left, weight)
            yield from _summands(right, weight)
        case ast.BinOp(left, ast.Sub(), right):
            yield from _summands(left, weight)
            yield from _summands(right, weight * Weight(-1.0))
        case ast.BinOp(left, ast.Mult(), right) if (factor := _weight(left)) is not None:
            yield from _summands(right, weight * factor)
        case ast.BinOp(left, ast.Mult(), right) if (factor := _weight(right)) is not None:
            yield from _summands(left, weight * factor)
        case ast.BinOp(left, ast.Div(), right) if (number := _number(right)) is not None:
            if number == 0:
                raise UserError(f"the objective divides by zero: {ast.unparse(node)}", EXAMPLE)
            yield from _summands(left, replace(weight, number=weight.number / number))
        case ast.UnaryOp(ast.UAdd() | ast.USub() as sign, operand):
            yield from _summands(operand, weight * Weight(-1.0 if isinstance(sign, ast.USub) else 1.0))
        case ast.Name(name):
            yield from _named(name, [], weight)
        case ast.Call(ast.Name(name), [], keywords):
            yield from _named(name, keywords, weight)
        case ast.Call(ast.Name(name), [value, *_], _):
            option = next(iter(options_for(name)), "option")
            raise UserError(
                f"{ast.unparse(node)}: options are given by name",
                f"as in {name}({option}={ast.unparse(value)})",
            )
        case _:
            known = {*words(), *SCHEDULES}
            for inner in ast.walk(node) if isinstance(node, ast.BinOp) else ():
                match inner:
                    case ast.Call(ast.Name(name)) if name not in known:
                        raise UserError(f"no schedule is called '{name}'", _did_you_mean(name, SCHEDULES))
            raise UserError(f"{ast.unparse(node)} is neither a term nor a sum of terms", EXAMPLE)


def _weight(node: ast.expr) -> Weight | None:
    """A number, a schedule, or a product of such; None for anything else."""
    match node:
        case ast.Constant(int() | float() as value) if not isinstance(value, bool):
            return Weight(float(value))
        case ast.UnaryOp(ast.USub(), operand):
            weight = _weight(operand)
            return None if weight is None else Weight(-1.0) * weight
        case ast.BinOp(left, ast.Mult(), right):
            ours, theirs = _weight(left), _weight(right)
            return None if ours is None or theirs is None else ours * theirs
        case ast.Name(name) if name in SCHEDULES:
            return _schedule(node, name, [], [])
        case ast.Call(ast.Name(name), values, keywords) if name in SCHEDULES:
            return _schedule(node, name, values, keywords)
    return None


def _number(node: ast.expr) -> float | None:
    """The value of a number or of a product of numbers; None for anything else."""
    weight = _weight(node)
    return None if weight is None or weight.schedules else weight.number


def _schedule(node: ast.expr, name: str, values: list[ast.expr], keywords: list[ast.keyword]) -> Weight:
    """The schedule ``name`` with its numbers, by place or by name."""
    _, *wanted = inspect.signature(SCHEDULES[name]).parameters
    given = [*zip(wanted, values, strict=False), *((str(word.arg), word.value) for word in keywords)]
    if sorted(wanted) != sorted(key for key, _ in given) or len(given) != len(values) + len(keywords):
        raise UserError(f"{ast.unparse(node)}: {name} takes {' and '.join(wanted)}", SCHEDULE_EXAMPLES)
    numbers: dict[str, float] = {}
    for key, value in given:
        number = _number(value)
        # A sign belongs to the number in front, where it is seen and warned of.
        if number is None or not 0 <= number < math.inf or (key == "epochs" and number == 0):
            least = "above 0" if key == "epochs" else "from 0 on"
            raise UserError(f"{ast.unparse(node)}: {key} must be a number {least}", SCHEDULE_EXAMPLES)
        numbers[key] = number
    return Weight(1.0, (Schedule(name, tuple((key, numbers[key]) for key in wanted)),))


def options_for(name: str) -> Mapping[str, Field]:
    """The options of the term or macro ``name``."""
    known = words()
    if name not in known:
        raise UserError(f"no term is called '{name}'", _did_you_mean(name, known))
    own = declared(known[name], name)
    if name in MACROS:
        return own
    if _BALANCE in own:
        raise UserError(
            f"the term '{name}' has an option '{_BALANCE}', which every term has already",
            "give it another name",
        )
    return {**own, **declared(every_term, name)}


def _named(name: str, keywords: list[ast.keyword], weight: Weight) -> Iterable[Summand]:
    """The summand called ``name``, or those that the macro of that name stands for."""
    known = options_for(name)
    given: dict[str, Any] = {}
    for keyword in keywords:
        option = keyword.arg or "**"
        if option not in known:
            raise UserError(f"{name} has no option '{option}'", _did_you_mean(option, known))
        if option in given:
            raise UserError(f"{name} is given {option} twice", "leave one of them out")
        given[option] = _checked(known[option], keyword.value)
    if not math.isfinite(weight.number):
        raise UserError(f"the weight of {name} is {weight.number}", "weights are finite numbers")
    if name in MACROS:
        expansion = ast.parse(MACROS[name](**given), mode="eval").body
        yield from _summands(expansion, weight)
    else:
        share = given.pop(_BALANCE, None)
        if share is not None and weight.number != 1:
            raise UserError(
                f"{name} has the weight {literal(weight.number)} and {_BALANCE}={literal(share)}, which "
                "estimates its weight",
                "leave one of them out",
            )
        weight = replace(weight, balance=share)
        options = {o.name: o.default for o in known.values() if o.name != _BALANCE} | given
        yield Summand(weight, name, tuple(options.items()), tuple(given))


def _checked(option: Field, node: ast.expr) -> Any:
    """What ``node`` writes, in the option's type."""
    try:
        value = read_literal(node)
    except ValueError as wanted:
        raise UserError(
            f"{option.of}: {option.name} must be {wanted}, not {ast.unparse(node)}",
            option.cure(None),
        ) from None
    return option.check(value)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    known = list(known)
    listed = ", ".join(known) if known else "it has none"
    nearest = difflib.get_close_matches(word.lower(), known, n=1)
    return f"did you mean {nearest[0]}? There are: {listed}" if nearest else f"there are: {listed}"


# Its value ---------------------------------------------------------------------------------------------


class Objective(nn.Module):
    """The weighted sum of a formula's terms for one student and its teacher.

    Args:
        formula: the formula, or its text.
        student, teacher: facts about both models; no teacher is needed if no term uses one.
        clock: the length of the run, for weights that change over it.
        bf16: multiply bfloat16 in the terms' layers, which rounds what they put out by 0.4 % at most;
            differences, squares and all else stay in the precision of the signals.

    Attributes:
        terms: the terms by name: ``mimic``, and ``mimic_2`` for the second of that word.
        weights: the weight of each; :meth:`weights_at` has their values.
        student_taps, teacher_taps: the signals that :meth:`forward` wants.
        balance: estimates the weights of balanced terms; None if there are none.
        warnings: what a user should read before the run starts.
    """

    def __init__(
        self,
        formula: str | Formula,
        student: ViTSpec,
        teacher: ViTSpec | None,
        clock: Clock = Clock(),
        *,
        bf16: bool = False,
    ) -> None:
        super().__init__()
        self.formula = parse(formula) if isinstance(formula, str) else formula
        self.student, self.teacher, self.clock, self.bf16 = student, teacher, clock, bf16
        self.terms = nn.ModuleDict()
        self.weights: dict[str, Weight] = {}
        self.warnings: list[str] = []
        for summand in self.formula.summands:
            cls = registered_terms()[summand.name]
            if cls.uses_teacher and teacher is None:
                raise UserError(
                    f"{summand.name} compares with a teacher, and there is none", "--teacher NAME"
                )
            name = self._unused(summand.name)
            term = cls(student, teacher, **dict(summand.options))
            _check_logits(summand.name, term, student, teacher)
            self.terms[name] = term
            self.weights[name] = summand.weight
            self.warnings.extend(term.warnings)
            if not any(map(summand.weight.at, map(clock.at, range(clock.updates)))):
                self.warnings.append(f"{name} has weight 0: it is computed and logged, and has no effect")
            if summand.weight.number < 0:
                self.warnings.append(f"{name} has weight {summand.weight.number:g}: it is maximised")
        balanced = [name for name, weight in self.weights.items() if weight.balance is not None]
        _check_shares([self.weights[name] for name in balanced], clock)
        self.balance = Balance(balanced) if balanced else None
        pairs = [pair for _, term in self.named() for pair in term.compares]
        self.student_taps = frozenset(ours for ours, _ in pairs)
        self.teacher_taps = frozenset(theirs for _, theirs in pairs if theirs is not None)
        self.uses_labels = self.formula.uses_labels
        self.uses_teacher = bool(self.teacher_taps)
        whole = {LOGITS.kind, DISTILL_LOGITS.kind, EMBEDDING.kind}  # one vector per image, whatever its grid
        placed = any(tap.kind not in whole for tap in self.teacher_taps)
        if placed and teacher is not None and student.hierarchical != teacher.hierarchical:
            self.warnings.append(
                f"{student.name} and {teacher.name} are a flat and a hierarchical model: blocks pair by "
                "stride; kd is the safer choice across the two"
            )
        asking = [(index, name) for index, (name, t) in enumerate(self.named()) if t.asks_second_view]
        if len(asking) > 1:
            raise UserError(
                f"{' and '.join(name for _, name in asking)} both ask for a second view of the images",
                "keep one of them: each would cost another forward of the student",
            )
        self._asking = asking[0] if asking else None
        self.needs_teacher_logits = any(tap.kind == LOGITS.kind for tap in self.teacher_taps)

    def _unused(self, name: str) -> str:
        nth = 1 + sum(key == name or key.startswith(f"{name}_") for key in self.terms)
        return name if nth == 1 else f"{name}_{nth}"

    def named(self) -> Iterable[tuple[str, Term]]:
        """The terms with their names, in the formula's order."""
        return ((name, term) for name, term in self.terms.items() if isinstance(term, Term))

    def weights_at(self, update: int) -> dict[str, float]:
        """The weight of every term at the update that follows ``update`` others."""
        now = self.clock.at(update)
        weights = {name: weight.at(now) for name, weight in self.weights.items()}
        return weights | self.balance.weights(weights) if self.balance else weights

    def second_view(self, images: Tensor, batch: Batch) -> Tensor | None:
        """The second view that a term asks for, of images as the student sees them; None if none does."""
        if self._asking is None:
            return None
        index, name = self._asking
        term = self.terms[name]
        assert isinstance(term, Term)
        return term.view(images, replace(batch, generator=_own(batch.generator, index)))

    @property
    def can_be_lopsided(self) -> bool:
        """Has it labels and a teacher, at weights that stay?"""
        still = not any(weight.moves for weight in self.weights.values())
        return self.uses_labels and self.uses_teacher and still

    def lopsided(self, shares: Mapping[str, float]) -> str:
        """What a person should know of terms that drown the others, or drown among them; empty if none do.

        Args:
            shares: ``NAME/grad_share``, of the student's gradient.
        """
        if not self.can_be_lopsided:
            return ""
        taught = {name: term for name, term in self.named() if term.uses_teacher}
        features = [name for name, term in taught.items() if not term.reads_teacher_logits]
        share = sum(shares[f"{name}/grad_share"] for name in features)
        if share > _DROWNS:
            return (
                f"{share:.1%} of the student's gradient is that of {' and '.join(features)}, and the labels "
                'hardly count: target_norm="layer" or smaller weights leave them more (docs/objective.md)'
            )
        share = sum(shares[f"{name}/grad_share"] for name in taught)
        if share < _DROWNED:
            return (
                f"{share:.2%} of the student's gradient is the teacher's, who teaches next to nothing: "
                "larger weights or balance=0.3 give it more (docs/objective.md)"
            )
        return ""

    def forward(
        self, student: dict[Tap, Tensor], teacher: dict[Tap, Tensor], batch: Batch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The total, and every term by name before its weight.

        Args:
            student, teacher: the signals of ``student_taps`` and ``teacher_taps``, in any floating
                type: terms get at least float32, under autocast too.
            batch: ``batch.generator`` is seeded for this update; each term draws from its own,
                which follows from that seed and the term's place in the formula.

        Returns:
            ``(total, raw)``, scalars with gradient.
        """
        raw: dict[str, Tensor] = {}
        device = next(iter(student.values())).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            for index, (name, term) in enumerate(self.named()):
                pairs = [
                    _at_least_float32(student[s], None if t is None else teacher[t]) for s, t in term.compares
                ]
                raw[name] = term(pairs, replace(batch, generator=_own(batch.generator, index)))
            weights = self.weights_at(batch.update)
            total = torch.stack([weights[name] * loss for name, loss in raw.items()]).sum()
        return total, raw


def _check_shares(balanced: list[Weight], clock: Clock) -> None:
    """Refuse shares that leave nothing to the other terms at some time of the run."""
    updates = range(clock.updates if any(weight.schedules for weight in balanced) else 1)
    most = max((sum(weight.at(now) for weight in balanced) for now in map(clock.at, updates)), default=0)
    if most > 1 - 1e-6:  # shares such as 0.1, added up ten times, are a little below 1
        raise UserError(
            f"balanced terms are to have {most:g} of the student's gradient, and leave nothing to the others",
            "smaller shares, as in balance=0.1",
        )


def _check_logits(name: str, term: Term, student: ViTSpec, teacher: ViTSpec | None) -> None:
    """Refuse logits that are no class scores, or of other classes than the teacher's."""
    label_free = '--loss "labels + vitkd", which reads features only'
    for ours, theirs in term.compares:
        reads_logits = ours in (LOGITS, DISTILL_LOGITS)
        if reads_logits and student.num_classes == 0:
            raise UserError(
                f"{name} reads the student's logits, and {student.name} has no classes",
                '--num-classes K, or an objective without logits: --loss "vitkd"',
            )
        if theirs is None or teacher is None or theirs.kind != LOGITS.kind:
            continue
        if teacher.num_classes == 0:
            raise UserError(
                f"{name} reads the teacher's logits, and {teacher.name} has no classes",
                f"{label_free}, or --finetune-teacher N to train a head on it for N epochs first",
            )
        if reads_logits and teacher.num_classes != student.num_classes:
            raise UserError(
                f"{name} compares logits, and {teacher.name} has {teacher.num_classes} classes "
                f"where {student.name} has {student.num_classes}",
                f"--finetune-teacher N to train it on these classes for N epochs first, or {label_free}",
            )


def _at_least_float32(student: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A pair in the student's precision, float32 or finer; no gradient goes to the teacher."""
    dtype = torch.promote_types(student.dtype, torch.float32)
    return student.to(dtype), None if teacher is None else teacher.detach().to(dtype)


def _own(generator: torch.Generator | None, index: int) -> torch.Generator | None:
    """A generator for the term at ``index``, so that no term's draws depend on another's."""
    if generator is None:
        return None
    seed = (generator.initial_seed() * 1_000_003 + index * 7919 + 12345) % 2**63
    return torch.Generator().manual_seed(seed)
