"""A run over cached images is the run over the files."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import vitkd_cli as vitkd
from vitkd_cli.recipe import recipe_of
from vitkd_cli.terminal import Terminal
from vitkd_cli.training import Reporter
from vitkd_cli.training.start import anchored

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
    assert recipe_of(Path(output)).input_backend == "pillow"  # settled when it began
    assert f"cache    {tmp_path / 'cache'}: " in capsys.readouterr().out


def test_a_place_is_found_from_another_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    places = [anchored(vitkd.Recipe(cache_images=place)).cache_images for place in ("off", "ram", "cache")]
    assert places == ["off", "ram", str(tmp_path / "cache")]


def test_a_run_from_before_there_was_a_choice_stays_pillows(tmp_path: Path) -> None:
    for backend in ("auto", "torchvision"):
        text = vitkd.Recipe(input_backend=backend).to_toml()
        (tmp_path / "recipe.toml").write_text(text)
        assert recipe_of(tmp_path).input_backend == backend
    without = "".join(line for line in text.splitlines(True) if not line.startswith("input_backend"))
    (tmp_path / "recipe.toml").write_text(without)
    assert recipe_of(tmp_path).input_backend == "pillow"
