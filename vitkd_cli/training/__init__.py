"""Training: the loop, its checkpoints, its processes, and the order of a run."""

from vitkd_cli.progress import Reporter
from vitkd_cli.training.folder import Result, Run
from vitkd_cli.training.plan import Plan
from vitkd_cli.training.run import distill

__all__ = ["Plan", "Reporter", "Result", "Run", "distill"]
