"""Sweeps: one recipe at many points, compared."""

from vitkd_cli.sweeps.outcome import Outcome, Sweep
from vitkd_cli.sweeps.run import read_sweep, sweep

__all__ = ["Outcome", "Sweep", "read_sweep", "sweep"]
