"""A run over cached images is the run over the files."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import vitkd_cli as vitkd
from vitkd_cli.terminal import Terminal
from vitkd_cli.training import Reporter

STUDENT = {
    "student": "vit_tiny",
    "model_kwargs": "img_size=32,patch_size=8,embed_dim=24,depth=3,num_heads=3",
    "loss": "labels",
    "epochs": 1,
    "batch_size": 12,
    "workers": 0,
    "device": "cpu",
}


def test_a_run_over_cached_images_gives_the_same_student(photos: Path, tmp_path: Path, capsys) -> None:
    weights = []
    for place in ("off", str(tmp_path / "cache")):
        output = str(tmp_path / f"run-{len(weights)}")
        recipe = vitkd.Recipe(**STUDENT, data=str(photos), output=output, cache_images=place)
        vitkd.distill(recipe, reporter=Reporter(Terminal()))
        weights.append(load_file(Path(output) / "student" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert f"cache    {tmp_path / 'cache'}: " in capsys.readouterr().out
