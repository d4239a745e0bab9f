"""The training loop over Accelerate: fit, update, validate, save.

Everything random in an update is keyed by (seed, update), so that neither a resume nor the number
of processes changes it; the learning rate is a pure function of the update.
"""

import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain, count, islice, repeat
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import gather, gather_object, reduce
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vitkd_cli.data.images import Stream
from vitkd_cli.data.keyed import TrainBatch, stream_loader, train_loader
from vitkd_cli.errors import UserError
from vitkd_cli.processes import heartbeat
from vitkd_cli.progress import Pace
from vitkd_cli.session import Session
from vitkd_cli.terms import Batch
from vitkd_cli.text import resuming
from vitkd_cli.training import checkpoint
from vitkd_cli.training.cached import CachedTeacher
from vitkd_cli.training.data import kept_decoded
from vitkd_cli.training.folder import anew, without_optimizer
from vitkd_cli.training.gradients import TermGradients
from vitkd_cli.training.log import Log, Losses, gradient_shares, in_words, terms_in_words
from vitkd_cli.training.models import student_of
from vitkd_cli.training.plan import Arm, Plan
from vitkd_cli.training.sharding import as_parted, gathered, share_net
from vitkd_cli.training.signals import Signals, Stopped
from vitkd_cli.training.validation import Validation
from vitkd_cli.vit.taps import Tap

_TELLING = 200  # updates of a run whose weights are looked at


@dataclass
class Step:
    """What an update shows of this process's share of the images.

    Attributes:
        weights: of the terms.
        lr: the learning rate.
        loss, terms: means over the micro-batches.
        grad_norm: before clipping, where clipping is by norm.
    """

    weights: dict[str, float]
    lr: float
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    grad_norm: Tensor | None = None


