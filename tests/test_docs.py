"""What the pages say is true: commands parse, code runs, tables and messages are those of the package.

``python tests/test_docs.py --write`` rewrites the tables and the picture that are generated; the demo's
figures are those of docs/images/demo.json, and ``--write RUN`` takes them from a new run of the demo.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import inspect
import io
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich._export_format import CONSOLE_SVG_FORMAT
from typer.main import get_command

import vitkd_cli
from vitkd_cli import terms
from vitkd_cli.cli.flags import shown
from vitkd_cli.cli.front import COMMANDS, command_called
from vitkd_cli.cli.main import app
from vitkd_cli.cli.spelling import _ALIASES, _IN_THE_FORMULA, respell
from vitkd_cli.data.images import loose_images
from vitkd_cli.inspection.methods import method
from vitkd_cli.objective import Objective, parse, words
from vitkd_cli.options import MISSING, Field, Request, declared
from vitkd_cli.recipe import (
    SWEEP_TABLES,
    Recipe,
    compose,
    layers_of,
    settings,
    settle,
    shipped_recipes,
    summary_of,
)
from vitkd_cli.report.tables import closing
from vitkd_cli.requests import (
    EvalRequest,
    ExportRequest,
    InspectRequest,
    PredictRequest,
    ReportRequest,
    SweepRequest,
)
from vitkd_cli.sweeps.points import axes_of, points_of, vary_in_words
from vitkd_cli.terminal import Terminal
from vitkd_cli.terms import Batch, registered_terms
from vitkd_cli.training import Result, Run
from vitkd_cli.training.arms import written_arms
from vitkd_cli.vit.names import resolve
from vitkd_cli.vit.taps import Tap

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=NAMES)


# --- the tables that are generated ----------------------------------------------------------------------


def option_table() -> str:
    """Every field of a recipe, one table per panel."""
    return _panels(settings(), "key", lambda field: (field.name, *field.option.short), _default)


def flag_table(request: type[Request]) -> str:
    """Every flag of a command, one table per panel; its arguments are in its usage."""
    fields = [field for field in declared(request).values() if not field.option.argument]

    def default(field: Field) -> str:
        return "off" if field.kind is bool and field.default else field.option.unset or _default(field)

    return _panels(fields, "flag", _flags, default)


def _panels(
    fields: Sequence[Field],
    named: str,
    names: Callable[[Field], Sequence[str]],
    default: Callable[[Field], str],
) -> str:
    lines: list[str] = []
    for panel in dict.fromkeys(field.panel for field in fields):
        lines += [f"### {panel}", "", f"| {named} | default | meaning |", "|---|---|---|"]
        lines += [
            f"| {', '.join(f'`{name}`' for name in names(field))} | {default(field)} "
            f"| {_cell(field.option.help)}{_range(field)} |"
            for field in fields
            if field.panel == panel
        ]
        lines.append("")
    return "\n".join(lines).strip()


def _flags(field: Field) -> tuple[str, ...]:
    """As they are typed; of a switch that is on, the flag that turns it off, which its help is about."""
    switches = {True: (field.off,), None: (field.flag, field.off)}
    return (*field.option.short, *switches.get(field.default if field.kind is bool else 0, (field.flag,)))


def _default(field: Field) -> str:
    if field.default is None:
        return "–"
    if field.kind is bool:
        return "on" if field.default else "off"
    if field.default in (MISSING, "", ()):
        return "–"
    return f"`{shown(field.default)}`"


def _range(field: Field) -> str:
    said = field.range
    if field.choices:
        said = "One of " + ", ".join(f"`{choice}`" for choice in field.choices) + "."
    return f" {said}" if said else ""


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("``", "`")


def recipe_table() -> str:
    """Every shipped recipe in a line."""
    lines = ["| name | for | objective | epochs |", "|---|---|---|---|"]
    for name, path in shipped_recipes().items():
        recipe = Recipe.from_toml(path)
        lines.append(f"| `{name}` | {_cell(summary_of(path))} | `{recipe.loss}` | {recipe.epochs} |")
    return "\n".join(lines)


def term_table() -> str:
    """Every word that a formula may use, in a line."""
    lines = ["| word | what it is |", "|---|---|"]
    for name in words():
        lines.append(f"| [`{name}`](docs/methods.md#{name}) | {_cell(method(name).summary)} |")
    return "\n".join(lines)


def term_sections() -> str:
    """Every word that a formula may use: what it is, its equation, its options."""
    parts: list[str] = []
    for about in map(method, words()):
        parts.append(f"### {about.name}\n\n{about.summary}")
        if about.formula:
            parts.append(f"A macro: `{about.name}` stands for `{about.formula}`.")
        else:
            parts.append(f"```text\n{about.equation}\n```\n\n{about.symbols}")
        rows = [f"| `{o['name']}` | `{o['default']}` | {_cell(o['help'])} |" for o in about.options]
        table = "\n".join(["| option | default | meaning |", "|---|---|---|", *rows])
        parts += [*about.details, table]
    return "\n\n".join(parts)


# What refuses the user → the part of docs/troubleshooting.md with its messages.
ROOMS = {
    "settings": ("cli", "options", "recipe", "requests", "text"),
    "models": ("vit",),
    "objective": ("objective", "terms"),
    "data": ("data",),
    "run": (
        "training",
        "sweeps",
        "session",
        "meeting",
        "processes",
        "world",
        "progress",
        "device",
        "files",
        "errors",
    ),
    "scoring": ("evaluation", "report"),
    "attention": ("inspection",),
    "export": ("export",),
}


def refusal_table(part: str) -> str:
    """Every message of some rooms with its hint; what ends a run that had begun has a table of its own."""
    rows = {
        f"| `{message}` | {_as_prose(hint)} |"
        for room, message, hint, stopped in refusals()
        if part == ("stopped" if stopped else next(p for p, rooms in ROOMS.items() if room in rooms))
    }
    lines = sorted(rows, key=lambda row: (re.sub(r"^[\W_]+", "", row).lower(), row))
    return "\n".join(["| message | hint |", "|---|---|", *lines])


@functools.cache
def refusals() -> list[tuple[str, str, str, bool]]:
    """(room, message, hint, is it the end of a run?) of every ``UserError``; ``…`` is what a run fills in."""
    package = ROOT / "vitkd_cli"
    trees = {path: ast.parse(path.read_text()) for path in sorted(package.rglob("*.py"))}
    nodes = [(path, node) for path, tree in trees.items() for node in ast.walk(tree)]
    kinds = [n for _, n in nodes if isinstance(n, ast.ClassDef) and "UserError" in map(ast.unparse, n.bases)]
    words = {kind.name: _default_hint(kind) for kind in kinds}
    inside = [node for kind in kinds for node in ast.walk(kind)]
    found = []
    for path, call in nodes:
        name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
        if name in {"UserError", *words} or (name == "super().__init__" and call in inside):
            assert isinstance(call, ast.Call)
            given = dict(zip(("message", "hint", "exit_code"), call.args, strict=False))
            given |= {keyword.arg or "": keyword.value for keyword in call.keywords}
            given = {"hint": words.get(name)} | given
            message, hint = (_template(given.get(key), trees[path]) for key in ("message", "hint"))
            room = path.relative_to(package).parts[0].removesuffix(".py")
            if re.search(r"\w{3}", message):  # else it passes on what was said elsewhere
                found.append(
                    (room, message.partition("\n")[0], hint, name != "UserError" or "exit_code" in given)
                )
    return found


def _default_hint(kind: ast.ClassDef) -> ast.expr | None:
    for made in kind.body:
        if isinstance(made, ast.FunctionDef) and made.args.args[-1].arg == "hint":
            return made.args.defaults[-1]
    return None


def _template(node: ast.expr | None, tree: ast.Module) -> str:
    """A text as the code writes it, with ``…`` for what is formatted."""
    match node:
        case None:
            return ""
        case ast.Constant(str() as text):
            return text
        case ast.JoinedStr(parts):
            text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts)
            return re.sub("…+", "…", text)
        case ast.BinOp(left, ast.Add(), right):
            return _template(left, tree) + _template(right, tree)
        case ast.IfExp(_, one, other):
            return " / ".join(filter(None, (_template(one, tree), _template(other, tree))))
        case ast.Name(name):
            before = [
                found
                for found in ast.walk(tree)
                if isinstance(found, ast.Assign) and found.lineno < node.lineno
                if isinstance(found.targets[0], ast.Name) and found.targets[0].id == name
            ]
            if before:
                return _template(max(before, key=lambda found: found.lineno).value, tree)
    return "…"


def _as_prose(hint: str) -> str:
    """A hint with its flags, and the value beside one, as code."""
    if "`" not in hint:
        hint = re.sub(r"([*_<\[])", r"\\\1", hint)
        hint = re.sub(r"--[a-z…][\w…-]*( ([A-Z]+\b|[\d.,…]*[\d…]))?", r"`\g<0>`", hint)
    return _cell(hint) if hint.strip("…") else "–"


def demo(*before: str) -> Terminal:
    """What ``vitkd demo`` prints at its end, of the run whose figures lie beside the picture."""
    content = json.loads((ROOT / "docs/images/demo.json").read_text())
    results = tuple(Result.of(result, Path(result["folder"])) for result in content["results"])
    teacher = Result.of(content["teacher"], Path("teacher"))
    run = Run(Path("runs/demo"), settle({}, "tiny-cpu")[0], results, teacher)
    [found], [told] = run.contrasts, content["comparisons"]
    if told:  # of the students' answers, which are not kept here
        found = dataclasses.replace(found, wider=(told["low_other_images"], told["high_other_images"]))
    run.__dict__["contrasts"] = [found]
    terminal = Terminal(
        record=True, width=92, force_terminal=True, file=io.StringIO(), color_system="standard"
    )
    for line in before:
        terminal.print(line, style="bold")
    for renderable in closing(run):
        terminal.say(renderable) if isinstance(renderable, str) else terminal.print(renderable)
    return terminal


def record_demo(run: Path) -> None:
    """Keep the figures of a demo, without its places and histories."""
    content = json.loads((run / "run.json").read_text())

    def kept(result: dict[str, Any]) -> dict[str, Any]:
        return {**result, "folder": Path(result["folder"]).name, "history": []}

    results = [kept(result) for result in content["results"]]
    teacher = kept(content["teacher"]) | {"model": results[0]["model"]}
    kept_too = {"comparisons": content["comparisons"]}
    figures = json.dumps({"results": results, "teacher": teacher, **kept_too}, indent=1)
    (ROOT / "docs/images/demo.json").write_text(f"{figures}\n")


def demo_text() -> str:
    lines = demo().export_text(styles=False).splitlines()
    return "\n".join(["```text", *(line.rstrip() for line in lines), "```"])


def demo_picture() -> str:
    """As SVG that fetches no font."""
    form = re.sub(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", "", CONSOLE_SVG_FORMAT, flags=re.S)
    form = form.replace(
        "Fira Code, monospace", 'ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace'
    )
    picture = demo("$ vitkd demo", "…").export_svg(title="vitkd demo", code_format=form, unique_id="demo")
    return "\n".join(line.rstrip() for line in picture.splitlines()) + "\n"


GENERATED: dict[tuple[str, str], Callable[[], str]] = {
    ("docs/recipes.md", "recipes"): recipe_table,
    ("docs/recipes.md", "options"): option_table,
    ("docs/methods.md", "terms"): term_sections,
    ("README.md", "terms"): term_table,
    ("docs/demo.md", "demo"): demo_text,
    ("docs/evaluation.md", "flags"): functools.partial(flag_table, EvalRequest),
    ("docs/sweep.md", "flags"): functools.partial(flag_table, SweepRequest),
    ("docs/predicting.md", "flags"): functools.partial(flag_table, PredictRequest),
    ("docs/report.md", "flags"): functools.partial(flag_table, ReportRequest),
    ("docs/export.md", "flags"): functools.partial(flag_table, ExportRequest),
    ("docs/attention.md", "flags"): functools.partial(flag_table, InspectRequest),
    **{
        ("docs/troubleshooting.md", part): functools.partial(refusal_table, part)
        for part in (*ROOMS, "stopped")
    },
}


def with_table(text: str, name: str, table: str) -> str:
    """A page with its generated part renewed."""
    start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = text.partition(start)
    assert found and end in rest, f"the page has no part {name!r}"
    return f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}"


@pytest.mark.parametrize(("page", "name"), GENERATED, ids=lambda part: part)
def test_generated_tables_are_those_of_the_package(page, name):
    text = (ROOT / page).read_text()
    fresh = with_table(text, name, GENERATED[page, name]())
    assert text == fresh, "rewrite it: python tests/test_docs.py --write"


def test_the_picture_of_the_demo_is_what_the_program_prints():
    """In words: how Rich draws them may differ by its version."""
    stored = (ROOT / "docs/images/demo.svg").read_text()
    words = [re.findall(r">([^<>]*)</text>", picture) for picture in (stored, demo_picture())]
    assert words[0] == words[1], "rewrite it: python tests/test_docs.py --write"
    assert "http" not in re.sub(r'xmlns="[^"]*"', "", stored)  # it is shown where nothing may be fetched


# --- commands -------------------------------------------------------------------------------------------


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of every fenced block."""
    for found in re.finditer(r"^(`{3,})(\w*)[^\n]*\n(.*?)^\1$", page.read_text(), re.M | re.S):
        yield found[2], inspect.cleandoc(found[3])


