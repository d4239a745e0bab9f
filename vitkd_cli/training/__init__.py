"""Training: the loop, its checkpoints, its processes, and the order of a run."""

from vitkd_cli.training.progress import Reporter
from vitkd_cli.training.run import Plan, Result, Run, distill

__all__ = ["Plan", "Reporter", "Result", "Run", "distill"]
