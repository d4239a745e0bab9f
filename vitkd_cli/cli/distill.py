"""``vitkd distill``: its flags are read off the recipe."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from vitkd_cli.cli.shared import waking
from vitkd_cli.errors import UserError
from vitkd_cli.files import CannotWrite
from vitkd_cli.recipe import A_QUARTER, Field, Recipe, options, settle

_HELP = """Train a small ViT with the help of a big one.

The default objective is the ViTKD paper's, with NKD: `labels + vitkd + nkd`.

- `vitkd distill --teacher deit3_small --student deit_tiny --data ~/imagenet`
- `vitkd distill --teacher vit_base --student deit_tiny --pretrained --data ~/photos --finetune-teacher 20 --recipe finetune`
- `vitkd distill --teacher deit3_small --student deit_tiny --data ~/imagenet --dry-run`
- `vitkd distill --resume runs/deit3_small-deit_tiny-20260101-120000`
"""


# What people need: the short help has these, --help-all the rest.
_FIRST = (
    "teacher",
    "student",
    "pretrained",
    "data",
    "finetune_teacher",
    "recipe",
    "epochs",
    "output",
    "resume",
    "dry_run",
)


def _distill(
    recipe: str | None,
    resume: str | None,
    overwrite: bool,
    dry_run: bool,
    accept_changed_data: bool,
    print_recipe: bool,
    trust_plugin: bool,
    quiet: bool,
    **flags: Any,
) -> None:
    given = {name: value for name, value in flags.items() if value is not None}
    run_has_it = resume not in (None, "auto")
    if run_has_it and recipe is not None:
        raise UserError("--resume takes its recipe from the run; --recipe cannot change it", "leave it out")
    if accept_changed_data and resume is None:
        raise UserError(
            "--accept-changed-data is about a run that goes on", "--resume FOLDER, or leave it out"
        )
    settled, origins = settle(given, resume if run_has_it and print_recipe else recipe, os.environ)
    if print_recipe:
        _print_recipe(settled, origins)
        return
    run(
        settled,
        given,
        resume,
        overwrite,
        dry_run,
        quiet,
        sample=origins["data"] == "recipe sample",
        shortened=origins["warmup_epochs"] == A_QUARTER,
        trust_plugin=trust_plugin or "plugin" in given,
        accept_changed_data=accept_changed_data,
    )


def run(
    recipe: Recipe,
    given: dict[str, Any],
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    quiet: bool = False,
    sample: bool = False,
    shortened: bool = False,
    trust_plugin: bool = False,
    accept_changed_data: bool = False,
) -> Any:
    """Run a recipe and print what a person wants to see of it; the finished run, or None."""
    with waking(quiet):
        from vitkd_cli.report import closing, curves, plan_tables
        from vitkd_cli.terminal import Terminal
        from vitkd_cli.training import Plan, Reporter, distill
        from vitkd_cli.training.folder import is_run
        from vitkd_cli.training.launch import launched_by_us, speaks

    if resume == "auto" and recipe.output and not is_run(Path(recipe.output)):
        resume = None  # it begins
    main = speaks()
    reporter = Reporter(Terminal(quiet=quiet or not main), silent=quiet or not main)
    if shortened and resume is None and not launched_by_us():
        reporter.warn(
            f"the recipe's warm-up is cut to {recipe.warmup:g} epochs, a quarter of this run (--warmup-epochs)"
        )
    if sample and resume is None and not launched_by_us():
        reporter.say(
            "no --data given: running on the built-in sample (1,797 handwritten digits, short schedule)"
        )

    def show(plan: Plan) -> None:
        for table in plan_tables(plan):
            reporter.show(table)

    try:
        run = distill(
            recipe if resume in (None, "auto") else None,
            resume=resume,
            machine=given,
            overwrite=overwrite,
            dry_run=dry_run,
            trust_plugin=trust_plugin,
            accept_changed_data=accept_changed_data,
            reporter=reporter,
            show_plan=show,
        )
    except KeyboardInterrupt:  # in training it is heard by the loop, which saves
        raise UserError("stopped by SIGINT before an update was under way", exit_code=130) from None
    if run is not None and main and not launched_by_us():
        for renderable in closing(run):
            reporter.show(renderable)
        if any(result.history for result in run.results):
            try:
                reporter.say(f"curves   {curves(run)}")
            except CannotWrite as problem:  # the run is finished, perhaps on a disk that is read-only
                reporter.warn(problem.message)
        reporter.say(f"student  {run.student}")
    return run


def _print_recipe(recipe: Recipe, origins: dict[str, str]) -> None:
    from rich.table import Table

    from vitkd_cli.terminal import Terminal

    table = Table("key", "value", "from", title="recipe", box=None)
    for field in options():
        value = getattr(recipe, field.name)
        style = "dim" if origins[field.name] == "default" else "bold"
        table.add_row(field.name, "–" if value is None else _shown(value), origins[field.name], style=style)
    Terminal().print(table)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(f"{number:g}" for number in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit


def _parameter(field: Field) -> inspect.Parameter:
    """A field of the recipe as a parameter that Typer understands."""
    flag = field.flag
    if field.kind is bool:
        flag += f"/{field.off}"
    kind = field.kind if field.kind in (bool, int, float) else str
    choices = "|".join(field.choices)
    help = f"{field.option.help} [{choices}]" if choices else field.option.help
    default = None if field.default is None else _shown(field.default)
    if field.kind is bool:
        default = "on" if field.default else "off"
    option = typer.Option(
        flag,
        *field.option.short,
        help=help.replace("[", r"\["),
        show_default=default or False,
        rich_help_panel=None if field.name in _FIRST else field.option.panel,
        hidden=field.name not in _FIRST,
    )
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    options_of_help: dict[str, Any] = {"rich_help_panel": "Run folder and evidence", "hidden": True}
    own: dict[str, tuple[Any, Any, Any]] = {
        "recipe": (
            str | None,
            typer.Option(
                "--recipe",
                "-c",
                help="A shipped recipe's name (vitkd recipes lists them), or a TOML file.",
                show_default=False,
            ),
            None,
        ),
        "resume": (
            str | None,
            typer.Option(
                help="Go on with this run folder; needs no other flag, and takes more --epochs, --seeds or "
                "--baseline. auto: with --output if a run began there.",
                show_default=False,
            ),
            None,
        ),
        "dry_run": (
            bool,
            typer.Option("--dry-run", help="Resolve and rehearse everything, say what would run, stop."),
            False,
        ),
        "overwrite": (
            bool,
            typer.Option("--overwrite", help="Replace what the run folder holds.", **options_of_help),
            False,
        ),
        "accept_changed_data": (
            bool,
            typer.Option(
                "--accept-changed-data",
                help="Resume although images were added, removed or replaced; the classes must be the same.",
                **options_of_help,
            ),
            False,
        ),
        "print_recipe": (
            bool,
            typer.Option(
                "--print-recipe",
                help="Print every value and where it comes from, and stop.",
                **options_of_help,
            ),
            False,
        ),
        "trust_plugin": (
            bool,
            typer.Option(
                "--trust-plugin",
                help="Run the code of the plugin that the recipe or the run names.",
                **options_of_help,
            ),
            False,
        ),
        "quiet": (bool, typer.Option("--quiet", "-q", help="Print errors only.", **options_of_help), False),
        "help_all": (
            bool,
            typer.Option(
                "--help-all",
                help="Show every flag and exit.",
                is_eager=True,
                callback=_help_all,
            ),
            False,
        ),
    }
    parameters = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option]
        )
        for name, (kind, option, default) in own.items()
    ]
    parameters += [_parameter(field) for field in options()]
    order = [*_FIRST, "help_all", *(field.name for field in options()), *own]
    parameters.sort(key=lambda parameter: order.index(parameter.name))

    def command(help_all: bool, **values: Any) -> None:
        _distill(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = _HELP
    app.command("distill")(command)
