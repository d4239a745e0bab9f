"""Metrics over a dataset: each image once, whatever the batch and however many processes."""

from vitkd_cli.evaluation.accuracy import Evaluation, Metrics, evaluate, measure

__all__ = ["Evaluation", "Metrics", "evaluate", "measure"]
