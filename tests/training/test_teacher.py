"""The teacher while a student learns from it: its weights' memory changes, and what it says does not."""

from __future__ import annotations

import pytest
import torch
from zoo import SMALL, noise, small

from vitkd_cli import distill
from vitkd_cli.progress import Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.report.tables import plan_tables
from vitkd_cli.training import costs
from vitkd_cli.training.learner import Teacher
from vitkd_cli.vit.taps import EMBEDDING, LOGITS, features

FAMILIES = (
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224", "hiera_tiny_224"),
    *("swin_tiny_patch4_window7_224", "cait_xxs24_224", "eva02_tiny_patch14_224", "levit_128s"),
)


def taught(model):
    """A teacher of whatever a model can tell, and images for it."""
    spec = model.spec
    taps = {features(block) for block in range(spec.depth)}
    taps |= {LOGITS} if spec.num_classes else set()
    taps |= {EMBEDDING} if spec.embed_dim else set()
    return Teacher(model, frozenset(taps)), noise(model)


@pytest.mark.parametrize(
    "name", [name if name in FAMILIES else pytest.param(name, marks=pytest.mark.slow) for name in SMALL]
)
def test_weights_in_bf16_say_the_same_to_the_bit(name):
    teacher, images = taught(small(name))
    whole, before = teacher.bytes, [p.detach().clone() for p in teacher.built.net.parameters()]
    layers = [x for x in teacher.built.net.modules() if isinstance(x, (torch.nn.Linear, torch.nn.Conv2d))]
    products = sum(p.nbytes for p in {p for x in layers for p in x.parameters(recurse=False)})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        said = teacher(images)
        teacher.try_bf16(images)
        assert all(map(torch.equal, teacher.built.net.parameters(), before))  # so far it was a trial
        expected = teacher.bytes
        teacher.halve()
        again = teacher(images)
    assert all(torch.equal(again[tap], signal) for tap, signal in said.items())
    assert teacher.bytes == expected == sum(p.nbytes for p in teacher.built.net.parameters())
    assert whole - teacher.bytes > 0.4 * products  # the rest are tables of embeddings, and norms


def test_a_teacher_that_would_say_something_else_keeps_its_weights():
    model = small("vit_tiny_patch16_224")

    class Scaled(torch.nn.Identity):
        def forward(self, tokens):
            return tokens * (1 + model.net.blocks[0].attn.proj.weight.sum())

    model.net.norm = Scaled()
    teacher, images = taught(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        teacher.try_bf16(images)
    assert teacher.rounded == ()
    teacher.halve()
    assert {p.dtype for p in model.net.parameters()} == {torch.float32}


def test_a_run_in_bf16_learns_the_same_from_half_the_memory(tiny, read_log, tmp_path, monkeypatch):
    plans, kept = [], []
    monkeypatch.setattr(costs, "SPEED_SECONDS", 0.0)

    def run(name):
        values = {**tiny, "steps": 2, "mixed_precision": "bf16", "loss": "labels + vitkd + kd"}
        recipe = Recipe(
            **values,
            val_fraction=0,
            seeds=2,  # the second finds the teacher as the first one left it
            view_seed=1,
            teacher_cache=str(tmp_path / "answers" / name),
            output=str(tmp_path / name),
        )
        distill(recipe, reporter=Reporter(silent=True), show_plan=plans.append)
        return [read_log(tmp_path / name / f"distilled-{seed}") for seed in (42, 43)]

    halve = Teacher.halve
    monkeypatch.setattr(Teacher, "halve", lambda self: kept.append((halve(self), self.built.net)))
    halved = run("half")
    assert halved[0] != halved[1]
    assert {p.dtype for p in kept[-1][1].parameters()} == {torch.float32, torch.bfloat16}
    monkeypatch.setattr(Teacher, "halve", lambda self: None)
    assert run("whole") == halved
    [line] = [line for line in plan_tables(plans[0])[-1].splitlines() if line.startswith("teacher")]
    assert "in bf16" in line
