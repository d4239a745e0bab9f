"""Metrics over a dataset: each image once, whatever the batch and however many processes."""

from vitkd_cli.evaluation.accuracy import Evaluation, Evaluations, evaluate, evaluate_all, reassessed
from vitkd_cli.evaluation.metrics import Metrics, measure

__all__ = ["Evaluation", "Evaluations", "Metrics", "evaluate", "evaluate_all", "measure", "reassessed"]
