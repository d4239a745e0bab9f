"""The training loop, on one page over Accelerate.

Everything random in an update is keyed by (seed, update), so that neither a resume nor the number
of processes changes it; the learning rate is a pure function of the update.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import PartialState
from accelerate.utils import gather, gather_object, reduce
from torch import Tensor, nn

from vitkd_cli.data.images import Stream
from vitkd_cli.data.keyed import (
    BatchSampler,
    Keyed,
    TrainBatch,
    abandon_workers,
    stream_loader,
    train_loader,
)
from vitkd_cli.data.mixing import Mixing
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation import Metrics
from vitkd_cli.files import saving, write_text
from vitkd_cli.processes import heard
from vitkd_cli.progress import Pace, Reporter
from vitkd_cli.recipe import Recipe
from vitkd_cli.terms import Batch
from vitkd_cli.text import resuming
from vitkd_cli.training import checkpoint
from vitkd_cli.training.learner import Learner, Teacher

AGAIN = 0.25  # seconds; a signal that comes sooner is the same one, passed on by who started us


class Stopped(UserError):
    """The run was told to stop, saved itself and can go on."""

    def __init__(self, signum: int, update: int, run: Path, saved: Path) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after update {update}; saved in {saved}",
            f"go on with: {resuming(run)}",
            exit_code=128 + signum,
        )


@dataclass(frozen=True)
class Job:
    """One student to train: what the loop needs beside the recipe.

    Attributes:
        folder: where checkpoints and log go.
        run: the folder that ``--resume`` takes, for messages.
        seed: keys every draw.
        updates_per_epoch, updates: the length of the run.
        labelled: the images have labels.
        validate: the student's metrics, or a teacher's; None where there is nothing to score.
    """

    folder: Path
    run: Path
    title: str
    seed: int
    images: Keyed
    updates_per_epoch: int
    updates: int
    mixing: Mixing | None
    labelled: bool
    validate: Callable[[nn.Module, Reporter], Metrics] | None


def train(
    recipe: Recipe,
    job: Job,
    learner: Learner,
    teacher: Teacher | None,
    accelerator: Accelerator,
    reporter: Reporter,
    *,
    resume: bool,
) -> tuple[nn.Module, checkpoint.Progress]:
    """Train the learner's student from its newest checkpoint, if there is one, to the end.

    Returns:
        The student that the recipe selects, and the run's progress.

    Raises:
        Stopped: by SIGTERM or SIGINT, after the update in hand was finished and saved.
        UserError: the loss is not finite, memory or disk ran out, an image cannot be read.
    """
    device, dtype = accelerator.device, getattr(torch, recipe.model_dtype)
    student = learner.student.model
    learner.to(device, dtype)
    ema = _average(recipe, student, device)
    optimizer, scheduler = optimizer_of(recipe, learner, job.updates_per_epoch)
    wrapped, prepared = accelerator.prepare(learner, optimizer)

    progress = checkpoint.Progress()
    kept: dict[str, nn.Module] = {"learner": learner, **({"ema": ema.module} if ema else {})}
    states = ("optimizer", "scaler") if accelerator.scaler is not None else ("optimizer",)
    found = checkpoint.load(job.folder / "checkpoints", kept, states) if resume else None
    at: Path | None = None  # where the tensors of this update lie already
    if found:
        progress, at = found.progress, found.path
    # One disk may fail where another does not; and nothing is written before all have read.
    if len(updates := set(gather_object([progress.update]))) > 1:
        raise UserError(
            f"{job.title}: the processes read checkpoints of different updates: "
            f"{', '.join(map(str, sorted(updates)))}",
            f"see to the disk, then: {resuming(job.run)}",
            exit_code=3,
        )
    if found:
        for line in found.notes:
            reporter.warn(line)
        if "optimizer" in found.states:
            prepared.load_state_dict(found.states["optimizer"])
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(found.states["scaler"])
        elif progress.update < job.updates:
            raise UserError(
                f"{job.folder} was finished without --keep-checkpoints: its optimizer's state is gone, "
                "so training cannot go on from it",
                anew(job.run, job.folder / "student" / "model.safetensors"),
            )
        if progress.update > job.updates:
            raise UserError(f"{job.title}: {progress.update} updates are done, more than {job.updates}")
        if not accelerator.is_main_process:
            progress.skipped = {}  # the first process goes on counting for all
        if not checkpoint.best_fits(job.folder / "checkpoints", progress):
            reporter.warn(
                f"{job.title}: {checkpoint.BEST} is not the one of update {progress.best['update']}: "  # type: ignore[index]
                "the best is chosen among the validations from here on"
            )
            progress.best = None
            progress.history = [e for e in progress.history if e["update"] < progress.update]
        reporter.say(f"{job.title}: going on after update {progress.update} of {job.updates}")
    elif resume and (job.folder == job.run or (job.folder / "log.jsonl").exists()):
        reporter.warn(f"{job.title}: there is no checkpoint yet; starting over")
    before = max(group["lr"] for group in prepared.param_groups)
    scheduler.step_update(progress.update)
    now = max(group["lr"] for group in prepared.param_groups)
    if found and found.states and not math.isclose(before, now, rel_tol=1e-6):
        reporter.say(
            f"{job.title}: {recipe.sched} over {recipe.epochs} epochs from here on: "
            f"the learning rate goes from {before:.2e} to {now:.2e}"
        )
    log = _Log(job.folder / "log.jsonl", progress, accelerator, reporter)

    def skipped_everywhere() -> dict[str, int]:
        if not recipe.skip_corrupt or accelerator.num_processes == 1:
            return progress.skipped
        counts: Counter[str] = Counter()
        for part in gather_object([progress.skipped]):
            counts.update(part)
        return dict(counts)

    def save() -> None:
        nonlocal at
        noted = replace(progress, skipped=skipped_everywhere())
        log.flush()  # every line before a checkpoint is on the disk before it
        if accelerator.is_main_process and at == checkpoint.path_of(
            job.folder / "checkpoints", progress.update
        ):
            checkpoint.note(at, noted)
        elif accelerator.is_main_process:
            now = {"optimizer": prepared.state_dict()}
            if accelerator.scaler is not None:
                now["scaler"] = accelerator.scaler.state_dict()
            at = checkpoint.save(job.folder / "checkpoints", noted, kept, now, keep=recipe.checkpoint_hist)
        accelerator.wait_for_everyone()

    def validate(stop: _Signals) -> None:
        """At the end of an epoch; again on resume if the run was stopped before it was noted."""
        epoch = progress.update / job.updates_per_epoch
        last = progress.update == job.updates
        due = last or (epoch.is_integer() and epoch % recipe.val_interval == 0)
        noted = any(entry["update"] == progress.update for entry in progress.history)
        if not due or noted or not progress.update or stop.number:
            return
        save()  # a validation may take longer than whoever stops us is willing to wait
        if job.validate is None:
            return
        metrics = job.validate(ema.module if ema else student, reporter)
        if metrics.loss is not None and not math.isfinite(metrics.loss):
            log.close()
            raise diverged(recipe, job.folder, job.run, progress.update, "the validation's loss")
        entry: dict[str, Any] = {
            "update": progress.update,
            "epoch": epoch,
            "top1": metrics.top1,
            "top5": metrics.top5,
            "loss": metrics.loss,
        }
        progress.history.append(entry)
        log.write({"event": "validation", **entry})
        loss = "nearest neighbours" if metrics.loss is None else f"loss {metrics.loss:.3f}"
        reporter.say(
            f"{job.title}: epoch {epoch:>3g}  top-1 {metrics.top1:.2f} top-5 {metrics.top5:.2f}  {loss}"
            f"{seen.mean(accelerator)}"
        )
        sign = -1 if recipe.eval_metric == "loss" else 1
        value = sign * entry[recipe.eval_metric]
        if progress.best is None or value > sign * progress.best[recipe.eval_metric]:
            progress.best = entry
            if accelerator.is_main_process:
                digest = checkpoint.save_best(job.folder / "checkpoints", ema.module if ema else student)
                progress.best = {**entry, "sha256": digest}
        save()

    pace, seen = Pace(), _Losses(device)
    batches = _batches(recipe, job, progress.update, accelerator)
    of_training = {"per_epoch": job.updates_per_epoch, "images": recipe.global_batch}
    with _Signals(job.run) as stop, reporter.bar(job.title, job.updates, progress.update, **of_training):
        validate(stop)
        while progress.update < job.updates:
            update = progress.update
            heard(f"update {update} of {job.title}")
            epoch = update // job.updates_per_epoch
            weights = learner.objective.weights_at(update)
            total = torch.zeros((), device=device, dtype=dtype)
            raw: dict[str, Tensor] = {}
            norm = None
            learner.train()
            for micro in range(recipe.grad_accum_steps):
                images, labels, positions, replaced = next(batches)
                for path in replaced:
                    progress.skipped[path] = progress.skipped.get(path, 0) + 1
                with _memory_is_the_users(recipe, learner, teacher), accelerator.accumulate(wrapped):
                    # Stochastic depth and dropout draw from the global generator.
                    part = micro * accelerator.num_processes + accelerator.process_index
                    torch.manual_seed(_key(job.seed, update, part))
                    images = images.to(device, non_blocking=True).to(dtype).div_(255)
                    targets = labels.to(device, non_blocking=True) if job.labelled else None
                    if job.mixing and not 0 < recipe.mixup_off_epoch <= epoch:
                        images, targets = job.mixing(images, targets, key=(job.seed, update))
                    batch = Batch(
                        targets=targets,
                        update=update,
                        rows=positions % recipe.global_batch,
                        global_size=recipe.global_batch,
                        generator=torch.Generator().manual_seed(_key(job.seed, update)),
                        gather=_Gather.apply,
                    )
                    with accelerator.autocast():
                        signals = teacher(images) if teacher else {}
                    loss, terms = wrapped(images, signals, batch)
                    if recipe.log_grads and (update + 1) % recipe.log_grads == 0 and not micro:
                        log.write(_gradient_shares(learner, terms, weights, update + 1))
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        norm = _clip(recipe, wrapped, accelerator)
                    prepared.step()
                    prepared.zero_grad()
                total += loss.detach() / recipe.grad_accum_steps
                for name, value in terms.items():
                    raw[name] = raw.get(name, 0) + value.detach() / recipe.grad_accum_steps
                pace.add(len(images) * accelerator.num_processes)
            if ema:
                ema.update(student, step=update + 1)
            rate = max(group["lr"] for group in prepared.param_groups)
            scheduler.step_update(update + 1)
            progress.update = update + 1
            seen.add(total)
            stop.log = _is_logged(recipe, progress.update, job.updates) or log.overdue()
            _agree(stop, total, norm, accelerator)
            if stop.bad_loss:
                _refuse(recipe, job, learner, raw, update + 1, log)
            if stop.log:
                values = log.values(learner, raw, weights, total, norm, recipe, rate, progress, pace)
                values["epoch"] = progress.update / job.updates_per_epoch
                log.write(values)
                if progress.update in (1, job.updates) or progress.update % recipe.log_interval == 0:
                    reporter.line(f"{job.title}: {_in_words(values, job.updates)}")
                reporter.advance(progress.update, _terms(values), loss=seen.last)
            else:
                reporter.advance(progress.update, loss=seen.last)
            validate(stop)
            if stop.number:
                save()
                log.close()
                raise Stopped(
                    stop.number,
                    progress.update,
                    job.run,
                    checkpoint.path_of(job.folder / "checkpoints", progress.update),
                )
            if progress.update % recipe.recovery_interval == 0:
                save()
    log.close()
    progress.skipped = skipped_everywhere()
    chosen: nn.Module = student
    if recipe.select == "ema" and ema:
        chosen = ema.module
    elif recipe.select == "best" and progress.best:
        chosen = ema.module if ema else student
        checkpoint.load_best(job.folder / "checkpoints", progress, chosen)
    if not all(bool(tensor.isfinite().all()) for tensor in chosen.parameters()):
        raise diverged(recipe, job.folder, job.run, progress.update, "a weight")
    accelerator.free_memory()
    return chosen, progress


# The parts of an update -----------------------------------------------------------------------------


def optimizer_of(
    recipe: Recipe, learner: Learner, updates_per_epoch: int
) -> tuple[torch.optim.Optimizer, Any]:
    """timm's optimizer and scheduler for a recipe.

    Raises:
        UserError: timm has no such optimizer or scheduler, or it takes other options.
    """
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2

    more: dict[str, Any] = {"eps": recipe.opt_eps} if recipe.opt_eps is not None else {}
    if recipe.opt_betas is not None:
        more["betas"] = recipe.opt_betas
    groups = learner.optimizer_groups(recipe.weight_decay, recipe.layer_decay)
    try:
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


def _average(recipe: Recipe, student: nn.Module, device: torch.device) -> Any:
    from timm.utils import ModelEmaV3

    if not recipe.model_ema:
        return None
    # The copy's hooks are the original's taps, and those are deaf outside the learner's forward.
    average = ModelEmaV3(student, recipe.model_ema_decay, use_warmup=recipe.model_ema_warmup)
    return average.to(device)


def _batches(recipe: Recipe, job: Job, update: int, accelerator: Accelerator) -> Iterator[TrainBatch]:
    """This process's micro-batches from an update on, to the end of the run."""
    first, offset = divmod(update, job.updates_per_epoch)
    epochs = zip(count(first), chain([offset], repeat(0)))
    workers = min(recipe.workers, os.cpu_count() or 1)
    pin = accelerator.device.type == "cuda"
    accum = recipe.grad_accum_steps
    if isinstance(images := job.images.images, Stream):
        view, size = job.images.view, recipe.batch
        share: dict[str, Any] = {"accum": accum, "workers": workers, "pin_memory": pin}
        return chain.from_iterable(
            stream_loader(images, view, size, epoch=epoch, start_update=start, **share)
            for epoch, start in epochs
        )
    sampler = BatchSampler(
        len(job.images),
        recipe.batch,
        seed=job.seed,
        accum=accum,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        aug_repeats=recipe.aug_repeats,
        mirrored=job.mixing is not None,
    )
    keys = chain.from_iterable(sampler.epoch(epoch, start) for epoch, start in epochs)
    left = islice(keys, (job.updates - update) * recipe.grad_accum_steps)
    return iter(train_loader(job.images, left, workers, pin_memory=pin))


