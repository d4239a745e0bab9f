"""No function outgrows a screen, no signature a line, and a name means one thing in the package."""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vitkd_cli"
LINES, PARAMETERS = 80, 8


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
    assert not {name for name, function in functions() if length(function) > LINES}


def test_signatures_fit_a_line():
    """Whatever needs more takes an object."""
    assert not {name for name, function in functions() if width(function) > PARAMETERS}


def test_a_public_name_is_defined_once():
    where = defaultdict(set)
    for file, tree in modules().items():
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                where[node.name].add(file)
    assert not {name: files for name, files in where.items() if len(files) > 1}