def commands() -> Iterator[tuple[str, list[str]]]:
    """(page, arguments) of every ``vitkd`` command in a block of shell."""
    for page, name in zip(PAGES, NAMES, strict=True):
        for language, text in blocks(page):
            if language not in ("sh", "bash", "console"):
                continue
            for line in text.replace("\\\n", " ").splitlines():
                for command in line.removeprefix("$ ").split("&&"):
                    words = shlex.split(command, comments=True) if "vitkd" in command else []
                    if words[:1] == ["vitkd"]:
                        yield name, words[1:]


@pytest.mark.parametrize(
    "arguments", [pytest.param(words, id=f"{page}: {shlex.join(words)}") for page, words in commands()]
)
def test_commands_parse(arguments):
    respelt = respell(arguments)
    if not respelt or respelt[0].startswith("-"):
        assert set(respelt) <= {flag for parameter in get_command(app).params for flag in parameter.opts}
        return
    given = command_called(respelt[0]).make_context(respelt[0], respelt[1:]).params
    if respelt[0] != "distill":
        return
    known = {field.name for field in settings()}
    flags = {key: value for key, value in given.items() if key in known and value is not None}
    recipe, _ = settle(flags, None if (given["recipe"] or "").endswith(".toml") else given["recipe"])
    if recipe.plugin is None:  # else the page's own test runs it
        parse(recipe.loss)
    for name in (recipe.teacher, recipe.student):
        if name is not None and not name.startswith("runs/"):
            resolve(name)


