"""Models whose weights are shared say, and learn, what whole ones do."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from zoo import LEVIT, small

from vitkd_cli import UserError, distill
from vitkd_cli.objective import Objective
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.terms import Batch
from vitkd_cli.training.learner import Learner
from vitkd_cli.training.sharding import as_parted, gathered, restore, share

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
LEVIT_KWARGS = ",".join(f"{key}={value}" for key, value in LEVIT.items())
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
        score = load_file(folder / "teacher" / "answers.safetensors")["rows"].tolist()
        return score, [read_log(folder / f"{arm}-42") for arm in ("distilled", "arms/kd")]

    assert run(shard_teacher=True) == run()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "then"),
    [
        (
            {"loss": "labels + vitkd + dist + relations", "grad_checkpointing": True, "shard_teacher": True},
            {},
        ),
        (
            {"loss": "labels + vitkd + nkd", "grad_accum_steps": 2, "batch_size": 4, "model_ema": True},
            {"shard": False, "num_processes": 1},
        ),
        (
            {"student": "levit_128s", "model_kwargs": LEVIT_KWARGS, "loss": "labels + kd", "model_ema": True},
            {},
        ),
    ],
    ids=["parts go on with parts", "one process goes on with the whole", "running statistics"],
)
def test_a_sharded_student_learns_what_a_whole_one_does(tiny, read_log, tmp_path, changes, then):
    def run(name, steps, **more):
        values = {**tiny, "batch_size": 10, "num_processes": 2, "steps": steps, "model_dtype": "float64"}
        recipe = Recipe(**{**values, **changes, **more}, output=str(tmp_path / name))
        distill(recipe, reporter=Reporter(silent=True))

    def left(name):
        updates = [line for line in read_log(tmp_path / name) if "event" not in line]
        return updates, load_file(tmp_path / name / "student" / "model.safetensors")

    run("whole", 4)
    run("shared", 2, shard=True, keep_checkpoints=True)
    distill(resume=tmp_path / "shared", machine={"steps": 4, **then}, reporter=Reporter(silent=True))
    (log, weights), (wanted, whole) = left("shared"), left("whole")
    assert len(log) == len(wanted) == 4
    for line, want in zip(log, wanted, strict=True):
        assert line == pytest.approx(want, rel=1e-9)
    torch.testing.assert_close(weights, whole, rtol=1e-6, atol=1e-7)  # in float32, as students are saved


@pytest.mark.parametrize("other", [{"teacher_cache": "answers"}, {"torchcompile": True}])
def test_what_a_sharded_teacher_does_not_go_with_is_named(other):
    flag = next(iter(other)).replace("_", "-")
    with pytest.raises(UserError, match=f"--shard-teacher does not go with --{flag}"):
        Recipe(shard_teacher=True, **other)


@pytest.mark.parametrize("flag", ["shard", "shard_teacher"])
def test_one_process_shares_with_nobody(flag):
    with pytest.raises(UserError, match="and there is one") as refused:
        Session(Recipe(**{flag: True}, device="cpu"), Reporter(silent=True))
    assert f"--no-{flag.replace('_', '-')}" in refused.value.hint


@pytest.mark.parametrize(
    ("flag", "other"),
    [
        ("torchcompile", {"torchcompile": True}),
        ("clip-mode agc", {"clip_mode": "agc"}),
        ("mixed-precision fp16", {"mixed_precision": "fp16"}),
        ("opt adafactor", {"opt": "adafactor"}),
    ],
)
def test_what_a_sharded_student_does_not_go_with_is_named(flag, other):
    with pytest.raises(UserError, match=f"--shard does not go with --{flag}"):
        Recipe(shard=True, **other)


@pytest.fixture
def alone():
    """A session of one process, whose parts are the whole."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    accelerator = SimpleNamespace(num_processes=1, is_main_process=True)
    yield SimpleNamespace(accelerator=accelerator, device=torch.device("cpu"), dtype=torch.float32)
    torch.distributed.destroy_process_group()


def test_weights_and_optimizer_are_gathered_as_they_were_parted(alone):
    def built(shared):
        model = small("vit_tiny_patch16_224")
        learner = Learner(model.net, Objective("labels", model.spec, None), model.spec)
        if shared:
            share(learner, alone)
        return learner, torch.optim.AdamW(learner.parameters(), lr=0.1)

    torch.manual_seed(0)
    (learner, optimizer), (other, its_optimizer) = built(True), built(True)
    plain, plain_optimizer = built(False)
    images, labels = torch.rand(2, 3, *learner.spec.input_size), torch.arange(2)

    def trained(one, by):
        one(images, {}, Batch(targets=labels, generator=torch.Generator(), global_size=2))[0].backward()
        by.step()
        by.zero_grad()
        return gathered(one.state_dict(), alone)

    trained(learner, optimizer)
    # Copies: of one process, what is gathered or parted may be the same memory.
    weights, state = copy.deepcopy(gathered((learner.state_dict(), optimizer.state_dict()), alone))
    restore(other, weights)
    its_optimizer.load_state_dict(as_parted(copy.deepcopy(state), its_optimizer))
    plain.load_state_dict(weights)
    plain_optimizer.load_state_dict(state)
    wanted = trained(plain, plain_optimizer)
    torch.testing.assert_close(trained(learner, optimizer), wanted)
    torch.testing.assert_close(trained(other, its_optimizer), wanted)
    assert all(isinstance(p, DTensor) for p in other.parameters())


@pytest.mark.parametrize(
    ("loss", "told"), [("mimic(blocks=0)", "student's end"), ("labels + mimic(balance=0.1)", "balance")]
)
def test_a_formula_that_takes_whole_weights_is_refused(alone, loss, told):
    model = small("vit_tiny_patch16_224")
    with pytest.raises(UserError, match=told):
        share(Learner(model.net, Objective(loss, model.spec, model.spec), model.spec), alone)
