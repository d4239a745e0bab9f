"""A teacher whose weights are shared among the processes says what a whole one says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vitkd_cli import UserError, distill
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session

# What two processes find: for each model and precision how far its signals are from those of the whole one,
# the share of the weights that a process holds, and their types.
TWO = """
import json, os, sys
from types import SimpleNamespace
import torch
from accelerate import Accelerator
from test_teacher import taught
from zoo import small
from vitkd_cli import UserError
from vitkd_cli.training.learner import Teacher
from vitkd_cli.training.sharding import shared

def compared(name, accelerator, precision):
    def first(act):
        if accelerator.is_main_process:
            act()
    session = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=2, is_main_process=accelerator.is_main_process, mixed_precision=precision,
            autocast=lambda: torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
        ),
        main_process_first=first, device=torch.device("cpu"), dtype=torch.float32,
    )
    whole, images = taught(small(name))
    images = images + accelerator.process_index
    with session.accelerator.autocast():
        said = whole(images)
    whole.tapped.release()
    total = sum(p.numel() for p in whole.built.net.parameters())
    try:
        parts = shared({True: whole.built, False: whole.built}, session)
    except UserError as problem:
        return problem.message
    assert parts[True] is parts[False]
    teacher = Teacher(parts[True], whole.taps)
    with session.accelerator.autocast():
        again = [teacher(images) for _ in range(2)][1]
    off = max(float((again[tap].double() - signal.double()).abs().max()) for tap, signal in said.items())
    parameters = [p for p in parts[True].net.parameters() if hasattr(p, "to_local")]
    held = sum(p.to_local().numel() for p in parameters)
    return off, held / total, sorted({str(p.dtype) for p in parameters})

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)
found = {name: compared(*name.split("/")[:1], accelerator, name.split("/")[1]) for name in sys.argv[2:]}
with open(f"{sys.argv[1]}/{accelerator.process_index}.json", "w") as file:
    json.dump(found, file)
accelerator.wait_for_everyone()
accelerator.end_training()
"""
FAMILIES = (
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "hiera_tiny_224"),
    *("swin_tiny_patch4_window7_224", "cait_xxs24_224", "eva02_tiny_patch14_224"),
)

REFUSED = ("coat_tiny/no",)  # its blocks share weights


@pytest.mark.slow
def test_a_sharded_teacher_says_what_the_whole_one_says(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO)
    wanted = [f"{name}/{precision}" for name in FAMILIES for precision in ("no", "bf16")]
    here = Path(__file__).parents[1]
    path = os.pathsep.join([str(here), str(here / "training"), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(script)]
    subprocess.run(
        [*command, str(tmp_path), *wanted, *REFUSED], check=True, env={**os.environ, "PYTHONPATH": path}
    )
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert all("cannot be gathered one by one" in found.pop(name) for name in REFUSED)
        for name, (off, held, types) in found.items():
            assert off == 0.0, name
            assert held < 0.6, name
            assert ("torch.bfloat16" in types) is name.endswith("bf16")


@pytest.mark.slow
def test_a_student_learns_the_same_from_a_sharded_teacher(tiny, read_log, tmp_path):
    def run(**changes):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        values = {**tiny, "batch_size": 10, "num_processes": 2, "steps": 4, "model_dtype": "float64"}
        values |= {"against": ("labels + kd; name=kd",), "loss": "labels + vitkd"}
        distill(Recipe(**{**values, **changes}, output=str(folder)), reporter=Reporter(silent=True))
        return [read_log(folder / f"{arm}-42") for arm in ("distilled", "arms/kd")]

    assert run(shard_teacher=True) == run()


@pytest.mark.parametrize("other", [{"teacher_cache": "answers"}, {"torchcompile": True}])
def test_what_a_sharded_teacher_does_not_go_with_is_named(other):
    flag = next(iter(other)).replace("_", "-")
    with pytest.raises(UserError, match=f"--shard-teacher does not go with --{flag}"):
        Recipe(shard_teacher=True, **other)


def test_one_process_shares_with_nobody():
    with pytest.raises(UserError, match="and there is one") as refused:
        Session(Recipe(shard_teacher=True, device="cpu"), Reporter(silent=True))
    assert "--no-shard-teacher" in refused.value.hint
