"""``vitkd report``: one page about runs, or Markdown for a model card."""

from dataclasses import dataclass
from typing import Annotated

from vitkd_cli.cli.flags import command_of, progress, waking
from vitkd_cli.options import Option, Request
from vitkd_cli.requests import ReportRequest


@dataclass(frozen=True, kw_only=True)
class Quiet(Request):
    """What is printed beside the page."""

    panel = ReportRequest.panel

    quiet: Annotated[bool, Option("No progress bar.", short=("-q",))] = False


def _report(request: ReportRequest, shown: Quiet) -> None:
    """Tell of runs in one page that can be sent by mail: verdict, models, curves, mistakes, recipe.

    - `vitkd report runs/x` writes runs/x/report.html, as the run did at its end

    - `vitkd report runs/x runs/y --output both.html`

    - `vitkd report runs/x --markdown` prints what a model card wants

    It fetches nothing, names no folder of yours, and tells of unfinished runs, too.
    """
    with waking(shown.quiet):
        from vitkd_cli.report import write_report

    with progress("report", silent=shown.quiet) as told:
        drawn = write_report(request, progress=told)
    print(drawn.text if drawn.path is None else drawn.path, end="" if drawn.path is None else "\n")


command = command_of("report", _report, ReportRequest, Quiet)
