"""Our loss curves beside those of timm's distillation tasks, on the same batches and weights.

    python benchmarks/against_timm.py

tests/terms/test_against_timm.py holds them together; float64, AdamW, 20 updates.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "terms"))

from test_against_timm import TASKS, curves

if __name__ == "__main__":
    for formula, (_, task, _) in TASKS.items():
        print(f"\n{'update':>6}  {formula:>44}  {task.__name__:>22}  difference")
        for update, (ours, theirs) in enumerate(zip(*curves(formula), strict=True), 1):
            print(f"{update:>6}  {ours:>44.15f}  {theirs:>22.15f}  {ours - theirs:>10.1e}")
