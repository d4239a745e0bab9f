"""Runs → tables and pictures."""

from vitkd_cli.report.curves import curves
from vitkd_cli.report.sweeps import report_sweep, sweep_pictures, sweep_table
from vitkd_cli.report.tables import closing, plan_tables, report, verdict

__all__ = [
    "closing",
    "curves",
    "plan_tables",
    "report",
    "report_sweep",
    "sweep_pictures",
    "sweep_table",
    "verdict",
]
