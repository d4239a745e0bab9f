"""What only a GPU can show; on other machines these are skipped."""

from __future__ import annotations

import json
import math

import pytest
import torch

import vitkd_cli as vitkd
from vitkd_cli.training import Reporter

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_run_on_the_gpu(tiny, tmp_path, precision):
    values = {**tiny, "device": "cuda", "mixed_precision": precision, "steps": 6, "model_ema": True}
    recipe = vitkd.Recipe(**values, output=str(tmp_path / "run"))
    run = vitkd.distill(recipe, reporter=Reporter(silent=True))
    lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines)
    assert run.results[0].images_per_second > 0


def test_the_gpu_follows_the_cpu(tiny, tmp_path, read_log):
    logs = []
    for device in ("cpu", "cuda"):
        values = {**tiny, "device": device, "mixed_precision": "no", "model_dtype": "float64", "steps": 5}
        recipe = vitkd.Recipe(**values, output=str(tmp_path / device))
        logs.append(read_log(vitkd.distill(recipe, reporter=Reporter(silent=True)).folder))
    for ours, theirs in zip(*logs, strict=True):
        if "event" not in ours:
            assert ours == pytest.approx(theirs, rel=1e-6)
