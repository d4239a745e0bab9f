"""The end of a run: what it has shown, its curves, its page."""

from vitkd_cli.errors import UserError, first_line
from vitkd_cli.files import CannotWrite
from vitkd_cli.progress import Reporter
from vitkd_cli.report.curves import curves
from vitkd_cli.report.page import write_report
from vitkd_cli.report.tables import closing
from vitkd_cli.training import Run


def conclude(run: Run, reporter: Reporter) -> None:
    """Show what a run has shown, draw its curves and its page, and say where its student is.

    The run is finished, perhaps on a disk that is read-only: nothing here may fail it.
    """
    for renderable in closing(run):
        reporter.show(renderable)
    if any(result.history for result in run.results):
        try:
            reporter.say(f"curves   {curves(run)}")
        except CannotWrite as problem:
            reporter.warn(problem.message)
    if run.recipe.report:
        _draw_page(run, reporter)
    reporter.say(f"student  {run.student}")


def _draw_page(run: Run, reporter: Reporter) -> None:
    try:
        with reporter.bar("report", 0):
            drawn = write_report(
                run.folder, progress=lambda stage, done, total: reporter.advance(done, stage, total=total)
            )
        reporter.say(f"report   {drawn.path}")
    except UserError as problem:
        reporter.warn(problem.message)
    except Exception as problem:  # whatever it is, the students are trained and kept
        kind = type(problem).__name__
        reporter.warn(f"report.html was not drawn ({kind}: {first_line(problem)}); vitkd report tries again")
