"""``vitkd report``: one page about runs, or Markdown for a model card."""

from vitkd_cli.cli.flags import Silent, command_of, progress, waking
from vitkd_cli.requests import ReportRequest


def _report(request: ReportRequest, shown: Silent) -> None:
    """Tell of runs in one page that can be sent by mail: verdict, models, curves, mistakes, recipe.

    - `vitkd report runs/x` writes runs/x/report.html, as the run did at its end

    - `vitkd report runs/x runs/y --output both.html`

    - `vitkd report runs/x --markdown` prints what a model card wants

    It fetches nothing, names no folder of yours, and tells of unfinished runs, too.
    """
    with waking(shown.quiet):
        from vitkd_cli.report.page import write_report

    with progress("report", silent=shown.quiet) as told:
        drawn = write_report(request, progress=told)
    print(drawn.text if drawn.path is None else drawn.path, end="" if drawn.path is None else "\n")


command = command_of("report", _report, ReportRequest, Silent)
