"""No function outgrows a screen, no signature a line, and a name means one thing in the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vitkd_cli"
LINES, PARAMETERS = 80, 8

# Those that are still larger. Only take names out.
TOO_LONG = {
    "cli/inspect_attention.py: _inspect_attention",
    "data/folders.py: image_folder",
    "inspection/run.py: inspect_attention",
    "training/run.py: _one",
    "training/run.py: _run",
    "training/run.py: distill",
    "training/trainer.py: train",
    "vit/spec.py: describe",
}
TOO_WIDE = {
    "data/datasets.py: open_data",
    "data/keyed.py: __init__",
    "data/keyed.py: stream_loader",
    "data/transforms.py: train_view",
    "inspection/run.py: inspect_attention",
    "training/run.py: _one",
    "training/run.py: _run",
    "training/run.py: distill",
    "training/trainer.py: values",
}
# Public names that two files define.
TWICE = {"Cost", "Found", "Shown", "add_to", "heads_of", "markdown"}


@cache
def modules() -> dict[str, ast.Module]:
    """File, from the package's root → its syntax."""
    return {str(file.relative_to(PACKAGE)): ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")}


def functions() -> Iterator[tuple[str, ast.FunctionDef]]:
    for file, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                yield f"{file}: {node.name}", node


def length(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


def width(function: ast.FunctionDef) -> int:
    given = function.args
    known = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, [given.vararg, given.kwarg])]
    return sum(parameter.arg not in ("self", "cls") for parameter in known)


def test_functions_fit_a_screen():
    assert {name for name, function in functions() if length(function) > LINES} <= TOO_LONG


def test_signatures_fit_a_line():
    """Whatever needs more takes an object; a term's options are declared in its signature, and count."""
    assert {name for name, function in functions() if width(function) > PARAMETERS} <= TOO_WIDE


def test_a_public_name_is_defined_once():
    where = defaultdict(set)
    for file, tree in modules().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                where[node.name].add(file)
    assert {name: files for name, files in where.items() if len(files) > 1}.keys() <= TWICE
