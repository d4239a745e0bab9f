"""``vitkd distill``: its flags are read off the recipe."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

from vitkd_cli.cli.flags import shown, waking
from vitkd_cli.cli.layered import layered_command
from vitkd_cli.errors import UserError
from vitkd_cli.meeting import refused_together
from vitkd_cli.options import Option, Request
from vitkd_cli.recipe import A_QUARTER, Recipe, settings, settle
from vitkd_cli.requests import DistillRequest

if TYPE_CHECKING:
    from vitkd_cli.training import Plan, Reporter, Run

_HELP = """Train a small ViT with the help of a big one.

The default objective is the ViTKD paper's, with NKD: `labels + vitkd + nkd`.

- `vitkd distill --teacher deit3_small --student deit_tiny --data ~/imagenet`
- `vitkd distill --teacher vit_base --student deit_tiny --pretrained --data ~/photos --finetune-teacher 20 --recipe finetune`
- `vitkd distill --teacher deit3_small --student deit_tiny --data ~/imagenet --dry-run`
- `vitkd distill --resume runs/deit3_small-deit_tiny-20260101-120000`
"""


# What people need: the short help has these, --help-all the rest.
_FIRST = (
    *("teacher", "student", "pretrained", "data", "finetune_teacher", "recipe", "epochs"),
    *("output", "resume", "dry_run"),
)


@dataclass(frozen=True, kw_only=True)
class Printed(Request):
    """What is printed."""

    panel = DistillRequest.panel

    print_recipe: Annotated[bool, Option("Print every value and where it comes from, and stop.")] = False
    quiet: Annotated[bool, Option("Print errors only.", short=("-q",))] = False


_REQUESTS: tuple[Any, ...] = (DistillRequest, Printed)


def _distill(asked: DistillRequest, shown: Printed, given: dict[str, Any], _typed: Collection[str]) -> None:
    run_has_it = asked.resume not in (None, "auto")
    if run_has_it and asked.recipe is not None:
        raise UserError("--resume takes its recipe from the run; --recipe cannot change it", "leave it out")
    if asked.accept_changed_data and asked.resume is None:
        raise UserError(
            "--accept-changed-data is about a run that goes on", "--resume FOLDER, or leave it out"
        )
    source = asked.resume if run_has_it and shown.print_recipe else asked.recipe
    with refused_together():  # one machine may lack a file of settings, or the run folder
        recipe, origins = settle(given, source, os.environ)
        if shown.print_recipe:
            _print_recipe(recipe, origins)
            return
        asked = replace(asked, recipe=None if run_has_it else recipe)
        reporter = reporter_for(shown.quiet)
        from vitkd_cli.processes import launched_by_us
        from vitkd_cli.training.start import begun

        begins = begun(asked) is None and not launched_by_us()
    if begins and origins["warmup_epochs"] == A_QUARTER:
        epochs = f"{recipe.warmup:g} epochs, a quarter of this run"
        reporter.warn(f"the recipe's warm-up is cut to {epochs} (--warmup-epochs)")
    if begins and origins["data"] == "recipe sample":
        sample = "the built-in sample (1,797 handwritten digits, short schedule)"
        reporter.say(f"no --data given: running on {sample}")
    run(asked, given, reporter)


def reporter_for(quiet: bool, stderr: bool = False) -> Reporter:
    """The reporter of a run, once torch and timm are loaded; the first process speaks for all."""
    with waking(quiet):
        from vitkd_cli.processes import is_main_process
        from vitkd_cli.terminal import Terminal
        from vitkd_cli.training import Reporter

    silent = quiet or not is_main_process()
    return Reporter(Terminal(quiet=silent, stderr=stderr), silent=silent)


def run(asked: DistillRequest, given: dict[str, Any], reporter: Reporter) -> Run | None:
    """Distil and show the plan and the results; the finished run, or None."""
    from vitkd_cli.processes import is_main_process, launched_by_us
    from vitkd_cli.report.end import conclude
    from vitkd_cli.report.tables import plan_tables
    from vitkd_cli.training import distill

    def show(plan: Plan) -> None:
        for table in plan_tables(plan):
            reporter.show(table)

    try:
        finished: Run | None = distill(asked, machine=given, reporter=reporter, show_plan=show)
    except KeyboardInterrupt:  # in training it is heard by the loop, which saves
        raise UserError("stopped by SIGINT before an update was under way", exit_code=130) from None
    if finished is not None and is_main_process() and not launched_by_us():
        conclude(finished, reporter)
    return finished


def _print_recipe(recipe: Recipe, origins: dict[str, str]) -> None:
    from rich.table import Table

    from vitkd_cli.terminal import Terminal

    table = Table("key", "value", "from", title="recipe", box=None)
    for field in settings():
        value = getattr(recipe, field.name)
        style = "dim" if origins[field.name] == "default" else "bold"
        table.add_row(field.name, "–" if value is None else shown(value), origins[field.name], style=style)
    Terminal().print(table)


command = layered_command("distill", _distill, _HELP, _REQUESTS, _FIRST)
