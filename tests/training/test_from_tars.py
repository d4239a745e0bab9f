"""Training from tars: any number of processes and workers, killed and resumed, is one and the same run."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import psutil
import pytest

from vitkd_cli import Recipe, distill
from vitkd_cli.data.datasets import open_data
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.images import Provenance
from vitkd_cli.progress import Reporter

SIZES = (31, 7, 42, 40)  # of the tars


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    """Twelve digits of each kind, in WebDataset's tars."""
    folder = tmp_path_factory.mktemp("shards")
    images = open_data(data="digits", shots=12).train
    numbers = iter(range(len(images)))
    for shard, size in enumerate(SIZES):
        with tarfile.open(folder / f"digits-{shard:06d}.tar", "w") as tar:
            for number in (next(numbers) for _ in range(size)):
                image, label = images[number]
                file = io.BytesIO()
                image.save(file, "png")
                for ending, content in (("png", file.getvalue()), ("cls", str(label).encode())):
                    info = tarfile.TarInfo(f"{number:04d}.{ending}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return folder


@pytest.fixture
def values(tiny, shards):
    pattern = f"wds:{shards}/digits-{{000000..{len(SIZES) - 1:06d}}}.tar"
    return {
        **tiny,
        "data": pattern,
        "shots": None,
        "epochs": 3,
        "recovery_interval": 2,
        "model_dtype": "float64",
    }


def train(values, folder, **changes):
    distill(Recipe(**{**values, **changes}, output=str(folder)), reporter=Reporter(silent=True))
    return folder


def test_a_run_knows_the_tars_that_it_learned_from(values, shards, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(shards)
    run = train({**values, "data": "wds:digits-{000000..000003}.tar"}, tmp_path / "run", steps=2)
    recipe = Recipe.from_toml(run / "recipe.toml")
    assert recipe.data == values["data"] and not (run / "split.json").exists()
    (record,) = [json.loads((run / "data.json").read_text())["validation"]]
    for place in (recipe.data, "wds:digits-{000000..000003}.tar"):
        chosen = Provenance([str(run)]).images(place)
        assert len(chosen.images) == record["images"] < sum(SIZES) and "set aside" in chosen.about
    (note,) = Provenance([str(run)]).images(f"wds:{shards}").notes  # the same ones, named otherwise
    assert "learned from 4 of these 4 tars" in note
    code, _, err = cli("distill", "--resume", str(run), "--epochs", "4")
    assert code == 2 and "--keep-checkpoints" in err  # the data itself is as it was
    moved = tmp_path / "shards"
    moved.mkdir()
    for tar in shards.glob("*.tar"):
        (moved / tar.name).symlink_to(tar)
    (moved / "digits-000003.tar").unlink()
    with pytest.raises(UserError, match=r"digits-000003\.tar is missing"):
        train(values, tmp_path / "other", data=f"wds:{moved}/digits-{{000000..000003}}.tar")
    code, _, err = cli("predict", str(run), "--images", f"wds:{moved}", "--output", str(tmp_path / "a.csv"))
    assert code == 0, err
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 1 + sum(SIZES[:3])


def assert_same(ours, theirs):
    assert len(ours) == len(theirs) > 12
    for one, other in zip(ours, theirs, strict=True):
        numbers = [{k: v for k, v in line.items() if k != "event"} for line in (one, other)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-9, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 2])
def test_killed_and_resumed_with_another_number_of_processes(values, flags, cli, read_log, tmp_path, first):
    """One process without workers, and two with two workers each."""
    whole = train(values, tmp_path / "whole")
    shared = {"num_processes": 2, "batch_size": 10, "workers": 2}
    assert_same(read_log(whole), read_log(train(values, tmp_path / "shared", **shared)))

    stopped = tmp_path / "stopped"
    alone = {"batch_size": 10, "grad_accum_steps": 2}
    begun = {**values, **(shared if first == 2 else alone)}
    given = flags({key: value for key, value in begun.items() if value is not None})
    process = subprocess.Popen(
        [sys.executable, "-m", "vitkd_cli", "distill", *given, "--output", str(stopped)],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log = stopped / "log.jsonl"
    while not log.exists() or not any('"update": 7' in line for line in log.read_text().splitlines()):
        assert process.poll() is None
        time.sleep(0.02)
    for one in (process, *psutil.Process(process.pid).children(recursive=True)):
        one.kill()  # in the middle of an epoch of five updates
    process.wait(timeout=60)
    assert not (stopped / "run.json").exists()
    distill(
        resume=str(stopped),
        machine={"num_processes": 3 - first, "workers": 1},
        reporter=Reporter(silent=True),
    )
    assert_same(read_log(whole), read_log(stopped))
