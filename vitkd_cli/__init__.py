"""vitkd: distil any timm vision transformer into a smaller one, with the evidence that it is better.

import vitkd_cli as vitkd

run = vitkd.distill(vitkd.Recipe(teacher="deit3_small", student="deit_tiny", data="~/imagenet"))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from vitkd_cli.errors import UserError as UserError
    from vitkd_cli.evaluation import Evaluation as Evaluation
    from vitkd_cli.evaluation import evaluate as evaluate
    from vitkd_cli.evaluation import evaluate_all as evaluate_all
    from vitkd_cli.evaluation import predict as predict
    from vitkd_cli.inspection.run import inspect_attention as inspect_attention
    from vitkd_cli.objective import Objective as Objective
    from vitkd_cli.recipe import Recipe as Recipe
    from vitkd_cli.report.page import Report as Report
    from vitkd_cli.report.page import write_report as write_report
    from vitkd_cli.sweeps import Sweep as Sweep
    from vitkd_cli.sweeps import read_sweep as read_sweep
    from vitkd_cli.sweeps import sweep as sweep
    from vitkd_cli.terms import Batch as Batch
    from vitkd_cli.terms import Term as Term
    from vitkd_cli.terms import term as term
    from vitkd_cli.training import Run as Run
    from vitkd_cli.training import distill as distill
    from vitkd_cli.vit.names import resolve as resolve
    from vitkd_cli.vit.spec import ViTSpec as ViTSpec
    from vitkd_cli.vit.spec import describe as describe
    from vitkd_cli.vit.taps import Tap as Tap
    from vitkd_cli.vit.taps import TappedViT as TappedViT

# Where the public names live. They load when they are asked for: `vitkd --help` needs no torch.
_NAMES = {
    "errors": ("UserError",),
    "evaluation": ("Evaluation", "evaluate", "evaluate_all", "predict"),
    "inspection.run": ("inspect_attention",),
    "objective": ("Objective",),
    "recipe": ("Recipe",),
    "report.page": ("Report", "write_report"),
    "sweeps": ("Sweep", "read_sweep", "sweep"),
    "terms": ("Batch", "Term", "term"),
    "training": ("Run", "distill"),
    "vit.names": ("resolve",),
    "vit.spec": ("ViTSpec", "describe"),
    "vit.taps": ("Tap", "TappedViT"),
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names}
__all__ = [*_HOMES, "__version__"]


def __dir__() -> list[str]:
    return sorted(__all__)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"vitkd_cli.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'vitkd_cli' has no attribute {name!r}")
