"""How far our terms are from the published losses: the table of docs/golden.md, printed and written.

    python benchmarks/golden.py

The files are those of tests/golden, the formulas and the comparison those of tests/terms/golden_cases.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "terms"))

from conftest import vit_spec
from golden_cases import CASES, NOT_BUILT
from test_docs import with_table

PAGE = Path(__file__).parents[1] / "docs" / "golden.md"


def table() -> str:
    lines = [
        f"torch {torch.__version__.partition('+')[0]}, on a CPU.",
        "",
        "| file | formula | loss, float64 | gradient | loss, float32 | gradient |",
        "|---|---|---|---|---|---|",
    ]
    for case in CASES:
        double, single = (case.deviation(dtype, vit_spec) for dtype in (torch.float64, torch.float32))
        figures = (double.loss, double.gradient, single.loss, single.gradient)
        cells = (f"{figure:.0e}" if figure else "0" for figure in figures)
        lines.append(f"| `{case.path.stem}` | `{case.formula}` | {' | '.join(cells)} |")
    lines += ["", "| published loss | files | why no term computes it |", "|---|---|---|"]
    lines += [f"| `{method}` | {files} | {why} |" for method, (files, why) in NOT_BUILT.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(written := table())
    PAGE.write_text(with_table(PAGE.read_text(), "golden", written))