_OF_OTHERS = {  # of tests, ruff, Typer, benchmarks, Docker, Slurm, torchrun
    *("--only", "--network", "--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--time"),
    *("--signal", "--requeue", "--open-mode"),
    *(
        "--write",
        "--check",
        "--help",
        "--compare",
        "--costs",
        "--sizes",
        "--shm-size",
        "--nnodes",
        "--nproc-per-node",
    ),
    *("--node-rank", "--rdzv-endpoint", "--rdzv-backend", "--master-addr", "--master-port", "--max-restarts"),
}


@EVERY_PAGE
def test_flags_exist(page):
    known = {*_ALIASES, *_IN_THE_FORMULA, *_OF_OTHERS}
    for command in map(command_called, COMMANDS):
        known |= {
            flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)
        }
    prose = re.sub(r"<!--.*?-->", "", page.read_text(), flags=re.S)
    said = set(re.findall(r"(?<![\w-])--[a-z][\w-]*\w", prose))
    assert said <= known, f"no such flag: {sorted(said - known)}"


# --- code -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=name, marks=pytest.mark.slow if page.name == "export.md" else ())
        for page, name in zip(PAGES, NAMES, strict=True)
    ],
)
def test_python_runs(page, tmp_path, monkeypatch):
    """Blocks of a page run in order, in one namespace and folder; what needs a network says so.

    Half a minute goes by until every form of an export is written: a thing for the night.
    """
    own = {"extend.md": "", "export.md": "MaskRCNN("}.get(page.name)  # these have tests of their own
    code = [text for language, text in blocks(page) if language == "python"]
    code = [text for text in code if own is None or own not in text]
    monkeypatch.chdir(tmp_path)
    turned = Image.Exif()
    turned[0x0112] = 6  # as phones store it
    Image.effect_noise((64, 48), 64).convert("RGB").save("photo.jpg", exif=turned)
    namespace: dict[str, Any] = {}
    for text in code:
        compiled = compile(text, str(page), "exec")
        if not text.startswith("# not run: "):
            exec(compiled, namespace)
    if page.name == "README.md":  # timm, transformers and vitkd see the same photograph
        best = namespace["scores"].max().item()
        assert namespace["classify"]("photo.jpg")[0]["score"] == pytest.approx(best, abs=1e-5)
        image, _ = loose_images(["photo.jpg"])[0]
        seen = namespace["transform"](image).unsqueeze(0)
        assert namespace["student"](seen).softmax(1).max().item() == pytest.approx(best, abs=1e-6)


