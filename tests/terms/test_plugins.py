"""Terms that come from outside the package."""

from __future__ import annotations

import hashlib
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from vitkd_cli import Recipe, UserError, distill, terms
from vitkd_cli.objective import Objective, parse
from vitkd_cli.terms import Batch, load_plugins, registered_terms
from vitkd_cli.training import Reporter

TERM = """
from typing import Annotated
from vitkd_cli.terms import Term, term
from vitkd_cli.vit.taps import LOGITS

@term("{name}")
class Mine(Term):
    uses_teacher = False

    def __init__(self, student, teacher, *, size: Annotated[float, "How large."] = {size}):
        super().__init__()
        self.size, self.compares = size, [(LOGITS, None)]

    def forward(self, pairs, batch):
        return self.size * pairs[0][0].square().mean()
"""


pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture
def plugin(tmp_path):
    """Write a plugin; its path."""

    def write(text=None, *, file="mine.py", name="mine", size=1.0):
        path = tmp_path / file
        path.write_text(TERM.format(name=name, size=size) if text is None else text)
        return str(path)

    return write


def test_a_plugin_adds_a_word(plugin, spec):
    load_plugins(plugin(size=2.5))
    assert str(parse("labels + mine(size=2.5) + 2*mine(size=3)")) == "labels + mine + 2*mine(size=3)"
    assert Objective("mine", spec(8), None).terms["mine"].size == 2.5


def test_options_are_lines_of_the_class_those_of_its_base_included(plugin, spec):
    load_plugins(
        plugin(
            "from typing import Annotated\n"
            "from vitkd_cli.options import Option\n"
            "from vitkd_cli.terms import term\n"
            "from vitkd_cli.terms.bases import FeatureTerm\n"
            '@term("mine")\n'
            "class Mine(FeatureTerm):\n"
            "    blocks, reduce = (-1,), 'mean'\n"
            "    size: Annotated[float, Option('How large.', above=0)] = 2.0\n"
            "    def squares(self, index, student, teacher):\n"
            "        return (self.size * student - self.sites[index].target(teacher)).square()\n"
        )
    )
    assert str(parse('mine(at="mha", reduce="sum", size=3)')) == 'mine(reduce="sum", size=3, at="mha")'
    mine = registered_terms()["mine"]
    built = mine(spec(8), spec(8), size=3)
    assert (built.size, built.reduce, built.at, built.norm) == (3.0, "mean", "ffn", "auto")
    tokens = torch.randn(2, 16, 8)
    torch.testing.assert_close(built([(tokens, tokens)], Batch()), (2 * tokens).square().mean())
    for make in (lambda: parse("mine(size=0)"), lambda: mine(spec(8), spec(8), size=0)):
        with pytest.raises(UserError, match="mine: size must be above 0, not 0"):
            make()
    with pytest.raises(TypeError, match="mine has no option 'target_norm'"):
        mine(spec(8), spec(8), target_norm="layer")


def test_a_plugin_that_was_edited_is_run_anew(plugin):
    load_plugins(plugin(size=1.0))
    load_plugins(plugin(size=4.0))
    assert dict(parse("mine").summands[0].options) == {"size": 4.0}


def test_several_files_stand_side_by_side(plugin):
    one, two = plugin(), plugin(file="yours.py", name="yours")
    load_plugins(f"{one}, {two}")
    assert {"mine", "yours"} <= set(registered_terms())


@pytest.mark.parametrize(
    ("text", "messages", "hint"),
    [
        ("x = 1\n", ["mine.py adds no term"], '@term("NAME")'),
        (TERM.format(name="kd", size=1), ["term 'kd' is taken by vitkd_cli.terms.kd"], "another name"),
        (
            "def f():\n    return 1 / 0\n\nf()\n",
            ["cannot be imported\nTraceback", 'mine.py", line 4', "line 2, in f", "ZeroDivisionError"],
            "mend it",
        ),
        ("import nothing_at_all\n", ['mine.py", line 1', "No module named 'nothing_at_all'"], "mend it"),
        ("x = 1\ndef f(:\n", ['mine.py", line 2', "SyntaxError"], "mend it"),
    ],
)
def test_a_plugin_that_fails_is_the_users_to_mend(plugin, text, messages, hint):
    with pytest.raises(UserError) as refused:
        load_plugins(plugin(text))
    for part in messages:
        assert part in refused.value.message
    assert hint in refused.value.hint
    assert terms.__file__ not in refused.value.message  # their lines, not ours
    assert "kd" in registered_terms() and registered_terms()["kd"].__module__ == "vitkd_cli.terms.kd"


def test_a_plugin_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"there is no plugin .*none\.py"):
        load_plugins(str(tmp_path / "none.py"))


