"""One page about one run or several: a file that is whole in itself, or Markdown for a model card."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vitkd_cli import __version__
from vitkd_cli.device import environment
from vitkd_cli.errors import UserError, expanded, writable
from vitkd_cli.files import write_text
from vitkd_cli.options import takes
from vitkd_cli.report.figures import Chart, drawn_curve, forest, reliability_chart
from vitkd_cli.report.found import FoundRun, found_runs
from vitkd_cli.report.logs import curves_of
from vitkd_cli.report.rows import columns_of
from vitkd_cli.report.sections import Section, Tell, section_of
from vitkd_cli.report.swept import Swept, is_sweep, swept_of
from vitkd_cli.requests import ReportRequest
from vitkd_cli.text import code, markdown

PICTURED = 3  # runs whose mistakes and attention a page shows
# What a column is, where its title does not say it.
COLUMNS = {
    "multiply-adds": "of one image",
    "weights": "size of their file",
    "latency": "from one image to its answer, the median, on this machine",
    "images/s": "and at which batch, as the run measured them",
    "top-1 (95 %)": "interval over seeds (Student's t); of a single model over images (Wilson)",
    "agrees": "names the teacher's class, share of the images",
    "ECE (chance)": "expected calibration error of the first seed's student in percent, and what 95 % of "
    "calibrated models stay below",
}


@dataclass(frozen=True)
class Report:
    """A page: its text, and the file that it is in; None where it was not written."""

    text: str
    path: Path | None = None

    def __repr__(self) -> str:
        return f"Report({self.path or 'not written'}, {len(self.text):,} characters)"


@takes(ReportRequest)
def write_report(request: ReportRequest, *, progress: Tell = lambda stage, done, total: None) -> Report:
    """Tell of runs in one page, or in Markdown.

    Args:
        request: or its settings, the run folders (or what ``distill`` returned) first.
        progress: told the stage, its parts done and in all.
    """
    runs = [getattr(run, "folder", run) for run in request.runs]
    if not runs:
        raise UserError("there is no run to report on", "name the folder of a run")
    found = found_runs(runs)
    path = _place(request, found)
    swept = [swept_of(place, f"sweep{n}") for n, place in enumerate(filter(is_sweep, map(expanded, runs)))]
    sections = [
        section_of(
            one,
            f"{one.name}: " if len(found) > 1 else "",
            progress,
            pictures=not request.markdown and number < PICTURED,
        )
        for number, one in enumerate(found)
    ]
    context: dict[str, Any] = {
        "swept": swept,
        "sections": sections,
        "headed": _headed(sections, swept),
        "arms": [arm for one in found for arm in one.arms],
        "columns": columns_of([row for one in sections for row in one.rows]),
        "about": COLUMNS,
        "environment": environment(),
        "version": __version__,
        "pictured": PICTURED,
    }
    if not request.markdown:
        context |= _charts(sections, progress)
    template = "page.md" if request.markdown else "page.html"
    text = _templates(template).get_template(template).render(context)
    if path is not None:
        write_text(path, text)
    return Report(text, path)


def _place(request: ReportRequest, found: Sequence[FoundRun]) -> Path | None:
    """Where the page goes; Markdown that no file is named for goes nowhere."""
    endings = (".md", ".markdown") if request.markdown else (".html", ".htm")
    if request.output is not None:
        if Path(request.output).suffix.lower() not in endings:
            raise UserError(
                f"--output {request.output}: the page is a file whose name ends in {endings[0]}",
                "name it so; Markdown is written with --markdown, HTML without it",
            )
        return writable(request.output, "--output")
    if request.markdown:
        return None
    folder = found[0].place if len(found) == 1 else Path()
    return writable(folder / "report.html", "--output")


def _headed(sections: Sequence[Section], swept: Sequence[Swept]) -> list[Section]:
    """The runs with a verdict of their own on top: not a sweep's points, of which its table tells."""
    told = [it.folder for it in swept if it.table]
    return [
        one
        for one in sections
        if one.contrasts
        or one.found.state
        or one.found.notes
        or not any(one.found.folder.is_relative_to(folder) for folder in told)
    ]


def _charts(sections: Sequence[Section], progress: Tell) -> dict[str, Any]:
    """The figures of all runs together."""
    curves = curves_of([arm for one in sections for arm in one.found.arms])
    drawn: list[Chart] = []
    for number, curve in enumerate(curves):
        progress("drawing", number, len(curves))
        drawn.append(drawn_curve(curve, f"curve{number}"))
    contrasts = [row for one in sections for row in one.contrasts]
    bins = [
        (row.number, row.calibration) for one in sections for row in one.rows if row.calibration is not None
    ]
    return {
        "curves": drawn,
        "forest": forest(contrasts, "forest") if len(contrasts) > 1 else None,
        "reliability": reliability_chart(bins, "reliability") if bins else None,
    }


def _templates(name: str) -> Environment:
    """What is not HTML escapes each value by itself."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {"markdown": markdown, "code": code}
    return made
