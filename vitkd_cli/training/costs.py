"""What a run will take: time, disk, and the share of each of its models."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from vitkd_cli.data.images import ImageData
from vitkd_cli.evaluation.cost import timed
from vitkd_cli.progress import Stage
from vitkd_cli.session import Session
from vitkd_cli.training.plan import Arm, Estimate, Plan
from vitkd_cli.training.rehearsal import rehearse
from vitkd_cli.training.teachers import RunTeacher, Teachers
from vitkd_cli.vit.model import Model

SPEED_SECONDS = 2.0  # for measuring images per second
TUNING = "fine-tuning the teacher"


def cost_of(plan: Plan, session: Session, title: str) -> Estimate:
    """The cost of a rehearsed arm, by three more rehearsals."""
    arm, recipe, images = plan.arm, plan.recipe, plan.rehearsal.images
    options: dict[str, Any] = {"device": session.device, "dtype": session.dtype, "images": images}
    seconds = _least_seconds(lambda: rehearse(plan.learner, plan.tapped, size=plan.size, **options))
    epoch = seconds / images * recipe.device_batch * arm.updates_per_epoch
    epochs = arm.updates / arm.updates_per_epoch
    weights, own = _bytes(plan.learner), _bytes(plan.student.net)
    checkpoint = weights * (4 if recipe.model_ema else 3)  # AdamW's two moments, and the average
    left = own + (own if plan.data.val is not None else 0)  # the student, and the best on validation
    return Estimate(
        title,
        epoch=epoch,
        training=epoch * epochs,
        validation=scoring_seconds(plan.student, plan.data, session)
        * (math.ceil(epochs / recipe.val_interval) + 1),
        disk=left + checkpoint * (recipe.checkpoint_hist + 1),
        kept=left + (checkpoint * recipe.checkpoint_hist if recipe.keep_checkpoints else weights),
    )


def scoring_seconds(model: Model, data: ImageData, session: Session) -> float:
    """Seconds that a model takes for the validation split, without reading the images."""
    if data.val is None:
        return 0.0
    count = len(data.val) + (len(data.bank) if data.bank is not None and data.bank is not data.val else 0)
    spec, net = model.spec, model.net
    if not isinstance(net, FSDPModule):  # which is in its place
        net.to(session.device, session.dtype)
    noise = torch.rand(8, len(spec.mean), *spec.input_size).to(session.device, session.dtype)
    training = net.training
    net.eval()
    with torch.inference_mode(), session.accelerator.autocast():
        seconds = _least_seconds(lambda: net(noise))
    net.train(training)
    return seconds / len(noise) * count / session.accelerator.num_processes


def _least_seconds(act: Callable[[], Any]) -> float:
    """The shortest of three times."""
    return min(timed(act)[1] for _ in range(3))


def _bytes(net: nn.Module) -> int:
    return sum(p.nbytes for p in net.parameters())


def stages(
    student: Model, arms: Sequence[Arm], teachers: Teachers, tunings: Sequence[tuple[RunTeacher, Arm]]
) -> list[Stage]:
    """The models that will be trained, in order, each with the multiply-adds of an update.

    Backward costs twice what forward does, and a teacher that is imitated has none.
    """
    found = []
    for teacher, arm in tunings:
        found.append(Stage(arm.name, arm.updates, 3 * teacher.model.multiply_adds * arm.recipe.global_batch))
    for number, arm in enumerate(arms, 1):
        taught = teachers.model_of(arm.written)
        cost = 3 * student.multiply_adds + (taught.multiply_adds if taught else 0)
        title = "student" if len(arms) == 1 else f"student {number} of {len(arms)}"
        found.append(Stage(title, arm.updates, cost * arm.recipe.global_batch))
    return found


@torch.inference_mode()
def images_per_second(net: nn.Module, model: Model, session: Session) -> tuple[float, int]:
    """Speed of a network alone on noise, and the batch that it was measured with: the best of two seconds.

    All networks of an architecture have the first one's; ``vitkd eval --throughput`` is precise.
    """
    spec = model.spec
    architecture = (type(net), spec.depth, spec.input_size, sum(p.numel() for p in net.parameters()))
    if architecture in session.speeds:
        return session.speeds[architecture]
    training, end = net.training, time.perf_counter() + SPEED_SECONDS
    net.eval()

    def seconds(batch: int) -> float:
        noise = torch.rand(batch, len(spec.mean), *spec.input_size).to(session.device, session.dtype)
        return timed(lambda: net(noise))[1]

    def left() -> float:
        return end - time.perf_counter()

    one = seconds(1)  # the first call sets things up; it counts where there is no time for a second
    if one < left():
        one = seconds(1)
    batch = 1
    while batch < 32 and 4 * 2 * batch * one < left():
        batch *= 2
    best = one if batch == 1 else seconds(batch)
    for _ in range(5):
        if best < left():
            best = min(best, seconds(batch))
    net.train(training)
    session.speeds[architecture] = batch / best, batch
    return session.speeds[architecture]
