"""Metrics over a dataset: each image once, whatever the batch and however many processes."""

from vitkd_cli.evaluation.accuracy import evaluate, evaluate_all
from vitkd_cli.evaluation.metrics import Metrics, measure
from vitkd_cli.evaluation.predictions import Predictions, predict
from vitkd_cli.evaluation.results import Evaluation, Evaluations, reassessed

__all__ = [
    "Evaluation",
    "Evaluations",
    "Metrics",
    "Predictions",
    "evaluate",
    "evaluate_all",
    "measure",
    "predict",
    "reassessed",
]