@pytest.mark.parametrize("name", ["vitkd", "cosine"])
def test_macros_and_schedules_keep_their_names(plugin, name):
    load_plugins(plugin(name=name))
    with pytest.raises(UserError, match=f"'{name}' .*mine_py has a name that formulas use already"):
        parse("labels")


@pytest.mark.parametrize("declared", ["size=1.0", "size: float = 1.0", 'size: Annotated[float, "x."]'])
def test_an_option_without_type_help_or_default_is_refused(plugin, declared):
    text = TERM.format(name="mine", size=1).replace('size: Annotated[float, "How large."] = 1', declared)
    load_plugins(plugin(text))
    with pytest.raises(UserError, match=r"Mine does not say type, help and default of 'size'"):
        parse("mine")


@pytest.mark.parametrize("text", [None, "import nothing_at_all\n"])
def test_an_installed_package_adds_terms_by_its_entry_point(plugin, tmp_path, monkeypatch, text):
    plugin(text, file="vitkd_test_package.py")
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("mine", "vitkd_test_package", "vitkd.terms")]
    monkeypatch.setattr(terms, "entry_points", lambda group: points if group == "vitkd.terms" else [])
    terms._import_installed.cache_clear()
    try:
        if text is None:
            assert registered_terms()["mine"].__module__ == "vitkd_test_package"
        else:
            with pytest.raises(UserError, match=r"vitkd_test_package.* cannot be imported"):
                registered_terms()
    finally:
        terms._import_installed.cache_clear()
        sys.modules.pop("vitkd_test_package", None)


def test_a_run_reads_its_plugin_again_when_it_goes_on(plugin, tiny, tmp_path, monkeypatch):
    plugin()
    monkeypatch.chdir(tmp_path)
    values = {**tiny, "plugin": "mine.py", "loss": "labels + 0.1*mine", "steps": 1}
    run = distill(Recipe(**values, output="run"), trust_plugin=True, reporter=Reporter(silent=True))
    assert run.recipe.plugin == str(tmp_path / "mine.py")
    (tmp_path / "run" / "run.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    terms._registry.pop("mine")
    monkeypatch.chdir("/")
    again = distill(resume=tmp_path / "run", trust_plugin=True, reporter=Reporter(silent=True))
    assert again.recipe.loss == "labels + 0.1*mine"


@pytest.fixture
def strangers(plugin, tiny, tmp_path):
    """A stranger's recipe and unfinished run, whose plugin leaves a mark where it is run."""
    mark = tmp_path / "mark"
    text = f"open({str(mark)!r}, 'a').close()\n" + TERM.format(name="mine", size=1.0)
    values = {**tiny, "plugin": plugin(text), "loss": "labels + 0.1*mine", "steps": 1}
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(Recipe(**values, output=str(run)).to_toml())
    return run, Path(values["plugin"]), mark


@pytest.mark.parametrize("dry", [(), ("--dry-run",), ("--num-processes", "2")], ids=" ".join)
@pytest.mark.parametrize("route", [("--recipe", "recipe.toml"), ("--recipe", ""), ("--resume", "")])
def test_a_recipe_or_run_that_was_read_runs_no_code(strangers, cli, route, dry):
    run, path, mark = strangers
    flag, place = route
    code, out, err = cli("distill", flag, str(run / place), *dry)
    assert code == 2 and not mark.exists(), out
    assert f"{path} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()})" in err.replace("\n", "")
    assert "--trust-plugin runs it" in err
    with pytest.raises(UserError, match="runs the code of a plugin"):
        distill(Recipe.from_toml(run / "recipe.toml"), reporter=Reporter(silent=True))
    assert not mark.exists()


@pytest.mark.parametrize("trust", ["--trust-plugin", "--plugin"])
@pytest.mark.parametrize("flag", ["--recipe", "--resume"])
def test_the_command_line_may_trust_a_plugin(strangers, cli, flag, trust):
    run, path, mark = strangers
    named = [trust] if trust == "--trust-plugin" else [trust, str(path)]
    code, out, err = cli("distill", flag, str(run), *named, "--dry-run")
    assert code == 0 and mark.exists(), err
    shown = out.index(f"plugin   {path} (SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()})")
    assert shown < out.index("student  ")


def test_looking_at_a_strangers_run_runs_no_code(strangers, cli):
    run, _, mark = strangers
    for arguments in (
        ("distill", "--recipe", str(run), "--print-recipe"),
        ("recipes", str(run / "recipe.toml")),
    ):
        cli(*arguments)
    for command in ("eval", "inspect-attention", "export"):
        cli(command, str(run), *(["--to", "timm"] if command == "export" else []))
    assert not mark.exists()
