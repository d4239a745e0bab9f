"""The front page: a line for each command, for which none of their files is read."""

from importlib import import_module
from typing import Any

import typer
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from vitkd_cli.terminal import Terminal

# Command → what its own help begins with.
COMMANDS = {
    "distill": "Train a small ViT with the help of a big one.",
    "sweep": "Train a student at many settings, and see which is best, beyond chance or not.",
    "report": "Tell of runs in one page that can be sent by mail: verdict, models, curves, mistakes, recipe.",
    "eval": "Score models on a labelled folder: each image once, with timm's own preprocessing.",
    "predict": "Name images, or embed them.",
    "inspect-attention": "Draw and count what a model looks at, alone or beside its student.",
    "export": "Write a model in a form that others load, and check it against the model itself.",
    "models": "List timm's vision transformers, and what can be read of each.",
    "methods": "What may stand in a formula: every term and macro, what it needs, what it costs, what it is.",
    "demo": "Distil a small ViT on built-in scans of handwritten digits: no network, no GPU, a few minutes.",
    "recipes": "List the recipes that come with vitkd, or print one.",
    "env": "Print what a bug report needs: versions, torch's build, devices, cores, memory. No path, no name of yours.",
}


def command_called(name: str) -> Any:
    """A command with its flags, read from its own file."""
    from vitkd_cli.cli.parsing import Command

    file = import_module(f"vitkd_cli.cli.{'evaluate' if name == 'eval' else name.replace('-', '_')}")
    alone = typer.Typer(rich_markup_mode="markdown", add_completion=False)
    alone.command(name, cls=Command)(file.command)
    return get_command(alone)


class Front(TyperGroup):
    """Knows every command by its line; the one that is called is read then."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {name: TyperCommand(name, help=line) for name, line in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, _, rest = super().resolve_command(ctx, args)
        return name, name and command_called(name), rest

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print what Typer would, without importing its Markdown, which takes longer than all the rest."""
        console = Terminal()
        console.width = console.width if console.is_terminal else 80
        for text, style in ((self.get_usage(ctx), "bold"), (self.help or "", "")):
            console.print(Padding(text, (1, 1, 0, 1)), style=style)
        console.print()
        options = [(", ".join(p.opts), getattr(p, "help", "")) for p in self.get_params(ctx)]
        for title, rows in (("Options", options), ("Commands", COMMANDS.items())):
            table = Table.grid(padding=(0, 2))
            table.add_column(style="bold cyan", no_wrap=True)
            for row in rows:
                table.add_row(*row)
            console.print(Panel(table, title=title, title_align="left", border_style="dim"))
