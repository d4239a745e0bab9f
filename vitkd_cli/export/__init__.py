"""A student in the form that others load, each form checked against the student on real images."""

from vitkd_cli.export.export import TARGETS, Exported, export

__all__ = ["TARGETS", "Exported", "export"]