class _Gather(torch.autograd.Function):
    """The rows ``[B, ...]`` of every process, in their order; a process alone has its own only.

    Each process's rows take the sum of the gradients of all, which averaging over processes makes that
    of one process with the whole batch. (torch.distributed.nn's is deprecated.)
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return gather(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        state = PartialState()
        return reduce(gradient, "sum").chunk(state.num_processes)[state.process_index]


def _key(*numbers: int) -> int:
    """A seed that differs wherever one of the numbers does."""
    key = 0
    for number in numbers:
        key = (key * 1_000_003 + number + 0x9E3779B9) % (2**63 - 25)
    return key


def _clip(recipe: Recipe, learner: nn.Module, accelerator: Accelerator) -> Tensor | None:
    """Clip in place; the norm before, where clipping is by norm."""
    from timm.utils import dispatch_clip_grad

    if not recipe.clip_grad:
        return None
    if recipe.clip_mode == "norm":
        return accelerator.clip_grad_norm_(learner.parameters(), recipe.clip_grad)
    accelerator.unscale_gradients()
    dispatch_clip_grad(learner.parameters(), recipe.clip_grad, mode=recipe.clip_mode)
    return None


def _gradient_shares(
    learner: Learner, terms: dict[str, Tensor], weights: dict[str, float], update: int
) -> dict[str, Any]:
    """Each term's share of the student's gradient, by norm, weighted as in the objective."""
    parameters = [p for p in learner.student.parameters() if p.requires_grad]
    norms = {}
    for name, value in terms.items():
        weighted = weights[name] * value
        gradients = torch.autograd.grad(weighted, parameters, retain_graph=True, allow_unused=True)
        norms[name] = math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))
    total = sum(norms.values()) or 1.0
    return {
        "event": "gradients",
        "update": update,
        **{f"{name}/grad_norm": norm for name, norm in norms.items()},
        **{f"{name}/grad_share": norm / total for name, norm in norms.items()},
    }


def _is_logged(recipe: Recipe, update: int, updates: int) -> bool:
    """A short run has twenty lines, too."""
    return update in (1, updates) or update % min(recipe.log_interval, max(1, updates // 20)) == 0


def _in_words(values: dict[str, Any], updates: int) -> str:
    return (
        f"update {values['update']}/{updates}  epoch {values['epoch']:.2f}  loss {values['loss']:.4f}  "
        f"{_terms(values)}  {values['images_per_second']:.0f} images/s"
    )


def _terms(values: dict[str, Any]) -> str:
    terms = [
        f"{key.removesuffix('/weighted')} {value:.4g}"
        for key, value in values.items()
        if key.endswith("/weighted")
    ]
    return "  ".join([*terms, f"lr {values['lr']:.2e}"])


class _Losses:
    """The losses since a validation, without waiting for a device.

    Attributes:
        last: the newest one that has arrived, on the CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.last = torch.zeros((), dtype=torch.float64, pin_memory=device.type == "cuda")
        self._sum = torch.zeros((), dtype=torch.float64 if device.type != "mps" else None, device=device)
        self._count = 0

    def add(self, loss: Tensor) -> None:
        self._sum += loss
        self._count += 1
        self.last.copy_(loss, non_blocking=True)

    def mean(self, accelerator: Accelerator) -> str:
        """In words, over all processes; empty where nothing was trained since. It begins anew."""
        if not self._count:
            return ""
        mean = float(accelerator.reduce(self._sum, "mean")) / self._count
        self._sum, self._count = torch.zeros_like(self._sum), 0
        return f" train {mean:.3f}"


