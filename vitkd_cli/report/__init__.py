"""Runs → tables, pictures and a page."""

from vitkd_cli.report.curves import curves
from vitkd_cli.report.end import conclude
from vitkd_cli.report.page import Report, write_report
from vitkd_cli.report.sweeps import report_sweep, sweep_pictures, sweep_table
from vitkd_cli.report.tables import closing, plan_tables, verdict

__all__ = [
    "Report",
    "closing",
    "conclude",
    "curves",
    "plan_tables",
    "report_sweep",
    "sweep_pictures",
    "sweep_table",
    "verdict",
    "write_report",
]
