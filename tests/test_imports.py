"""A file imports only from rooms below its own; the bottom floor knows no terminal; help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vitkd_cli

PACKAGE = Path(vitkd_cli.__file__).parent
ROOMS = [
    "cli",
    "report",
    "sweeps",
    "training",
    "export",
    "inspection",
    "evaluation",
    "session",
    "meeting",
    "processes",
    "progress",
    "data",
    "terminal",
    "objective",
    "balance",
    "terms",
    "vit",
    "recipe",
    "requests",
    "options",
    "device",
    "plots",
    "files",
    "world",
    "text",
    "errors",
]  # from the roof to the ground
GROUND_FLOOR = ROOMS[ROOMS.index("objective") :]
# What takes long to import and what most commands, or a run's first update, do without.
HEAVY = {"matplotlib", "scipy", "sklearn", "pandas", "pyarrow", "onnx", "onnxruntime"}
LIGHT = ("rich", "typer", "accelerate")


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(path: Path) -> set[str]:
    """What a file imports, at its top or in a function; of ours, the files."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else str(node.module) for name in whole}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_imports_point_downward():
    upward = []
    for path in FILES.values():
        if room(path) not in ROOMS:
            continue  # __init__ and __main__ are the front door
        own = ROOMS.index(room(path))
        for name in imported(path):
            parts = name.split(".")
            if parts[0] == "vitkd_cli" and len(parts) > 1 and ROOMS.index(parts[1]) < own:
                upward.append(f"{path.name} imports {name} from above")
            if room(path) in GROUND_FLOOR and (parts[0] in LIGHT or name.startswith("torch.distributed")):
                upward.append(f"{path.name} imports {name}, which the ground floor does not know")
    assert not upward


def test_what_takes_long_is_imported_where_it_is_used():
    early = set()
    for path in FILES.values():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                named = (
                    [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                )
                early |= {(path.name, name) for name in named if name.split(".")[0] in HEAVY}
    assert not early


def test_no_files_import_each_other_in_a_circle():
    ours = {module: imported(path) & FILES.keys() for module, path in FILES.items()}
    ours["vitkd_cli"] = set()  # loads what it names when it is asked for
    TopologicalSorter(ours).prepare()


def test_every_room_is_on_the_list():
    rooms = {room(path) for path in FILES.values()} - {"__init__", "__main__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("distill --help", "--teacher"),
        ("sweep --help", "--vary"),
        ("models deit", "deit_tiny"),
        ("methods", "mimic"),
        ("recipes --json", '"finetune"'),
    ],
)
def test_what_needs_no_torch_waits_for_none(command, shown):
    code = (
        f"import sys; sys.argv = ['vitkd', *{command.split()}]\n"
        "from vitkd_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'numpy', 'matplotlib', 'accelerate'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


def test_public_names_are_there():
    for name in vitkd_cli.__all__:
        assert getattr(vitkd_cli, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        vitkd_cli.nonsense  # noqa: B018  # the access is the test
