"""``vitkd distill``: its flags are read off the recipe."""

from __future__ import annotations

import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from vitkd_cli.cli.flags import parameter, publish, shown, waking
from vitkd_cli.errors import UserError
from vitkd_cli.files import CannotWrite
from vitkd_cli.options import Option, Request, declared
from vitkd_cli.recipe import A_QUARTER, Recipe, settings, settle

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


@dataclass(frozen=True, kw_only=True)
class Switches(Request):
    """What is asked of a run beside its recipe."""

    panel = "Run folder and evidence"

    # fmt: off
    recipe: Annotated[str | None, Option("A shipped recipe's name (vitkd recipes lists them), or a TOML file.", short=("-c",))] = None
    resume: Annotated[str | None, Option("Go on with this run folder; needs no other flag, and takes more --epochs, --seeds or --baseline. auto: with --output if a run began there.")] = None
    dry_run: Annotated[bool, Option("Resolve and rehearse everything, say what would run, stop.")] = False
    overwrite: Annotated[bool, Option("Replace what the run folder holds.")] = False
    accept_changed_data: Annotated[bool, Option("Resume although images were added, removed or replaced; the classes must be the same.")] = False
    print_recipe: Annotated[bool, Option("Print every value and where it comes from, and stop.")] = False
    trust_plugin: Annotated[bool, Option("Run the code of the plugin that the recipe or the run names.")] = False
    quiet: Annotated[bool, Option("Print errors only.", short=("-q",))] = False
    # fmt: on


def _distill(switches: Switches, given: dict[str, Any]) -> None:
    recipe, resume = switches.recipe, switches.resume
    run_has_it = resume not in (None, "auto")
    if run_has_it and recipe is not None:
        raise UserError("--resume takes its recipe from the run; --recipe cannot change it", "leave it out")
    if switches.accept_changed_data and resume is None:
        raise UserError(
            "--accept-changed-data is about a run that goes on", "--resume FOLDER, or leave it out"
        )
    settled, origins = settle(given, resume if run_has_it and switches.print_recipe else recipe, os.environ)
    if switches.print_recipe:
        _print_recipe(settled, origins)
        return
    run(
        settled,
        given,
        switches,
        sample=origins["data"] == "recipe sample",
        shortened=origins["warmup_epochs"] == A_QUARTER,
    )


def run(
    recipe: Recipe,
    given: dict[str, Any],
    switches: Switches = Switches(),
    *,
    sample: bool = False,
    shortened: bool = False,
) -> Any:
    """Run a recipe and print what a person wants to see of it; the finished run, or None."""
    resume, quiet = switches.resume, switches.quiet
    with waking(quiet):
        from vitkd_cli.processes import launched_by_us, speaks
        from vitkd_cli.report import closing, curves, plan_tables
        from vitkd_cli.terminal import Terminal
        from vitkd_cli.training import Plan, Reporter, distill
        from vitkd_cli.training.folder import is_run

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
            overwrite=switches.overwrite,
            dry_run=switches.dry_run,
            trust_plugin=switches.trust_plugin or "plugin" in given,
            accept_changed_data=switches.accept_changed_data,
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
    for field in settings():
        value = getattr(recipe, field.name)
        style = "dim" if origins[field.name] == "default" else "bold"
        table.add_row(field.name, "–" if value is None else shown(value), origins[field.name], style=style)
    Terminal().print(table)


def _help_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        for parameter in context.command.params:
            parameter.hidden = False  # type: ignore[attr-defined]
        typer.echo(context.get_help(), nl=False)
        raise typer.Exit


def add_to(app: typer.Typer) -> None:
    """Add the command."""
    all_flags = typer.Option(
        "--help-all", help="Show every flag and exit.", is_eager=True, callback=_help_all
    )
    parameters = [
        inspect.Parameter(
            "help_all", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, all_flags]
        ),
        *(parameter(field, first=_FIRST, layered=True) for field in settings()),
        *(parameter(field, first=_FIRST) for field in declared(Switches).values()),
    ]

    def command(help_all: bool, **values: Any) -> None:
        given = {key: value for key, value in values.items() if value is not None}
        switches = {key: given.pop(key) for key in declared(Switches) if key in given}
        _distill(Switches(**switches), given)

    publish(app, "distill", command, _HELP, parameters, _FIRST)
