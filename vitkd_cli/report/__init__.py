"""Runs → tables, pictures and a page."""

import sys
from types import ModuleType
from typing import Any

from vitkd_cli.report.curves import curves
from vitkd_cli.report.end import conclude
from vitkd_cli.report.page import Report, report
from vitkd_cli.report.sweeps import report_sweep, sweep_pictures, sweep_table
from vitkd_cli.report.tables import closing, plan_tables, verdict

__all__ = [
    "Report",
    "closing",
    "conclude",
    "curves",
    "plan_tables",
    "report",
    "report_sweep",
    "sweep_pictures",
    "sweep_table",
    "verdict",
]


class _Room(ModuleType):
    """``vitkd_cli.report`` is this room and, to whoever calls it, its function of the same name."""

    def __call__(self, *given: Any, **settings: Any) -> Report:
        drawn: Report = report(*given, **settings)
        return drawn


sys.modules[__name__].__class__ = _Room