class Trainer:
    """Trains one student.

    Args:
        plan: the rehearsed student, with its images, objective and optimizer.
        validation: None where there is nothing to score.

    Attributes:
        progress: how far the training has come.
        stop: the number of a signal that any process has received; 0 if there was none.
    """

    log: Log
    signals: Signals

    def __init__(self, plan: Plan, validation: Validation | None, session: Session) -> None:
        self.plan, self.arm, self.recipe = plan, plan.arm, plan.recipe
        self.validation, self.session = validation, session
        self.accelerator, self.reporter = session.accelerator, session.reporter
        self.learner, self.teacher, self.student = plan.learner, plan.tapped, plan.student.net
        if self.teacher:
            self.teacher.halve()
        if self.recipe.torchcompile:
            self.learner.student.compile()
            if self.teacher:
                self.teacher.tapped.compile()
            # Where terms' gradients are measured, a graph is walked several times; with donated buffers a
            # compiled one refuses that.
            if self.recipe.log_grads or self.learner.objective.balance:
                torch._functorch.config.donated_buffer = False
        if self.recipe.sync_bn:
            from timm.layers import convert_sync_batchnorm

            convert_sync_batchnorm(self.student)
        self.ema = self._average()
        self.scheduler = plan.scheduler
        if self.recipe.shard:  # in place of DistributedDataParallel
            self.wrapped = self.accelerator.prepare_model(self.learner, evaluation_mode=True)
            self.optimizer = self.accelerator.prepare_optimizer(plan.optimizer)
        else:
            self.wrapped, self.optimizer = self.accelerator.prepare(self.learner, plan.optimizer)
        self.progress, self.stop = checkpoint.Progress(), 0
        self.cache = CachedTeacher(plan, plan.cache, session) if plan.cache else None
        self.saved: Path | None = None  # where the tensors of this update are already
        self.losses, self.pace = Losses(session.device), Pace()
        self.noted: set[str] = set()  # of what is said once

    def _average(self) -> Any:
        from timm.utils import ModelEmaV3

        if not self.recipe.model_ema:
            return None
        decay, options = self.recipe.model_ema_decay, {"use_warmup": self.recipe.model_ema_warmup}
        if self.recipe.shard:  # parts cannot be copied
            twin = student_of(self.recipe, self.arm.model, self.plan.data).net.to(self.session.dtype)
            ema = ModelEmaV3(twin, decay, foreach=False, **options)
            share_net(ema.module, self.plan.student.spec, self.session)
            ema.set(self.student)
            return ema
        # The copy's hooks are the original's taps, which record in the learner's forward only.
        return ModelEmaV3(self.student, decay, **options).to(self.session.device)

    @property
    def scored(self) -> nn.Module:
        """The weights that are validated: the average, where there is one."""
        return self.ema.module if self.ema else self.student

    @property
    def lr(self) -> float:
        return max(group["lr"] for group in self.optimizer.param_groups)

    # The loop -------------------------------------------------------------------------------------------

    def fit(self, resume: bool) -> nn.Module:
        """Train to the end, on resume from the newest checkpoint if there is one.

        Returns:
            The student with the weights that the recipe selects.

        Raises:
            Stopped: by SIGTERM or SIGINT, after the current update was finished and saved.
        """
        arm, progress = self.arm, self._restored(resume)
        batches = self._batches()
        shown = {"per_epoch": arm.updates_per_epoch, "images": self.recipe.global_batch}
        with (
            Log(arm.folder / "log.jsonl", progress, self.session) as self.log,
            Signals(arm.run) as self.signals,
            self.reporter.bar(arm.title, arm.updates, progress.update, **shown),
            self.cache or nullcontext(),
        ):
            self.validate()
            while progress.update < arm.updates:
                self.update(batches)
                self.validate()
                if self.stop:
                    self.save()
                    saved = checkpoint.path_of(arm.checkpoints, progress.update)
                    raise Stopped(self.stop, progress.update, arm.run, saved)
                if progress.update % self.recipe.recovery_interval == 0:
                    self.save()
        progress.skipped = self._skipped()
        chosen = self.student if self.recipe.select == "last" else self.scored
        if self.recipe.select == "best":
            checkpoint.load_best(arm.checkpoints, progress, chosen)
        self.session.all_together(lambda: self._check_finite(chosen))
        self.accelerator.free_memory()
        return chosen

    def _check_finite(self, chosen: nn.Module) -> None:
        for tensor in chosen.parameters():
            part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if not bool(part.isfinite().all()):
                raise diverged(self.arm, self.progress.update, "a weight")

    def update(self, batches: Iterator[TrainBatch]) -> None:
        """One update of the optimizer: its micro-batches, its log line, and what would end the run."""
        recipe, progress, accelerator = self.recipe, self.progress, self.accelerator
        update, steps = progress.update, recipe.grad_accum_steps
        heartbeat(f"update {update} of {self.arm.title}")
        zero = torch.zeros((), device=self.session.device, dtype=self.session.dtype)
        step = Step(self.learner.objective.weights_at(update), self.lr, zero)
        gradients = self._gradients()
        self.learner.train()
        for micro in range(steps):
            batch = self.pace.next(batches)
            for path in batch.skipped:
                progress.skipped[path] = progress.skipped.get(path, 0) + 1
            with self._oom_as_user_error(), accelerator.accumulate(self.wrapped):
                loss, terms = self._loss(batch, micro)
                if gradients:
                    gradients.add(terms)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    step.grad_norm = self._clip()
                self.optimizer.step()
                self.optimizer.zero_grad()
            step.loss += loss.detach() / steps
            for name, value in terms.items():
                step.terms[name] = step.terms.get(name, 0) + value.detach() / steps
            self.pace.add(len(batch.images) * accelerator.num_processes)
        if gradients:
            self._weigh(gradients.norms(), step)
        if self.ema:
            self.ema.update(self.student, step=update + 1)
        self.scheduler.step_update(update + 1)
        progress.update = update + 1
        self.losses.add(step.loss)
        # A short run has twenty lines, too.
        interval = min(recipe.log_interval, max(1, self.arm.updates // 20))
        due = progress.update in (1, self.arm.updates) or progress.update % interval == 0
        finite, due = self.agreed(step, due or self.log.overdue)
        if not finite:
            bad = [name for name, value in step.terms.items() if not bool(torch.isfinite(value))]
            what = f"the loss at update {update + 1} (term {', '.join(bad) or 'sum'})"
            raise diverged(self.arm, update, what)
        self._report(step, due)

    def validate(self) -> None:
        """Score the student at the end of an epoch; on resume, if the run stopped before that was noted."""
        arm, progress, recipe = self.arm, self.progress, self.recipe
        epoch = progress.update / arm.updates_per_epoch
        due = progress.update == arm.updates or (epoch.is_integer() and epoch % recipe.val_interval == 0)
        noted = any(entry["update"] == progress.update for entry in progress.history)
        if not due or noted or not progress.update or self.stop:
            return
        self.save()  # a validation may take longer than whoever stops us is willing to wait
        if self.validation is None:
            return
        metrics = self.validation(self.scored)
        if metrics.loss is not None and not math.isfinite(metrics.loss):
            raise diverged(arm, progress.update, "the validation's loss")
        entry = {"update": progress.update, "epoch": epoch, **metrics.figures}
        progress.history.append(entry)
        self.log.write({"event": "validation", **entry})
        loss = "nearest neighbours" if metrics.loss is None else f"loss {metrics.loss:.3f}"
        self.reporter.say(
            f"{arm.title}: epoch {epoch:>3g}  top-1 {metrics.top1:.2f} top-5 {metrics.top5:.2f}  {loss}"
            f"{self.losses.mean(self.accelerator)}"
        )
        sign = -1 if recipe.eval_metric == "loss" else 1
        value = sign * entry[recipe.eval_metric]
        if progress.best is None or value > sign * progress.best[recipe.eval_metric]:
            progress.best = entry
            best = gathered(self.scored.state_dict(), self.session)
            if self.accelerator.is_main_process:
                digest = checkpoint.save_best(arm.checkpoints, best)
                progress.best = {**entry, "sha256": digest}
        self.save()

    def save(self) -> None:
        """Write a checkpoint; where only the progress is newer, into the one that there is."""
        accelerator, folder = self.accelerator, self.arm.checkpoints
        progress = replace(self.progress, skipped=self._skipped())
        self._share_statistics()
        self.log.flush()  # every line before a checkpoint is on the disk before it
        if self.cache:
            self.cache.flush()  # so a run that goes on from here finds it
        path = checkpoint.path_of(folder, progress.update)
        if self.saved == path:
            if accelerator.is_main_process:
                checkpoint.note(path, progress)
        else:
            tensors = {name: module.state_dict() for name, module in self._modules().items()}
            states = {"optimizer": self.optimizer.state_dict()}
            tensors, states = gathered((tensors, states), self.session)
            if accelerator.scaler is not None:
                states["scaler"] = accelerator.scaler.state_dict()
            if accelerator.is_main_process:
                checkpoint.save(folder, progress, tensors, states, keep=self.recipe.checkpoint_hist)
            self.saved = path
        accelerator.wait_for_everyone()

    def _share_statistics(self) -> None:
        """Give every process the first one's running statistics: what is validated is what is saved."""
        from timm.utils import distribute_bn

        if (world := self.accelerator.num_processes) > 1:
            for net in (self.student, *([self.ema.module] if self.ema else [])):
                distribute_bn(net, world)

    # Resuming -------------------------------------------------------------------------------------------

    def _modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        return {"learner": self.learner, **({"ema": self.ema.module} if self.ema else {})}

    def _restored(self, resume: bool) -> checkpoint.Progress:
        """The progress of the newest checkpoint, whose tensors are loaded; none where there is none."""
        arm, scaler = self.arm, self.accelerator.scaler
        states = ("optimizer", "scaler") if scaler is not None else ("optimizer",)
        found = checkpoint.load(arm.checkpoints, self._modules(), states) if resume else None
        if found:
            self.progress, self.saved = found.progress, found.path
        # One disk may fail where another does not; and nothing is written before all have read.
        if len(updates := set(gather_object([self.progress.update]))) > 1:
            raise UserError(
                f"{arm.title}: the processes read checkpoints of different updates: "
                f"{', '.join(map(str, sorted(updates)))}",
                f"see to the disk, then: {resuming(arm.run)}",
                exit_code=3,
            )
        if found:
            self._go_on(found)
        elif resume and (arm.folder == arm.run or (arm.folder / "log.jsonl").exists()):
            self.reporter.warn(f"{arm.title}: there is no checkpoint yet; starting over")
        before = self.lr
        self.scheduler.step_update(self.progress.update)
        if found and found.states and not math.isclose(before, self.lr, rel_tol=1e-6):
            self.reporter.say(
                f"{arm.title}: {self.recipe.sched} over {self.recipe.epochs} epochs from here on: "
                f"the learning rate goes from {before:.2e} to {self.lr:.2e}"
            )
        return self.progress

    def _go_on(self, found: checkpoint.Found) -> None:
        arm, progress, scaler = self.arm, found.progress, self.accelerator.scaler
        for line in found.notes:
            self.reporter.warn(line)
        if "optimizer" in found.states:
            state = found.states["optimizer"]
            self.optimizer.load_state_dict(as_parted(state, self.optimizer) if self.recipe.shard else state)
            if scaler is not None:
                scaler.load_state_dict(found.states["scaler"])
        elif progress.update < arm.updates:
            weights = arm.folder / "student" / "model.safetensors"
            raise without_optimizer(arm.folder, anew(arm.run, weights))
        if progress.update > arm.updates:
            told = f"{arm.title}: {progress.update} updates are done, more than {arm.updates}"
            raise UserError(told, "more --epochs, or those of the run")
        if not self.accelerator.is_main_process:
            progress.skipped = {}  # the first process goes on counting for all
        if progress.best is not None and not checkpoint.best_fits(arm.checkpoints, progress):
            self.reporter.warn(
                f"{arm.title}: {checkpoint.BEST} is not the one of update {progress.best['update']}: "
                "the best is chosen among the validations from here on"
            )
            progress.best = None
            progress.history = [e for e in progress.history if e["update"] < progress.update]
        self.reporter.say(f"{arm.title}: going on after update {progress.update} of {arm.updates}")

    # The parts of an update -----------------------------------------------------------------------------

    def _batches(self) -> Iterator[TrainBatch]:
        """This process's micro-batches from here to the end of the run."""
        plan, recipe, arm = self.plan, self.recipe, self.arm
        plan.images.images = kept_decoded(recipe, plan.images.images, self.session)
        first, offset = divmod(self.progress.update, arm.updates_per_epoch)
        starts = zip(count(first), chain([offset], repeat(0)))
        epochs = ((arm.epoch_seen_at(epoch), start) for epoch, start in starts)
        accum, pin = recipe.grad_accum_steps, self.session.device.type == "cuda"
        how: dict[str, Any] = {"workers": self.session.workers, "pin_memory": pin}
        if isinstance(stream := arm.images, Stream):
            how |= {"accum": accum}
            return chain.from_iterable(
                stream_loader(stream, plan.images.view, recipe.batch, epoch=epoch, start_update=start, **how)
                for epoch, start in epochs
            )
        keys = chain.from_iterable(plan.sampler.epoch(epoch, start) for epoch, start in epochs)
        left = islice(keys, (arm.updates - self.progress.update) * accum)
        return iter(train_loader(plan.images, left, **how))

    def _loss(self, batch: TrainBatch, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a micro-batch, and its terms as they are."""
        recipe, session, accelerator = self.recipe, self.session, self.accelerator
        update = self.progress.update
        # Stochastic depth and dropout draw from the global generator.
        part = micro * accelerator.num_processes + accelerator.process_index
        torch.manual_seed(_key(recipe.seed, update, part))
        images, targets = self.plan.shown(batch, update, session.device, session.dtype)
        rows = batch.positions % recipe.global_batch
        asked = Batch(
            targets=targets,
            update=update,
            rows=rows,
            global_size=recipe.global_batch,
            generator=torch.Generator().manual_seed(_key(recipe.seed, update)),
            gather=_Gather.apply,
        )
        signals: dict[Tap, Tensor] = {}
        with accelerator.autocast():
            if self.cache:
                signals = self.cache(images, self.arm.seen_at(update), rows)
            elif self.teacher:
                signals = self.teacher(images)
        return self.wrapped(images, signals, asked)

    @cached_property
    def _glance(self) -> int | None:
        """The early update at which weights are looked at; None where a run is too short to tell."""
        recipe, tells = self.recipe, self.learner.objective.can_be_lopsided
        if self.arm.updates < _TELLING or recipe.torchcompile or recipe.shard or not tells:
            return None
        return max(1, min(self.arm.updates // 20, 500)) - 1

    def _gradients(self) -> TermGradients | None:
        """To be measured in this update, for the log or for weights that follow from them; mostly not."""
        update, every, balance = self.progress.update, self.recipe.log_grads, self.learner.objective.balance
        logged = every and (update + 1) % every == 0
        if logged or (balance and balance.due(update)) or update == self._glance:
            return TermGradients(self.learner.student, self.accelerator.scaler, self.recipe.grad_accum_steps)
        return None

    def _weigh(self, norms: dict[str, float], step: Step) -> None:
        """Log the terms' shares of the gradient; where terms are balanced, estimate their weights anew."""
        update, balance = self.progress.update, self.learner.objective.balance
        shares = gradient_shares(norms, step.weights, update + 1)
        self.log.write(shares)
        if update == self._glance and (note := self.learner.objective.lopsided(shares)):
            self.reporter.warn(f"{self.arm.title}: at update {update + 1} {note}")
        if balance and balance.due(update):
            for note in balance.estimate(norms, step.weights):
                if note not in self.noted:
                    self.reporter.warn(f"{self.arm.title}: at update {update + 1} {note}")
                self.noted.add(note)

    def _clip(self) -> Tensor | None:
        """Clip in place; the norm before, where clipping is by norm."""
        from timm.utils import dispatch_clip_grad

        recipe, parameters = self.recipe, self.wrapped.parameters()
        if not recipe.clip_grad:
            return None
        if recipe.clip_mode == "norm":
            norm = self.accelerator.clip_grad_norm_(parameters, recipe.clip_grad)
            return norm.full_tensor() if isinstance(norm, DTensor) else norm
        self.accelerator.unscale_gradients()
        dispatch_clip_grad(parameters, recipe.clip_grad, mode=recipe.clip_mode)
        return None

    def agreed(self, step: Step, due: bool) -> tuple[bool, bool]:
        """Let all processes know what one sees: a signal, a loss that is not finite, a log line that is due.

        Returns:
            Are loss and gradient finite? Is a line due?
        """
        accelerator, norm = self.accelerator, step.grad_norm
        self.stop = self.signals.received
        finite = bool(torch.isfinite(step.loss))
        if norm is not None and accelerator.scaler is None:  # a scaler skips such an update by itself
            finite &= bool(torch.isfinite(norm))
        if accelerator.num_processes > 1:
            flags = torch.tensor([self.stop, int(not finite), int(due)], device=accelerator.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            self.stop, finite, due = int(flags[0]), not flags[1], bool(flags[2])
        return finite, due

    def _report(self, step: Step, due: bool) -> None:
        """Move the bar, and write a log line if one is due: means over the processes' shares of the batch."""
        recipe, progress, updates = self.recipe, self.progress, self.arm.updates
        if not due:
            self.reporter.advance(progress.update, loss=self.losses.last)
            return
        gathered = torch.stack([step.loss, *step.terms.values()]).double()
        loss, *terms = self.accelerator.reduce(gathered, "mean").tolist()
        line: dict[str, Any] = {"update": progress.update, "loss": loss, "lr": step.lr}
        for name, value in zip(step.terms, terms, strict=True):
            line[name] = value
            line[f"{name}/weighted"] = value * step.weights[name]
            if self.learner.objective.weights[name].moves:
                line[f"{name}/weight"] = step.weights[name]
        if step.grad_norm is not None and recipe.clip_grad:
            norm = float(step.grad_norm)
            line |= {"grad_norm": norm, "clip_factor": min(1.0, recipe.clip_grad / (norm + 1e-6))}
        if progress.skipped:
            line["skipped_images"] = len(progress.skipped)
        rate, waited = self.pace.told()
        line |= {"images_per_second": rate, "data_wait": waited, "time": time.time()}
        line["epoch"] = progress.update / self.arm.updates_per_epoch
        self.log.write(line)
        if progress.update in (1, updates) or progress.update % recipe.log_interval == 0:
            self.reporter.line(f"{self.arm.title}: {in_words(line, updates)}")
        self.reporter.advance(progress.update, terms_in_words(line), loss=self.losses.last)

    def _skipped(self) -> dict[str, int]:
        """The unreadable images that any process replaced, and how often."""
        if not self.recipe.skip_corrupt or self.accelerator.num_processes == 1:
            return self.progress.skipped
        return dict(sum(map(Counter, gather_object([self.progress.skipped])), Counter()))

    @contextmanager
    def _oom_as_user_error(self) -> Iterator[None]:
        try:
            yield
        except (MemoryError, RuntimeError) as problem:  # torch.OutOfMemoryError is a RuntimeError
            words = ("out of memory", "can't allocate memory")
            if isinstance(problem, RuntimeError) and not any(w in str(problem) for w in words):
                raise
            recipe, models = self.recipe, self.learner.spec.name
            if self.teacher:
                models += f" and {self.teacher.spec.name}"
            raise UserError(
                f"out of memory with {recipe.batch} images a process through {models}",
                f"--batch-size {max(recipe.batch // 2, 1)} --grad-accum-steps "
                f"{recipe.grad_accum_steps * 2} keeps the global batch; --grad-checkpointing saves more",
                exit_code=3,
            ) from None


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


def diverged(arm: Arm, update: int, what: str) -> UserError:
    """The weights after ``update`` are no good; those of a checkpoint are that a finite update followed."""
    recipe, saved = arm.recipe, checkpoint.complete(arm.checkpoints)
    good = [path for path in saved if int(path.name.removeprefix("update-")) < update]
    lower = f"--lr {recipe.peak_lr / 4:.2g}"
    hint = f"begin again with {lower}, clip with --clip-grad 1, or train with --mixed-precision no"
    if good and arm.folder == arm.run:  # an arm or a teacher has no recipe of its own
        hint = anew(arm.run, good[-1] / "learner.safetensors", lower)
    return UserError(
        f"{what} is not finite: the training diverged (learning rate {recipe.peak_lr:.2e}, "
        f"precision {recipe.mixed_precision}); "
        + (f"the last good checkpoint is {good[-1]}" if good else "there is no good checkpoint"),
        hint,
        exit_code=3,
    )
