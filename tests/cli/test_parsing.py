"""What a command line may not say, and how it is told: two lines, with the command that would do."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from vitkd_cli.cli.front import COMMANDS, command_called
from vitkd_cli.cli.spelling import respell
from vitkd_cli.errors import UserError


def told(cli, *arguments: str) -> tuple[str, str]:
    """Error and hint of a command line that is refused."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, ""), (code, out, err)
    error, hint = err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ")
    return error[7:], hint[6:]


def test_a_flag_that_takes_one_value_is_refused_twice(cli):
    tried = 0
    for name in COMMANDS:
        command = command_called(name)
        for option in command.params:
            if option.param_type_name == "option" and not option.multiple:
                flag = option.opts[0]
                twice = [flag, flag] if option.is_flag else [flag, "1", f"{flag}=2"]
                with pytest.raises(UserError, match="is given 2 times"):
                    command.make_context(name, twice)
                tried += 1
    assert tried > 150
    assert "--batch-size/-b is given 3 times" in told(cli, "distill", *["-b", "8"] * 2, "--batch", "8")[0]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        ("distill --bogus", "has no flag --bogus", "--help-all lists them"),
        ("distill --epoch 3", "has no flag --epoch", "did you mean --epochs?"),
        ("eval --bogus", "has no flag --bogus", "vitkd eval --help lists them"),
        ("distil", "no such command 'distil'", "did you mean 'distill'?"),
        ("distill --lr abc", "--lr abc: ", "vitkd distill --help"),
        ("eval x -b 0", "--batch-size must be at least 1, not 0", "vitkd eval --help"),
        ("eval", "missing argument 'MODEL'", "vitkd eval --help"),
        ("export x", "missing option '--to'", "vitkd export --help"),
        ("export x y --to onnx", "takes 1 argument, not 'y' too", "vitkd export --help"),
        ("--bogus", "vitkd has no flag --bogus", "vitkd --help lists them"),
    ],
)
def test_what_click_refuses_is_told_in_our_two_lines(cli, arguments, error, hint):
    said = told(cli, *arguments.split())
    assert error in said[0] and hint in said[1]


@pytest.mark.parametrize(
    ("arguments", "corrected"),
    [
        ("distill {photos}", "vitkd distill --data {photos}"),
        ("distill {photos} --epochs 3", "vitkd distill --epochs 3 --data {photos}"),
        ("distill mine.toml --lr 1", "vitkd distill --lr 1 --recipe mine.toml"),
        ("distill run", "vitkd distill --resume run"),
        ("eval run {photos} -q", "vitkd eval run -q --data {photos}"),
        ("export run {photos} --to onnx", "vitkd export run --to onnx --images {photos}"),
        ("inspect-attention run {photos}", "vitkd inspect-attention run --images {photos}"),
        ("inspect-attention run a.jpg b.jpg", "vitkd inspect-attention run --images a.jpg b.jpg"),
    ],
)
def test_a_forgotten_flag_is_guessed_with_the_whole_command(
    cli, arguments, corrected, photos, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("mine.toml", "run/recipe.toml", "a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    hint = told(cli, *arguments.format(photos=photos).split())[1]
    assert hint == "did you mean: " + corrected.format(photos=photos)


@pytest.mark.parametrize(
    ("foreign", "ours"),
    [
        ("distill --wd 0.1", "distill --weight-decay 0.1"),
        ("distill --log-wandb --lr 1", "distill --log-with wandb --lr 1"),
        ("distill --report-to tensorboard", "distill --log-with tensorboard"),
        ("distill --fp16", "distill --mixed-precision fp16"),
        ("eval x --bf16", "eval x --mixed-precision bf16"),
        ("distill --input-size 64", "distill --img-size 64"),
        ("distill --model deit_tiny", "distill --student deit_tiny"),
        ("eval --model deit_tiny --data x", "eval deit_tiny --data x"),
        ("help distill", "distill --help"),
    ],
)
def test_flags_of_other_programs_mean_what_they_mean_there(foreign, ours):
    assert respell(foreign.split()) == ours.split()


@pytest.mark.parametrize(
    ("foreign", "answer"),
    [
        ("train --data x", "vitkd distill"),
        ("distill --gpu 1", "CUDA_VISIBLE_DEVICES"),
        ("distill --patience 5", "--select best"),
        ("distill --input-size 3 96 96", "--img-size 96"),
    ],
)
def test_what_other_programs_can_and_we_cannot_is_answered(foreign, answer):
    with pytest.raises(UserError) as problem:
        respell(foreign.split())
    assert answer in problem.value.hint


@pytest.mark.parametrize("page", [[c, h] for c in COMMANDS for h in ("--help", "--help-all")], ids="-".join)
def test_help_of_80_columns_cuts_no_flag(cli, monkeypatch, page):
    command = command_called(page[0])
    flags = [flag for parameter in command.params for flag in parameter.opts]
    if page[1] not in (*flags, "--help"):
        pytest.skip("all of its flags are in its short help")
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    _, out, _ = cli(*page)
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"--[\w-]*…", out) and "--no-no-" not in out
    if "--help-all" not in flags or page[1] == "--help-all":
        for option in command.params:
            spellings = [*option.opts, *option.secondary_opts]
            assert option.param_type_name == "argument" or any(one in out for one in spellings)


def test_help_of_distill_begins_with_ten_flags(cli):
    _, out, _ = cli("distill", "--help")
    flags = re.findall(r"^│ (--[\w-]+)", out, re.M)
    assert flags[:4] == ["--teacher", "--student", "--pretrained", "--data"]
    assert len(flags) == 12 and flags[10:] == ["--help-all", "--help"]
    _, out, _ = cli("distill", "--help-all")
    every = re.findall(r"^│ (--[\w-]+)", out, re.M)
    assert every[:12] == flags
    for flag in ("--no-teacher-pretrained", "--opt-betas", "--log-grads", "--no-aug"):
        assert flag in every


def test_help_needs_no_torch():
    code = (
        "import sys; sys.argv = ['vitkd', *sys.argv[1:]]\n"
        "from vitkd_cli.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    )
    for page in ([], ["--help"], ["distill", "--help-all"]):
        subprocess.run([sys.executable, "-c", code, *page], check=True, capture_output=True)
