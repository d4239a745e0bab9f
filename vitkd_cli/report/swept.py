"""What a page tells of a sweep as a whole, above its points."""

from dataclasses import dataclass, replace
from pathlib import Path

from vitkd_cli.report.figures import Chart, in_page_style
from vitkd_cli.report.found import attempted
from vitkd_cli.report.sweeps import sweep_figure, sweep_table
from vitkd_cli.sweeps import Sweep, read_sweep
from vitkd_cli.sweeps.folder import ASKED
from vitkd_cli.terminal import Fitted
from vitkd_cli.text import plain, without_places


@dataclass(frozen=True)
class Swept:
    """A sweep.

    Attributes:
        sentence: does the best point differ from the default beyond chance; or why nothing can be told.
        table: every point, best first.
    """

    folder: Path
    name: str
    sentence: str
    table: Fitted | None = None
    picture: Chart | None = None


def is_sweep(folder: Path) -> bool:
    return (folder / ASKED).is_file()


def swept_of(folder: Path, name: str) -> Swept:
    """A sweep as far as it has come.

    Args:
        name: of its picture, in the page.
    """
    folder = folder.resolve()
    title = plain(folder.name)
    found, why = attempted("This sweep as a whole cannot be told", lambda: read_sweep(folder))
    return _swept(found, title, name) if found is not None else Swept(folder, title, why)


def _swept(found: Sweep, title: str, name: str) -> Swept:
    table = sweep_table(found, most=None)
    # Its command names the students: by the sweep's own folder, without those above.
    sentence = replace(found, folder=Path(title)).sentence()
    return Swept(
        found.folder,
        title,
        without_places(sentence),
        replace(table, rows=[[without_places(cell) for cell in row] for row in table.rows]),
        in_page_style(lambda: sweep_figure(found), name, "Top-1 by what is varied"),
    )