@EVERY_PAGE
def test_recipes_in_toml_are_recipes(page, tmp_path):
    for language, text in blocks(page):
        if language == "toml":
            file = tmp_path / "recipe.toml"
            file.write_text(text)
            layers = [(origin, dict(values)) for origin, values in layers_of(file)]
            varied, swept = (layers[-1][1].pop(key, {}) for key in SWEEP_TABLES)
            recipe, _ = compose(*layers)
            if not varied:
                written_arms(recipe)
            else:
                axes = axes_of(vary_in_words(varied), recipe, "random" in swept)
                assert len(points_of(recipe, axes, swept.get("random"), 0)) > 1


def example() -> tuple[str, str, str]:
    """docs/extend.md: the method, its word, and the use of it from Python."""
    method, use = (text for language, text in blocks(ROOT / "docs" / "extend.md") if language == "python")
    return method, re.findall(r'^@term\("(\w+)"\)', method, re.M)[0], use


def test_the_example_runs_from_outside_the_package(cli, tmp_path, monkeypatch, registry, read_log):
    method, name, use = example()
    (tmp_path / f"{name}.py").write_text(method)
    monkeypatch.chdir(tmp_path)
    for page, arguments in commands():
        if page == "docs/extend.md":
            code, out, err = cli(*arguments)
            assert code == 0 and name in out, err
    first, second = (line for line in read_log(Path("runs", name)) if "event" not in line)
    assert (first[f"{name}/weight"], second[f"{name}/weight"]) == (0, 100 / 20)  # 20 updates an epoch
    assert first[name] > 0
    exec(use, {})
    ours, theirs = (line[name] for line in read_log(Path("runs", "again")) if "event" not in line)
    assert 0 < ours != theirs > 0


