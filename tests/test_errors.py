"""The one exception that a user may see."""

from __future__ import annotations

import importlib

import pytest

from vitkd_cli.errors import UserError, expanded

command = importlib.import_module("vitkd_cli.cli.main")  # the package's `main` is the function


def test_what_is_wrong_and_what_to_do():
    error = UserError("there is no term 'nkdd'", "did you mean nkd?")
    assert (error.message, error.hint, error.exit_code) == ("there is no term 'nkdd'", "did you mean nkd?", 2)
    assert str(error) == "there is no term 'nkdd' (did you mean nkd?)"
    assert str(UserError("disk full", exit_code=3)) == "disk full"


@pytest.mark.parametrize("exit_code", [2, 3])
def test_the_command_prints_both_lines_and_leaves_with_its_code(monkeypatch, capsys, exit_code):
    message = "no folder [bold]/data/a folder[/bold] " + "of a long name " * 20  # neither markup nor wrapped

    def fail(**_: object) -> None:
        raise UserError(message, "name one that is there", exit_code)

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr("sys.argv", ["vitkd"])
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        command.main()
    assert stop.value.code == exit_code
    out, err = capsys.readouterr()
    assert not out
    assert [line.strip() for line in err.splitlines()] == [
        f"error: {message}".strip(),
        "hint: name one that is there",
    ]


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch):
    def fail(**_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(command, "app", fail)
    monkeypatch.setattr("sys.argv", ["vitkd"])
    with pytest.raises(ZeroDivisionError):
        command.main()


@pytest.mark.parametrize("path", ["x" * 5000, "~nobody-of-that-name/x"])
def test_a_path_that_no_system_has_is_a_mistake(path):
    with pytest.raises(UserError, match="cannot look at"):
        expanded(path)
