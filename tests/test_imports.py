"""A file imports only from rooms below its own; the bottom floor knows no terminal; help needs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vitkd_cli

PACKAGE = Path(vitkd_cli.__file__).parent
ROOMS = [
    "cli",
    "report",
    "training",
    "export",
    "inspection",
    "evaluation",
    "data",
    "terminal",
    "objective",
    "terms",
    "vit",
    "recipe",
    "device",
    "files",
    "text",
    "errors",
]  # from the roof to the ground
GROUND_FLOOR = ROOMS[ROOMS.index("objective") :]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem in ROOMS)


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    own = ROOMS.index(room(path))
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "vitkd_cli" and parts[1] in ROOMS:
            assert ROOMS.index(parts[1]) >= own, f"{path.name} imports {name} from above"
        if room(path) in GROUND_FLOOR:
            assert parts[0] not in ("rich", "typer", "accelerate"), f"{path.name} imports {name}"
            assert not name.startswith("torch.distributed"), f"{path.name} imports {name}"


def test_every_room_is_on_the_list():
    rooms = {room(path) for path in PACKAGE.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms == set(ROOMS)


@pytest.mark.parametrize(
    ("command", "shown"),
    [("distill --help", "--teacher"), ("models deit", "deit_tiny"), ("recipes --json", '"finetune"')],
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
