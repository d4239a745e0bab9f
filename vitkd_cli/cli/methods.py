"""``vitkd methods``: what may stand in a formula."""

import inspect
import json
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from vitkd_cli.cli.flags import AsJson, command_of, waking
from vitkd_cli.errors import UserError
from vitkd_cli.options import Option, Request

_TEACHER, _STUDENT = "deit3_small", "deit_tiny_distilled"  # every term fits these two


@dataclass(frozen=True)
class MethodsRequest(Request):
    """Which method to explain, and for which pair."""

    # fmt: off
    name: Annotated[str | None, Option("A term or a macro. Unset: a table of all.", argument=True)] = None
    teacher: Annotated[str, Option("The pair that the cost is for; no weights are read.")] = _TEACHER
    student: Annotated[str, Option("Likewise.")] = _STUDENT
    plugin: Annotated[str | None, Option("Python files that add terms, comma-separated.")] = None
    # fmt: on


def _methods(request: MethodsRequest, shown: AsJson) -> None:
    """What may stand in a formula: every term and macro, what it needs, what it costs, what it is.

    With a NAME: its equation, its options and its paper.

    - `vitkd methods`

    - `vitkd methods mimic`

    - `vitkd methods --teacher vit_base --student deit_tiny`

    - `vitkd methods transfer --plugin transfer.py`

    In a formula: `vitkd distill --loss "labels + 3e-5*mimic(blocks=(0, 1)) + kd*cosine(1, 0)"`.
    """
    with waking():
        from vitkd_cli.inspection.methods import blank, cost, method, needs
        from vitkd_cli.objective import words
        from vitkd_cli.terms import load_plugins

    load_plugins(request.plugin)
    name = request.name
    methods = [method(word) for word in (words() if name is None else [name])]
    with waking(what="counting what each costs"):
        pair = blank(request.student, "student"), blank(request.teacher, "teacher")
        fitting = blank(_STUDENT, "student").spec, blank(_TEACHER, "teacher").spec
        rows: list[dict[str, Any]] = []
        for each in methods:
            row = asdict(each) | {"needs": needs(each.name, *fitting)}
            row |= {"student": pair[0].spec.name, "teacher": pair[1].spec.name}
            try:
                row["parameters"], row["flops"] = cost(each.name, *pair)
            except UserError as problem:
                row["problem"] = problem.message
            rows.append(row)
    if shown.as_json:
        print(json.dumps(rows if name is None else rows[0]))
    elif name is None:
        _print_all(rows)
    else:
        _print_one(rows[0])


def _print_all(rows: list[dict[str, Any]]) -> None:
    from vitkd_cli.objective import SCHEDULES
    from vitkd_cli.options import literal
    from vitkd_cli.terminal import Terminal

    console = Terminal()
    cells = []
    for row in rows:
        weight = "" if row["weight"] is None else literal(row["weight"])
        cells.append((row["name"], ", ".join(row["needs"]), weight, _cost(row), row["summary"]))
    console.table(("word", "needs", "weight", "cost", "what it is"), cells, "terms and macros")
    factors = []
    for name, schedule in SCHEDULES.items():
        _, *numbers = inspect.signature(schedule).parameters
        factors.append((f"{name}({', '.join(numbers)})", inspect.getdoc(schedule) or ""))
    console.print("")
    console.table(("factor", "what it is"), factors, "weights over time")
    console.print(
        f"\nweight: the paper's. cost: parameters of its own and operations for an image, with "
        f"{rows[0]['teacher']} → {rows[0]['student']}. Equation and options: vitkd methods NAME",
    )


def _print_one(row: dict[str, Any]) -> None:
    from vitkd_cli.options import literal
    from vitkd_cli.terminal import Terminal

    console = Terminal()
    console.print(row["name"], style="bold")
    equation = "\n".join(f"    {line}" for line in row["equation"].splitlines())
    formula = f"It stands for: {row['formula']}" if row["formula"] else ""
    for text in (row["summary"], formula, equation, row["symbols"], *row["details"]):
        if text:
            console.print(text, "", sep="\n")
    if row["options"]:
        options = [(option["name"], option["default"], option["help"]) for option in row["options"]]
        console.table(("option", "default", "what it is"), options)
        console.print("")
    weight = {"weight": f"{literal(row['weight'])} in its paper"} if row["weight"] is not None else {}
    console.facts(
        {
            "needs": ", ".join(row["needs"]) or "the student alone",
            **weight,
            "cost": f"{_cost(row)}, with {row['teacher']} → {row['student']}",
            "file": row["file"],
        }
    )


def _cost(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"does not fit: {row['problem']}"
    if not row["parameters"] + row["flops"]:
        return "next to nothing"
    return f"{row['parameters'] / 1e6:.2f} M parameters, {row['flops'] / 1e6:.1f} MFLOPs"


command = command_of("methods", _methods, MethodsRequest, AsJson)
