"""``vitkd sweep``: its flags are the recipe's, and what is varied."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Annotated, Any

from vitkd_cli.cli.distill import reporter_for
from vitkd_cli.cli.layered import layered_command
from vitkd_cli.options import Option, Request
from vitkd_cli.recipe import SWEEP_TABLES, find_recipe, settle
from vitkd_cli.requests import SweepRequest

_HELP = """Train a student at many settings, and see which is best, beyond chance or not.

- `vitkd sweep --recipe tiny-cpu --vary lr=1e-3,2e-3,4e-3 --seeds 3`
- `vitkd sweep --recipe tiny-cpu --loss "labels + vitkd(alpha={a}, beta={b})" --vary a=1e-5,3e-5 --vary b=1e-6,3e-6`
- `vitkd sweep --recipe tiny-cpu --vary lr=1e-4..1e-2 --vary weight_decay=0..0.2 --random 12 --jobs 2`
- `vitkd sweep --resume sweeps/x`
"""
_FIRST = (
    *("vary", "loss", "recipe", "seeds", "random", "draw_seed", "halving", "output", "jobs"),
    *("resume", "print_commands", "teacher", "student", "data", "epochs", "baseline"),
)


@dataclass(frozen=True, kw_only=True)
class Told(Request):
    """What is told."""

    panel = SweepRequest.panel

    quiet: Annotated[bool, Option("Print errors only.", short=("-q",))] = False


def _sweep(asked: SweepRequest, told: Told, given: dict[str, Any], typed: Collection[str]) -> None:
    named = asked.recipe
    if asked.resume is None:
        recipe, _ = settle(given, named, os.environ, without=SWEEP_TABLES)
        asked = replace(asked, recipe=recipe)
    reporter = reporter_for(told.quiet, stderr=asked.print_commands)
    from vitkd_cli.report.sweeps import report_sweep
    from vitkd_cli.sweeps import sweep
    from vitkd_cli.sweeps.folder import asked_in

    if named is not None and asked.resume is None:
        asked = asked_in(find_recipe(named), asked, typed)
    found = sweep(asked, machine=given, reporter=reporter)
    if found is not None:
        report_sweep(found, reporter)


command = layered_command("sweep", _sweep, _HELP, (SweepRequest, Told), _FIRST)
