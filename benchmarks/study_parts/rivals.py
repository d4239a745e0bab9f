"""timm's own distillation tasks in a plain loop: the same images, views, start, optimizer and schedule."""

import time
from pathlib import Path

import torch
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import FeatureDistillationTask, LogitDistillationTask

from study_parts.plan import TASKS
from study_parts.results import Cell
from vitkd_cli.data.keyed import BatchSampler, Keyed, train_loader, val_loader
from vitkd_cli.data.transforms import train_view, view_of
from vitkd_cli.evaluation import measure
from vitkd_cli.recipe import Recipe
from vitkd_cli.requests import Weights
from vitkd_cli.training.data import data_of
from vitkd_cli.training.models import student_of
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.names import resolve
from vitkd_cli.vit.spec import as_seen_by

TASK_OF = dict(zip(TASKS, (LogitDistillationTask, FeatureDistillationTask), strict=True))


def trained_by_timm(arm: str, data_name: str, updates: int, recipe: Recipe, teacher: Path) -> Cell:
    """A student of the study, trained by one of timm's tasks at its defaults."""
    data = data_of(recipe, True, None)
    assert data.train is not None and data.val is not None
    model = student_of(recipe, resolve(recipe.student or ""), data)
    taught = open_model(str(teacher), Weights())
    task = TASK_OF[arm](
        model.net,
        taught.net.requires_grad_(False),
        LabelSmoothingCrossEntropy(recipe.smoothing),
        verbose=False,
    ).train()
    sampler = BatchSampler(len(data.train), recipe.batch, seed=recipe.seed, mirrored=False)
    view = train_view(model.spec.input_size, recipe, model.spec.mean, model.spec.std)
    optimizer = create_optimizer_v2(
        task.trainable_module, recipe.opt, lr=recipe.peak_lr, weight_decay=recipe.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup,
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=sampler.updates,
    )
    keys = [key for epoch in range(recipe.epochs) for key in sampler.epoch(epoch)]
    torch.manual_seed(recipe.seed)
    scheduler.step_update(0)
    began = time.perf_counter()
    for update, batch in enumerate(train_loader(Keyed(data.train, view, recipe.seed), keys), 1):
        loss = task(as_seen_by(model.spec, batch.images.float() / 255), batch.labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.trainable_module.parameters(), recipe.clip_grad)
        optimizer.step()
        scheduler.step_update(update)
    seconds = time.perf_counter() - began
    model.net.eval()
    batches = val_loader(data.val, view_of(model.preprocessing), 256)
    metrics = measure(model.logits, batches, len(data.val), device=torch.device("cpu"))
    return Cell.of((data_name, updates, arm, recipe.seed), metrics, seconds)
