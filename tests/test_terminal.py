"""What is printed: text as it is, sentences wrapped at words, paths whole."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import vitkd_cli
from vitkd_cli.terminal import Fitted, Terminal

PATH = "runs/" + "a-long-name-of-a-run-with-hyphens/" * 4 + "student"


def terminal(width: int = 80, tty: bool = True) -> tuple[Terminal, io.StringIO]:
    file = io.StringIO()
    return Terminal(file=file, width=width, force_terminal=tty, color_system=None), file


@pytest.mark.parametrize("tty", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("text", ["runs/[draft]/x", "[/]", ":smile:", "[bold]cat[/bold]", "a\\[b]"])
def test_square_brackets_and_codes_are_printed_as_they_are(text, tty):
    console, file = terminal(tty=tty)
    console.say(text)
    console.print(text)
    table = Table(text, title=text, box=None)
    table.add_row(text)
    console.print(table)
    assert file.getvalue().count(text) == 5


def test_control_characters_never_reach_the_terminal():
    console, file = terminal()
    console.say("cat\x1b[31m\ndog")
    table = Table("class", box=None)
    table.add_row("\x1b]0;title\x07")
    console.print(table)
    assert "\x1b" not in file.getvalue() and "\x07" not in file.getvalue()
    assert r"cat\x1b[31m\ndog" in file.getvalue()


def test_sentences_wrap_at_words_and_paths_do_not():
    console, file = terminal(width=40)
    console.say(f"student  the weights of the student that the recipe selects are in {PATH}, all of them")
    lines = file.getvalue().splitlines()
    assert [line for line in lines if PATH in line] and len(lines) > 3
    assert all(len(line) <= 40 for line in lines if PATH not in line)
    assert all(line.startswith(" " * 9) for line in lines[1:])  # below what the label is about
    piped, file = terminal(width=40, tty=False)
    piped.say(f"one line {PATH} " + "in a pipe " * 20)
    assert len(file.getvalue().splitlines()) == 1


def test_nothing_else_opens_a_console():
    for path in Path(vitkd_cli.__file__).parent.rglob("*.py"):
        if path.name != "terminal.py":
            assert not re.search(r"\bConsole\(", path.read_text()), path


ROWS = [(f"vit_model_number_{n}", "224", "12, 24", "best 85.73", "yes") for n in range(5)]
TITLES = ("name", "pixels", "blocks", "weights, top-1", "ONNX")


@pytest.mark.parametrize(("width", "gone"), [(80, []), (55, ["ONNX"]), (50, ["ONNX", "blocks"])])
def test_a_table_drops_columns_and_folds_no_cell(width, gone):
    console, file = terminal(width)
    console.print(Fitted(TITLES, ROWS, spare=("ONNX", "blocks", "pixels")))
    lines = file.getvalue().splitlines()
    assert len(lines) == 6 + bool(gone) and max(map(len, lines)) <= width
    assert all(row[0] in line and row[3] in line for row, line in zip(ROWS, lines[1:6], strict=True))
    assert not gone or lines[-1] == f"too narrow for: {', '.join(gone)}"


def test_a_table_that_fits_is_rich_s():
    rows = [*ROWS, ("学生", "\x1b[31m", "1", "", "[no]")]
    console, file = terminal(100)
    table = Table(title="models", box=None, header_style="bold")
    for title in TITLES:
        table.add_column(title)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    wanted = file.getvalue()
    file.seek(file.truncate(0))
    console.print(Fitted(TITLES, rows, title="models"))
    assert [line.rstrip() for line in file.getvalue().split("\n")] == [
        line.rstrip() for line in wanted.split("\n")
    ]


def test_a_table_without_columns_to_spare_turns():
    console, file = terminal(57)
    console.print(Fitted(TITLES, ROWS[:2], title="teachers"))
    lines = [line.split() for line in file.getvalue().splitlines()]
    assert lines[1] == ["name", ROWS[0][0], ROWS[1][0]]
    assert lines[5] == ["ONNX", "yes", "yes"]


def test_the_tables_of_commands_fit_80_columns(monkeypatch, cli):
    monkeypatch.setattr(Terminal, "is_terminal", property(lambda self: True))
    monkeypatch.setattr(Terminal, "width", 80, raising=False)
    code, out, err = cli("models", "deit3")
    assert code == 0, err
    rows = [line for line in out.splitlines() if line.strip().startswith("deit3")]
    assert len(rows) > 5 and all(len(line) <= 80 and "…" not in line for line in rows)
