"""Our objective beside timm's own distillation tasks, on the same batches and weights."""

import copy

import pytest
import timm
import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import LogitDistillationTask, TokenDistillationTask

from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import as_seen_by, describe

SIZE = {"img_size": 32, "patch_size": 8, "depth": 3, "num_heads": 3, "num_classes": 10}
# our formula: a distilled student and timm's task
TASKS = {
    "labels + kd": (False, LogitDistillationTask, {}),
    "0.3*labels + 0.7*kd(temperature=4)": (
        False,
        LogitDistillationTask,
        {"task_loss_weight": 0.3, "temperature": 4.0},
    ),
    "0.5*labels + 0.5*token": (
        True,
        TokenDistillationTask,
        {"distill_type": "hard", "task_loss_weight": 0.5},
    ),
    'labels + token(kind="soft", temperature=3)': (True, TokenDistillationTask, {"temperature": 3.0}),
}


def curves(formula, updates=20):
    """The loss of each update, ours and timm's, in float64 with AdamW."""
    distilled, task_type, options = TASKS[formula]
    torch.manual_seed(0)
    name = "deit_tiny_distilled_patch16_224" if distilled else "deit_tiny_patch16_224"
    student = timm.create_model(name, embed_dim=24, **SIZE).double()
    # a teacher with another mean and deviation than the student's
    teacher = timm.create_model("vit_tiny_patch16_224", embed_dim=48, **SIZE).double()
    with torch.no_grad():
        teacher.head.weight.mul_(50)  # timm begins with logits of almost 0, which teach nothing
    theirs = task_type(
        copy.deepcopy(student),
        copy.deepcopy(teacher).requires_grad_(False),
        LabelSmoothingCrossEntropy(0.1),
        dtype=torch.float64,
        verbose=False,
        **options,
    ).train()

    spec = describe(student)
    objective = Objective(formula, spec, describe(teacher))
    taught = Teacher(Model(teacher, objective.teacher, "random"), objective.teacher_taps)
    ours = Learner(student, objective, spec).train()

    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (ours, theirs.trainable_module)]
    losses = [], []
    for _ in range(updates):
        images = torch.rand(8, 3, 32, 32, dtype=torch.float64)
        labels = torch.randint(10, (8,))
        found = (
            ours(images, taught(images), Batch(labels))[0],
            theirs(as_seen_by(spec, images), labels)["loss"],
        )
        for loss, curve, optimizer in zip(found, losses, optimizers, strict=True):
            curve.append(float(loss.detach()))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("formula", TASKS)
def test_the_loss_curve_is_that_of_timms_task(formula):
    ours, theirs = curves(formula)
    assert len(set(ours)) == 20
    assert ours == pytest.approx(theirs, rel=1e-10)
