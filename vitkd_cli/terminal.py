"""The one way to a terminal: foreign text as it is, sentences wrapped at words, paths never."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.table import Table
from rich.text import Text

from vitkd_cli.text import plain


class Terminal(Console):
    """Rich's console, to which every string is text: no markup, no emoji codes, no control characters.

    In a pipe no sentence is wrapped, and a table has 200 columns.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        if not self.is_terminal:
            self.width = max(self.width, 200)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(plain, text.split("\n"))), **options)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a sentence or a line of facts; a word longer than the line, such as a path, stays whole."""
        text = plain(text)
        if self.is_terminal:
            label = re.match(r" *\w* {2,}", text)  # "student  …": what follows stays in its column
            text = textwrap.fill(
                text,
                self.width,
                subsequent_indent=" " * len(label[0] if label else ""),
                break_long_words=False,
                break_on_hyphens=False,
            )
        self.print(text, style=style, soft_wrap=True)

    def table(self, titles: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
        """Print a table whose cells may fold."""
        table = Table(*titles, title=title, box=None)
        for row in rows:
            table.add_row(*row)
        self.print(table)

    def facts(self, facts: Mapping[str, Any]) -> None:
        """Print one line per fact, its name first."""
        grid = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            grid.add_row(name, str(value))
        self.print(grid)


@dataclass(frozen=True)
class Fitted:
    """A table of facts that folds no cell: where it is too wide it drops columns, or turns.

    Attributes:
        spare: titles of columns that may go, the first first; a line says so. Without any, the table turns.
    """

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str | None = None
    spare: Sequence[str] = ()

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType | Segment]:
        columns = list(zip(self.titles, *self.rows, strict=True))
        gone = []
        for name in self.spare:
            if _width(columns) > options.max_width:
                columns = [column for column in columns if column[0] != name]
                gone.append(name)
        if not self.spare and _width(columns) > options.max_width:
            columns = list(zip(*columns, strict=True))
        if _width(columns) > options.max_width:
            table = Table(title=self.title, box=None, header_style="bold")
            for name, *_ in columns:
                table.add_column(name, overflow="fold")
            for row in list(zip(*columns, strict=True))[1:]:
                table.add_row(*row)
            yield table
        else:
            yield from self._lines(columns)
        if gone:
            yield Text(f"too narrow for: {', '.join(gone)}", style="dim")

    def _lines(self, columns: Sequence[Sequence[str]]) -> Iterator[Segment]:
        """The lines of Rich's table, which takes milliseconds for each."""
        bold, italic = Style(bold=True), Style(italic=True)
        padded = []
        for column in columns:
            cells = list(map(plain, column))
            width = max(map(cell_len, cells))
            padded.append([f" {cell}{' ' * (width - cell_len(cell))} " for cell in cells])
        head, *rows = map("".join, zip(*padded, strict=True))
        if self.title:
            title = plain(self.title)
            yield Segment(f"{' ' * ((cell_len(head) - cell_len(title)) // 2)}{title}\n", italic)
        yield Segment(f"{head}\n", bold)
        yield from (Segment(f"{row}\n") for row in rows)


def _width(columns: Sequence[Sequence[str]]) -> int:
    return sum(max(map(cell_len, column)) + 2 for column in columns)
