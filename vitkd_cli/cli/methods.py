"""``vitkd methods``: what may stand in a formula."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from typing import Annotated, Any

import typer

from vitkd_cli.cli.flags import waking
from vitkd_cli.errors import UserError

_TEACHER, _STUDENT = "deit3_small", "deit_tiny_distilled"  # every term fits these two


def _methods(
    name: Annotated[str | None, typer.Argument(help="A term or a macro. Unset: a table of all.", show_default=False)] = None,
    teacher: Annotated[str, typer.Option(help="The pair that the cost is for; no weights are read.")] = _TEACHER,
    student: Annotated[str, typer.Option(help="Likewise.")] = _STUDENT,
    plugin: Annotated[str | None, typer.Option(help="Python files that add terms, comma-separated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:  # fmt: skip
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

    load_plugins(plugin)
    methods = [method(word) for word in (words() if name is None else [name])]
    with waking(what="counting what each costs"):
        pair = blank(student, "student"), blank(teacher, "teacher")
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
    if as_json:
        print(json.dumps(rows if name is None else rows[0]))
    elif name is None:
        _print_all(rows)
    else:
        _print_one(rows[0])


def _print_all(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from vitkd_cli.objective import SCHEDULES
    from vitkd_cli.options import literal
    from vitkd_cli.terminal import Terminal

    console = Terminal()
    table = Table("word", "needs", "weight", "cost", "what it is", box=None, title="terms and macros")
    for row in rows:
        weight = "" if row["weight"] is None else literal(row["weight"])
        table.add_row(row["name"], ", ".join(row["needs"]), weight, _cost(row), row["summary"])
    schedules = Table("factor", "what it is", box=None, title="weights over time")
    for name, schedule in SCHEDULES.items():
        _, *numbers = inspect.signature(schedule).parameters
        schedules.add_row(f"{name}({', '.join(numbers)})", inspect.getdoc(schedule))
    console.print(table, "", schedules, "")
    console.print(
        f"weight: the paper's. cost: parameters of its own and operations for an image, with "
        f"{rows[0]['teacher']} → {rows[0]['student']}. Equation and options: vitkd methods NAME",
    )


def _print_one(row: dict[str, Any]) -> None:
    from rich.table import Table

    from vitkd_cli.options import literal
    from vitkd_cli.terminal import Terminal

    console = Terminal()
    console.print(row["name"], style="bold")
    equation = "\n".join(f"    {line}" for line in row["equation"].splitlines())
    formula = f"It stands for: {row['formula']}" if row["formula"] else ""
    for text in (row["summary"], formula, equation, row["symbols"], *row["details"]):
        if text:
            console.print(text, "", sep="\n")
    options = Table("option", "default", "what it is", box=None)
    for option in row["options"]:
        options.add_row(option["name"], option["default"], option["help"])
    if row["options"]:
        console.print(options, "")
    facts = Table.grid(padding=(0, 2))
    facts.add_row("needs", ", ".join(row["needs"]) or "the student alone")
    if row["weight"] is not None:
        facts.add_row("weight", f"{literal(row['weight'])} in its paper")
    facts.add_row("cost", f"{_cost(row)}, with {row['teacher']} → {row['student']}")
    facts.add_row("file", row["file"])
    console.print(facts)


def _cost(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"does not fit: {row['problem']}"
    if not row["parameters"] + row["flops"]:
        return "next to nothing"
    return f"{row['parameters'] / 1e6:.2f} M parameters, {row['flops'] / 1e6:.1f} MFLOPs"


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    app.command("methods")(_methods)
