"""What it takes to train one student: built, and rehearsed before anything is trained."""

from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitkd_cli.data.images import ImageData, Split, Stream
from vitkd_cli.data.keyed import BatchSampler, Keyed, TrainBatch, updates_per_epoch
from vitkd_cli.data.mixing import Mixing, mixing
from vitkd_cli.data.pixels import decoded_fast
from vitkd_cli.data.tars import tar_numbers
from vitkd_cli.data.transforms import train_view
from vitkd_cli.errors import UserError
from vitkd_cli.files import repair, saving
from vitkd_cli.objective import Clock, Formula, Objective
from vitkd_cli.recipe import Recipe
from vitkd_cli.session import Session
from vitkd_cli.training import checkpoint
from vitkd_cli.training.arms import WrittenArm
from vitkd_cli.training.cache import Cache
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.training.rehearsal import Rehearsal, rehearse
from vitkd_cli.training.sharding import refused, share
from vitkd_cli.training.validation import Validation
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.names import Resolved


@dataclass(frozen=True)
class Arm:
    """One student to train.

    Attributes:
        written: its name and formula.
        model: the student.
        recipe: of the run, with the seed and the settings of this arm.
        folder: for its checkpoints, log and student.
        images: to train on.
    """

    written: WrittenArm
    model: Resolved
    recipe: Recipe
    folder: Path
    images: Split

    @property
    def name(self) -> str:
        return self.written.name

    @property
    def formula(self) -> Formula:
        return self.written.formula

    @property
    def title(self) -> str:
        return self.name if self.recipe.seeds == 1 else f"{self.name} (seed {self.recipe.seed})"

    @property
    def run(self) -> Path:
        """The folder that ``--resume`` takes."""
        return Path(self.recipe.output or self.folder)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def updates_per_epoch(self) -> int:
        return updates_per_epoch(len(self.images), self.recipe.global_batch)

    @property
    def updates(self) -> int:
        """The length of the training."""
        updates = self.updates_per_epoch * (self.recipe.epochs + self.recipe.cooldown_epochs)
        return min(updates, self.recipe.steps or updates)

    def epoch_seen_at(self, epoch: int) -> int:
        """The epoch whose views are seen at this one: itself, or an earlier one with ``--cached-epochs``."""
        return epoch % self.recipe.cached_epochs if self.recipe.cached_epochs else epoch

    def seen_at(self, update: int) -> int:
        """The same of an update."""
        epoch, within = divmod(update, self.updates_per_epoch)
        return self.epoch_seen_at(epoch) * self.updates_per_epoch + within

    def open(self) -> None:
        """Make its folders, and set right what a crash left in them."""
        with saving(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            repair(self.folder)
            self.checkpoints.mkdir(exist_ok=True)
            repair(self.checkpoints)

    def strip(self) -> None:
        """Leave of its checkpoints what a finished student needs."""
        if not self.recipe.keep_checkpoints:
            checkpoint.strip(self.checkpoints)


@dataclass(frozen=True)
class Estimate:
    """What one model of a run takes, as far as a dry run can tell.

    Attributes:
        epoch, training, validation: seconds, without reading the images.
        disk: bytes at most while it trains.
        kept: bytes that it leaves.
    """

    title: str
    epoch: float = 0.0
    training: float = 0.0
    validation: float = 0.0
    disk: int = 0
    kept: int = 0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A rehearsed arm: what ``--dry-run`` prints, the start-up says, and a trainer trains.

    Attributes:
        tapped: the teacher's signals that the objective reads.
        size: rows and columns of the images.
        images: views of the arm's images.
        costs: of every model that the run trains, in their order; none unless it is a dry run.
        others: the run's further arms, with its first seed.
        cache: of what the teacher says; None where nothing is kept.
        caches: those of all arms.
    """

    arm: Arm
    data: ImageData
    student: Model
    teacher: Model | None
    learner: Learner
    tapped: Teacher | None
    size: tuple[int, int]
    images: Keyed
    sampler: BatchSampler
    mixing: Mixing | None
    optimizer: torch.optim.Optimizer
    scheduler: Any
    rehearsal: Rehearsal
    costs: tuple[Estimate, ...] = ()
    others: tuple[Arm, ...] = ()
    cache: Cache | None = None
    caches: tuple[Cache, ...] = ()

    @property
    def recipe(self) -> Recipe:
        return self.arm.recipe

    def shown(
        self, batch: TrainBatch, update: int, device: torch.device, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor | None]:
        """A micro-batch as both models get it at an update.

        Returns:
            Images ``[B, C, H, W]`` in [0, 1], mixed; and classes ``[B]``, mixed labels ``[B, K]``, or None.
        """
        images = batch.images.to(device, non_blocking=True).to(dtype).div_(255)
        targets = batch.labels.to(device, non_blocking=True) if self.data.labelled else None
        epoch = update // self.arm.updates_per_epoch
        if self.mixing is None or 0 < self.recipe.mixup_off_epoch <= epoch:
            return images, targets
        return self.mixing(images, targets, key=(self.recipe.views_key, self.arm.seen_at(update)))

    def release(self) -> None:
        """Take the teacher as it was before: other arms have it, too."""
        if self.tapped:
            self.tapped.tapped.release()


def rehearsed(
    arm: Arm, student: Model, teacher: Model | None, data: ImageData, session: Session, *, images: int = 2
) -> Plan:
    """Build all that an arm is trained with, and prove it on a batch of noise.

    Args:
        images: of the batch.
    """
    recipe = arm.recipe
    if isinstance(arm.images, Stream) and (recipe.cached_epochs or (teacher and recipe.answers_folder)):
        raise UserError(
            "--teacher-cache and --cached-epochs: the images of a stream come in no order that is known",
            "leave them out, or use a dataset with an index",
        )
    mixed = mixing(recipe, data.num_classes)
    # Too few images for one batch, or an odd batch that cannot be mixed, is refused before the training.
    sampler = BatchSampler(
        len(arm.images),
        recipe.batch,
        seed=recipe.views_key,
        accum=recipe.grad_accum_steps,
        rank=session.accelerator.process_index,
        world=recipe.num_processes,
        aug_repeats=recipe.aug_repeats,
        mirrored=mixed is not None,
    )
    if recipe.shuffle_block:
        if isinstance(arm.images, Stream):
            raise UserError("--shuffle-block is about images in tars, and these are a stream", "leave it out")
        sampler.in_blocks(tar_numbers(arm.images), recipe.shuffle_block)
    torch.manual_seed(recipe.seed)
    # As for the learning rate, --steps stops a schedule and does not shorten it.
    per_epoch = arm.updates_per_epoch
    clock = Clock(per_epoch * (recipe.epochs + recipe.cooldown_epochs), per_epoch)
    bf16 = recipe.terms_dtype == "bf16"
    objective = Objective(arm.formula, student.spec, teacher.spec if teacher else None, clock, bf16=bf16)
    learner = _learner(recipe, student, objective, session)
    tapped = None
    if teacher:
        if not recipe.shard_teacher:  # which is in its place
            teacher.to(session.device, session.dtype)  # an arm before may have left it halved
        tapped = Teacher(teacher, objective.teacher_taps, compiled=recipe.torchcompile)
    # Crops are made at the larger of both sizes and shrunk for the other.
    sizes = [model.spec.input_size for model in (student, teacher) if model]
    size = max(rows for rows, _ in sizes), max(columns for _, columns in sizes)
    options: dict[str, Any] = {"device": session.device, "dtype": session.dtype, "images": images}
    with (
        refused(teacher.spec.name) if teacher and recipe.shard_teacher else nullcontext(),
        refused(student.spec.name, "student") if recipe.shard else nullcontext(),
    ):
        found = rehearse(learner, tapped, size=size, **options)
    if tapped and session.accelerator.mixed_precision == "bf16" and not recipe.shard_teacher:
        noise = torch.rand(2, len(student.spec.mean), *size, generator=torch.Generator().manual_seed(0))
        with session.accelerator.autocast():
            tapped.try_bf16(noise.to(session.device, session.dtype))
    optimizer, scheduler = optimizer_of(recipe, learner, per_epoch)
    if Validation.of(student, data, recipe, session) is None and recipe.select == "best":
        raise UserError("select = 'best' needs a validation split", "--val-fraction 0.1, or --select last")
    view = train_view(size, recipe, student.spec.mean, student.spec.std)
    shown = decoded_fast(arm.images) if recipe.decodes_fast(session.device.type) else arm.images
    return Plan(
        arm=arm,
        data=data,
        student=student,
        teacher=teacher,
        learner=learner,
        tapped=tapped,
        size=size,
        sampler=sampler,
        images=Keyed(shown, view, recipe.views_key, skip_corrupt=recipe.skip_corrupt),
        mixing=mixed,
        optimizer=optimizer,
        scheduler=scheduler,
        rehearsal=found,
    )


def _learner(recipe: Recipe, student: Model, objective: Objective, session: Session) -> Learner:
    """The student and its objective, where and as they are trained."""
    learner = Learner(student.net, objective, student.spec).to(session.dtype)
    if recipe.grad_checkpointing:
        _checkpoint(student)
    if recipe.channels_last:
        learner = learner.to(memory_format=torch.channels_last)
    if not recipe.shard:
        return learner.to(session.device)
    _ = student.multiply_adds  # now: parts of weights cannot be counted
    share(learner, session)  # from host memory: no device need hold it whole
    return learner


def _checkpoint(student: Model) -> None:
    """Let a model keep the inputs of its blocks alone, and compute the rest again on the way back."""
    from timm.layers import use_reentrant_ckpt

    if not hasattr(student.net, "set_grad_checkpointing"):
        raise UserError(
            "--grad-checkpointing: this model has none",
            "leave it out; a smaller --batch-size saves memory too",
        )
    if use_reentrant_ckpt():
        raise UserError(
            "--grad-checkpointing: TIMM_REENTRANT_CKPT keeps gradients from what terms read in a block",
            "unset TIMM_REENTRANT_CKPT",
        )
    student.net.set_grad_checkpointing(True)  # type: ignore[operator]


def optimizer_of(
    recipe: Recipe, learner: Learner, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer and scheduler for a recipe."""
    from timm.optim import create_optimizer_v2, get_optimizer_class
    from timm.scheduler import create_scheduler_v2

    more: dict[str, Any] = {"eps": recipe.opt_eps} if recipe.opt_eps is not None else {}
    if recipe.opt_betas is not None:
        more["betas"] = recipe.opt_betas
    groups = learner.optimizer_groups(recipe.weight_decay, recipe.layer_decay)
    on = next(learner.parameters()).device.type
    try:
        own = get_optimizer_class(recipe.opt.lower().split("_")[-1])  # without timm's lookahead_
        if "fused" in signature(own).parameters and on in ("cpu", "cuda"):
            more["fused"] = True  # one kernel for an update of all weights: a third of the time
        optimizer = create_optimizer_v2(
            learner, recipe.opt, lr=recipe.peak_lr, param_group_fn=lambda _: groups, **more
        )
    except (ValueError, TypeError, AssertionError) as problem:
        raise UserError(f"--opt {recipe.opt}: {problem}", "see timm.optim.list_optimizers()") from None
    except IndexError:
        raise UserError(f"--opt {recipe.opt} takes more --opt-betas than one", "such as 0.9,0.999") from None
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            recipe.sched,
            num_epochs=recipe.epochs,
            warmup_epochs=recipe.warmup,
            warmup_lr=min(recipe.warmup_lr, recipe.peak_lr),
            min_lr=recipe.final_lr,
            cooldown_epochs=recipe.cooldown_epochs,
            step_on_epochs=False,
            updates_per_epoch=updates_per_epoch,
        )
    except (ValueError, AssertionError) as problem:
        raise UserError(f"--sched {recipe.sched}: {problem}", "such as cosine, step or poly") from None
    if scheduler is None:
        raise UserError(f"there is no scheduler {recipe.sched!r}", "such as cosine, step or poly")
    return optimizer, scheduler
