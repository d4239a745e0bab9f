"""What is printed: text as it is, sentences wrapped at words, paths whole."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.table import Table

import vitkd_cli
from vitkd_cli.terminal import Terminal

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
