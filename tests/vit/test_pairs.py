"""Any model teaches any other: a sample of ordered pairs over all structures goes through a rehearsal."""

from __future__ import annotations

import random

import pytest
import torch
from zoo import SMALL

from vitkd_cli.data.datasets import open_data
from vitkd_cli.objective import Objective, parse
from vitkd_cli.recipe import Recipe
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.training.models import student_of, teacher_of
from vitkd_cli.training.rehearsal import rehearse
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import resolve
from vitkd_cli.vit.zoo import zoo

# Every structure once, as a teacher or as a student, but for those whose images are very large.
NAMES = sorted(name for name in SMALL if max(zoo()[name]["input_size"]) < 700)
random.Random(0).shuffle(NAMES)
PAIRS = list(zip(NAMES[::2], NAMES[1::2], strict=False))
DIGITS = open_data(data="digits")


def spelled(name: str) -> str:
    """Constructor arguments that make a model small, as a recipe has them."""
    return ",".join(f"{key}={value}".replace(" ", "") for key, value in SMALL[name].items())


@pytest.mark.parametrize(("teacher_name", "student_name"), PAIRS)
def test_a_pair_is_rehearsed(teacher_name, student_name):
    has_logits = all(zoo()[name]["embed_dim"] for name in (teacher_name, student_name))
    # A single block has no second one to mimic.
    shallow = "3e-5*mimic(blocks=0) + 3e-6*generate"
    formula = parse(f"labels + kd + {shallow}" if has_logits else shallow)
    recipe = Recipe(
        teacher=teacher_name,
        teacher_pretrained=False,
        teacher_kwargs=spelled(teacher_name),
        student=student_name,
        model_kwargs=spelled(student_name),
    )
    if not has_logits:
        recipe = recipe.but(num_classes=0)
    student = student_of(recipe, resolve(student_name), DIGITS)
    teacher = teacher_of(recipe, formula.reads_teacher_logits, resolve(teacher_name), student, DIGITS)
    objective = Objective(formula, student.spec, teacher.spec)
    across = student.spec.hierarchical != teacher.spec.hierarchical
    assert across == any("kd is the safer choice" in warning for warning in objective.warnings)
    found = rehearse(
        Learner(student.net, objective, student.spec),
        Teacher(teacher, objective.teacher_taps),
        size=tuple(map(max, zip(student.spec.input_size, teacher.spec.input_size, strict=True))),
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    weights = (path for path, p in student.net.named_parameters() if p.ndim > 1)
    first = next(path for path in weights if "token" not in path and "pos" not in path)
    assert first not in found.frozen


def sizes(teacher: str, student: str, loss: str, **changes) -> tuple[Model, Model]:
    recipe = Recipe(teacher=teacher, student=student, teacher_pretrained=False, **changes)
    ours = student_of(recipe, resolve(student), DIGITS)
    return teacher_of(recipe, parse(loss).reads_teacher_logits, resolve(teacher), ours, DIGITS), ours


FLAT = {"model_kwargs": "depth=2,embed_dim=24,num_heads=3"}  # 224 px, 14×14


@pytest.mark.parametrize(
    ("teacher", "kwargs", "loss", "size"),
    [
        ("vit_small_patch14_reg4_dinov2", "depth=2", "vitkd", 196),  # the size that gives the student's grid
        ("vit_small_patch14_reg4_dinov2", "depth=2,num_classes=10", "labels + kd + vitkd", 518),  # its own
        ("vit_small_patch14_reg4_dinov2", "depth=2,img_size=140", "vitkd", 140),  # the user's
        ("swin_tiny_patch4_window7_224", "depths=(1,1,1,1)", "spectral(blocks=-1)", 224),  # by stride
        ("pit_ti_224", None, "mimic(blocks=-1)", 224),  # ends in its class token
        ("convit_tiny", "depth=2,img_size=64", "vitkd", 64),
    ],
)  # fmt: skip
def test_the_teacher_s_size(teacher, kwargs, loss, size):
    found, _ = sizes(teacher, "vit_tiny_patch16_224", loss, teacher_kwargs=kwargs, **FLAT)
    assert found.spec.input_size == (size, size)


@pytest.mark.parametrize(
    ("teacher", "kwargs", "student", "side"),
    [
        # it refuses the size in the forward, where it pools three patches by three
        ("gemma4_vit_167m_enc", "depth=1,embed_dim=96,num_heads=3", "vit_tiny_patch16_224", 48),
    ],
)
def test_a_teacher_that_takes_no_other_size_keeps_its_own(teacher, kwargs, student, side):
    student_kwargs = {"model_kwargs": "img_size=64"}
    found, ours = sizes(teacher, student, "spectral(blocks=-1)", teacher_kwargs=kwargs, **student_kwargs)
    assert found.spec.final_grid == (side, side) != ours.spec.final_grid


def test_a_teacher_without_an_argument_for_its_size_takes_another():
    found, ours = sizes(
        "tiny_vit_5m_224", "swin_tiny_patch4_window7_224", "spectral(blocks=-1)", model_kwargs="img_size=64"
    )
    assert found.spec.final_grid == ours.spec.final_grid == (2, 2)


@pytest.mark.parametrize(("loss", "noted"), [("features", 1), ("mimic(blocks=-1)", 1), ("labels + kd", 0)])
def test_a_flat_and_a_hierarchical_model_are_noted_once(loss, noted):
    swin = {"model_kwargs": "img_size=64,window_size=4,depths=(1,1,1,1)"}
    kwargs = "img_size=64,depth=2,num_classes=10"
    teacher, student = sizes(
        "deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", loss, teacher_kwargs=kwargs, **swin
    )
    warnings = Objective(loss, student.spec, teacher.spec).warnings
    assert sum("kd is the safer choice" in warning for warning in warnings) == noted
