"""Training: the order of a run, the loop, its checkpoints."""

from vitkd_cli.progress import Reporter
from vitkd_cli.training.folder import Result, Run
from vitkd_cli.training.plan import Plan
from vitkd_cli.training.run import distill

__all__ = ["Plan", "Reporter", "Result", "Run", "distill"]
