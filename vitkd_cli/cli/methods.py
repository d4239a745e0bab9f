"""``vitkd methods``: what may stand in a formula."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from vitkd_cli.cli.flags import AsJson, command_of, waking
from vitkd_cli.inspection.counted import STUDENT, TEACHER, shipped_methods
from vitkd_cli.options import Option, Request


@dataclass(frozen=True)
class MethodsRequest(Request):
    """Which method to explain, and for which pair."""

    # fmt: off
    name: Annotated[str | None, Option("A term or a macro. Unset: a table of all.", argument=True)] = None
    teacher: Annotated[str, Option("The pair that the cost is for; no weights are read.")] = TEACHER
    student: Annotated[str, Option("Likewise.")] = STUDENT
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
    rows, schedules = _rows(request)
    if shown.as_json:
        print(json.dumps(rows if request.name is None else rows[0]))
    elif request.name is None:
        _print_all(rows, schedules)
    else:
        _print_one(rows[0])


def _rows(request: MethodsRequest) -> tuple[list[dict[str, Any]], Sequence[Sequence[str]]]:
    """The words that are asked for and the schedules: from the table if it has them, else counted now."""
    from vitkd_cli.vit.zoo import installed_timm

    usual = (request.teacher, request.student, request.plugin) == (TEACHER, STUDENT, None)
    if usual and (table := shipped_methods()) and request.name in (None, *table["rows"]):
        if table["timm"] == installed_timm():
            rows = table["rows"]
            return [rows[name] for name in ([request.name] if request.name else rows)], table["schedules"]
        said = f"timm {installed_timm()} is installed, and the table was counted with {table['timm']}"
        print(f"note: {said}: counting again", file=sys.stderr)
    with waking():
        from vitkd_cli.inspection import methods
        from vitkd_cli.objective import words
        from vitkd_cli.terms import load_plugins

    load_plugins(request.plugin)
    with waking(what="counting what each costs"):
        names = words() if request.name is None else [request.name]
        rows = methods.rows(names, request.teacher, request.student)
    return list(rows.values()), methods.schedules()


def _print_all(rows: list[dict[str, Any]], schedules: Sequence[Sequence[str]]) -> None:
    from vitkd_cli.options import literal
    from vitkd_cli.terminal import Terminal

    console = Terminal()
    cells = []
    for row in rows:
        weight = "" if row["weight"] is None else literal(row["weight"])
        cells.append((row["name"], ", ".join(row["needs"]), weight, _cost(row), row["summary"]))
    console.table(("word", "needs", "weight", "cost", "what it is"), cells, "terms and macros")
    console.print("")
    console.table(("factor", "what it is"), schedules, "weights over time")
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