def _agree(stop: _Signals, total: Tensor, norm: Tensor | None, accelerator: Accelerator) -> None:
    """All processes learn of a signal, or of a loss or gradient that is not finite, on any one of them."""
    stop.number = stop.received
    stop.bad_loss = not bool(torch.isfinite(total))
    if norm is not None and accelerator.scaler is None:  # a scaler skips such an update by itself
        stop.bad_loss |= not bool(torch.isfinite(norm))
    if accelerator.num_processes > 1:
        flags = torch.tensor([stop.number, int(stop.bad_loss), int(stop.log)], device=accelerator.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        stop.number, stop.bad_loss, stop.log = int(flags[0]), bool(flags[1]), bool(flags[2])


def _refuse(
    recipe: Recipe, job: Job, learner: Learner, raw: dict[str, Tensor], update: int, log: _Log
) -> None:
    bad = [name for name, value in raw.items() if not bool(torch.isfinite(value))]
    log.close()
    what = f"the loss at update {update} (term {', '.join(bad) or 'sum'})"
    raise diverged(recipe, job.folder, job.run, update - 1, what)


def diverged(recipe: Recipe, folder: Path, run: Path, update: int, what: str) -> UserError:
    """The weights after ``update`` are no good; those of a checkpoint are that a finite update followed."""
    saved = checkpoint.complete(folder / "checkpoints")
    good = [path for path in saved if int(path.name.removeprefix("update-")) < update]
    lower = f"--lr {recipe.peak_lr / 4:.2g}"
    hint = f"begin again with {lower}, clip with --clip-grad 1, or train with --mixed-precision no"
    if good and folder == run:  # an arm or a teacher has no recipe of its own
        hint = anew(run, good[-1] / "learner.safetensors", lower)
    return UserError(
        f"{what} is not finite: the training diverged (learning rate {recipe.peak_lr:.2e}, "
        f"precision {recipe.mixed_precision}); "
        + (f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"),
        hint,
        exit_code=3,
    )


def anew(run: Path, weights: Path, flags: str = "") -> str:
    """The command that starts a new run from the weights of this one."""
    command = ["vitkd", "distill", "--recipe", str(run), "--initial-checkpoint", str(weights)]
    parts = (shlex.join(command), flags, shlex.join(["--output", f"{run}-2"]))
    return f"a new run from here: {' '.join(filter(None, parts))}"


@contextmanager
def _memory_is_the_users(recipe: Recipe, learner: Learner, teacher: Teacher | None) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as problem:  # torch.OutOfMemoryError is a RuntimeError
        words = ("out of memory", "can't allocate memory")
        if isinstance(problem, RuntimeError) and not any(w in str(problem) for w in words):
            raise
        models = learner.spec.name + (f" and {teacher.spec.name}" if teacher else "")
        raise UserError(
            f"out of memory with {recipe.batch} images a process through {models}",
            f"--batch-size {max(recipe.batch // 2, 1)} --grad-accum-steps "
            f"{recipe.grad_accum_steps * 2} keeps the global batch; --grad-checkpointing saves more",
            exit_code=3,
        ) from None


class _Signals:
    """SIGTERM and SIGINT as a number that the loop reads between updates; a second SIGINT ends at once.

    The update in hand may never come: it may wait for an image from a disk that does not answer.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self.received = 0  # on this process, at any moment
        self.since = 0.0
        self.number = 0  # on any of them, as agreed after an update
        self.bad_loss = False
        self.log = False  # a line is due
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        def note(number: int, frame: Any) -> None:
            again = number == self.received == signal.SIGINT
            if again and time.monotonic() - self.since > AGAIN:
                abandon_workers()
                raise KeyboardInterrupt
            self.received, self.since = number, self.since if again else time.monotonic()

        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                self._before[number] = signal.signal(number, note)
            except ValueError:  # not the main thread: whoever called us handles signals
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if kind is KeyboardInterrupt:
            raise UserError(
                "stopped at once by a second SIGINT: the updates since the last checkpoint are lost",
                f"go on from it with: {resuming(self.run)}",
                exit_code=130,
            ) from None


class _Log:
    """``log.jsonl``: one line a logged update, cut back to the checkpoint on resume."""

    def __init__(
        self, path: Path, progress: checkpoint.Progress, accelerator: Accelerator, reporter: Reporter
    ) -> None:
        self.accelerator = accelerator
        self._wrote = time.monotonic()
        self._file: Any = None
        if not accelerator.is_main_process:
            return
        self._path = path
        noted = {entry["update"] for entry in progress.history}
        try:
            lines = path.read_bytes().splitlines() if progress.update else []
        except OSError:
            lines = []
        kept, damaged = [], 0
        for line in lines:
            try:
                values = json.loads(line)
                update, event = int(values["update"]), values.get("event")
            except (ValueError, KeyError, TypeError, AttributeError):
                damaged += line is not lines[-1]  # a kill cuts the last one short
                continue
            # A validation that its checkpoint does not know of is made again.
            if update <= progress.update and (event != "validation" or update in noted):
                kept.append(line.decode())
        if damaged:
            reporter.warn(f"{path} is damaged: lines that cannot be read were left out ({damaged})")
        write_text(path, "".join(f"{line}\n" for line in kept))
        with saving(path):
            self._file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  # as long as the run

    def values(
        self,
        learner: Learner,
        raw: dict[str, Tensor],
        weights: dict[str, float],
        total: Tensor,
        norm: Tensor | None,
        recipe: Recipe,
        rate: float,
        progress: checkpoint.Progress,
        pace: Pace,
    ) -> dict[str, Any]:
        """A log line: means over the processes' shares of the global batch."""
        gathered = torch.stack([total, *raw.values()]).double()
        loss, *terms = self.accelerator.reduce(gathered, "mean").tolist()
        line: dict[str, Any] = {
            "update": progress.update,
            "loss": loss,
            "lr": rate,
        }
        for name, value in zip(raw, terms, strict=True):
            line[name] = value
            line[f"{name}/weighted"] = value * weights[name]
            if learner.objective.weights[name].schedules:
                line[f"{name}/weight"] = weights[name]
        if norm is not None and recipe.clip_grad:
            line["grad_norm"] = float(norm)
            line["clip_factor"] = min(1.0, recipe.clip_grad / (float(norm) + 1e-6))
        if progress.skipped:
            line["skipped_images"] = len(progress.skipped)
        line["images_per_second"] = pace.rate()
        line["time"] = time.time()
        return line

    def overdue(self) -> bool:
        """Is the last line a minute old? Rank 0 knows."""
        return self._file is not None and time.monotonic() - self._wrote > 60

    def write(self, line: dict[str, Any]) -> None:
        self._wrote = time.monotonic()
        if self._file is not None:
            # JSON has no NaN; a gradient's norm may be one where a scaler passes over the update.
            told = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
            with saving(self._path):
                self._file.write(json.dumps(told, allow_nan=False) + "\n")
        numbers = {k: v for k, v in line.items() if isinstance(v, (int, float))}
        if self.accelerator.trackers:
            self.accelerator.log(numbers, step=line["update"])

    def flush(self) -> None:
        if self._file is not None:
            with saving(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            with saving(self._path):
                self._file.close()