def test_the_example_is_a_file_of_this_package_too(tmp_path, monkeypatch, registry):
    text, name, _ = example()
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.setattr(terms, "__path__", [*terms.__path__, str(tmp_path)])
    importlib.invalidate_caches()
    try:
        assert re.search(r"arXiv:\d{4}\.\d{5}", registered_terms()[name].__doc__ or "")
        student, teacher = (_tiny_vit(width) for width in (24, 48))
        objective = Objective(f"labels + 2*{name}", student.spec, teacher.spec)
        images = torch.rand(2, 3, 32, 32)
        ours = vitkd_cli.TappedViT(student.net, objective.student_taps)(images)
        theirs = vitkd_cli.TappedViT(teacher.net, objective.teacher_taps)(images)
        total, raw = objective(ours, theirs, Batch(torch.tensor([3, 7])))
        torch.testing.assert_close(total, raw["labels"] + 2 * raw[name])
        raw[name].backward()
        gradient = student.net.get_parameter("patch_embed.proj.weight").grad
        assert gradient is not None and gradient.isfinite().all() and gradient.any()
        itself = Objective(name, student.spec, student.spec)
        same = vitkd_cli.TappedViT(student.net.eval(), itself.student_taps)(images)
        assert float(itself(same, same, Batch())[0].detach()) == pytest.approx(0, abs=1e-6)
    finally:
        sys.modules.pop(f"{terms.__name__}.{name}", None)


def _tiny_vit(width: int) -> Any:
    from vitkd_cli.requests import Weights
    from vitkd_cli.vit.build import build

    geometry = f"img_size=32,patch_size=8,embed_dim={width},depth=3,num_heads=3"
    return build(resolve("vit_tiny"), Weights(pretrained=False), num_classes=10, kwargs=geometry)


# --- links, words, messages -----------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=[*NAMES, "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in {_slug(h) for h in re.findall(r"^#+ (.*)$", linked.read_text(), re.M)}, target


def _slug(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "index.md").read_text()
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f"({page.name})" not in index]
    assert missing == ["index.md"]


def test_every_tap_is_explained():
    text = (ROOT / "docs" / "concepts.md").read_text()
    taps = set(re.findall(r"^ *``(\w+)(?:\(i\))?`` {2,}", Tap.__doc__ or "", re.M))
    assert {"logits", "features"} <= taps
    assert not [tap for tap in taps if not re.search(rf"^\| `{tap}(\(i\))?`", text, re.M)]


def test_every_refusal_is_in_a_table():
    rooms = [room for group in ROOMS.values() for room in group]
    assert {place for place, *_ in refusals()} <= set(rooms)
    assert len(refusals()) > 100


def test_exit_codes_are_listed():
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "vitkd_cli").rglob("*.py"))
    codes = {"0", "1", "2", "130", "143", *re.findall(r"exit_code=(\d+),?\)?$", source, re.M)}
    assert "3" in codes
    assert codes == set(re.findall(r"^\| (\d+) \|", page, re.M))


if __name__ == "__main__":
    os.chdir(ROOT)
    assert sys.argv[1:2] == ["--write"] and len(sys.argv) < 4, __doc__
    for run in sys.argv[2:]:
        record_demo(Path(run))
    for (file, part), table in GENERATED.items():
        Path(file).write_text(with_table(Path(file).read_text(), part, table()))
    Path("docs/images/demo.svg").write_text(demo_picture())
