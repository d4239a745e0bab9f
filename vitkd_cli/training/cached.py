"""A teacher that is asked once: its answers of an update are read from a cache, or computed and put there."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from vitkd_cli.data.images import Images
from vitkd_cli.data.keyed import train_loader
from vitkd_cli.errors import UserError
from vitkd_cli.evaluation.cache import digest_in_order, digest_of_weights, safe_name
from vitkd_cli.files import CannotWrite, part_of, remove, repair, saving
from vitkd_cli.options import declared
from vitkd_cli.recipe import Augmentation, Data
from vitkd_cli.session import Session
from vitkd_cli.terms import to_device
from vitkd_cli.training import shards
from vitkd_cli.training.cache import WEIGHTS, Cache
from vitkd_cli.training.folder import sole_writer
from vitkd_cli.training.plan import Plan
from vitkd_cli.training.shards import Shard, Signal, Span
from vitkd_cli.vit.taps import Tap

_SHARD = 2**28  # bytes of what is written before it gets its name; a kill loses so much
_CHECKED = 8  # images of an update
_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
# Settings that no training view follows from; which images there are, and the student's mean and standard
# deviation, are facts of their own. Whatever setting is added counts.
_ELSEWHERE = (
    *("smoothing", "crop_pct", "interpolation", "mean", "std"),
    *("data", "data_dir", "train_split", "val_split", "val_fraction", "val_data", "shots", "class_map"),
    *("num_classes", "dataset_download", "target_key", "max_pixels", "skip_corrupt", "remote_cache"),
)
_LIBRARIES = ("timm", "torchvision", "pillow")  # that compute the teacher and the views
_NO_MATTER = ("training", "fused_attn", "grad_checkpointing")  # attributes of layers: all compute the same
# An arm's images are another's, and so is its teacher, which an arm before may have left rounded.
_digests: WeakKeyDictionary[Images | nn.Module, str] = WeakKeyDictionary()


# What a cache is of ---------------------------------------------------------------------------------------


def cache_of(plan: Plan, session: Session, tuned_in: str) -> Cache | None:
    """The cache of a rehearsed arm; None where it has no teacher, or keeps nothing.

    Args:
        tuned_in: where the run is yet to fine-tune the teacher, if it is.
    """
    recipe, teacher = plan.recipe, plan.tapped
    if teacher is None or recipe.answers_folder is None:
        return None
    spec = teacher.spec
    size = "x".join(map(str, spec.input_size))
    arm = plan.arm
    epochs = recipe.cached_epochs or recipe.epochs + recipe.cooldown_epochs
    return Cache(
        place=Path(recipe.answers_folder),
        teacher=safe_name(f"{teacher.built.origin or spec.name}-{size}"),
        facts=_facts(plan, session),
        signals=_signals(plan, session),
        per_epoch=arm.updates_per_epoch,
        updates=min(arm.updates, epochs * arm.updates_per_epoch),
        tuned_in=tuned_in,
    )


def _facts(plan: Plan, session: Session) -> dict[str, Any]:
    """All that a teacher's answers depend on, beside taps and updates."""
    recipe, teacher, images = plan.recipe, plan.tapped, plan.arm.images
    assert teacher is not None and isinstance(images, Images)
    if images not in _digests:
        _digests[images] = digest_in_order(images)
    if teacher.built.net not in _digests:
        _digests[teacher.built.net] = digest_of_weights(teacher.built.net)
    student = plan.student.spec
    views = {
        name: getattr(recipe, name)
        for part in (Augmentation, Data)
        for name in declared(part)
        if name not in _ELSEWHERE
    }
    facts = {
        "format": 1,
        WEIGHTS: _digests[teacher.built.net],
        "layers of the teacher": _digest_of_layers(teacher.built.net),
        "mean and standard deviation of the teacher": [*teacher.spec.mean, *teacher.spec.std],
        "images (files, sizes or times)": _digests[images],
        "number of images": len(images),
        "view seed": recipe.views_key,
        "images an update": recipe.global_batch,
        "view size": list(plan.size),
        "cache_side": recipe.cache_side,
        "mean and standard deviation of the student": [*student.mean, *student.std],
        "computed in": f"{recipe.model_dtype}/{session.accelerator.mixed_precision} on {session.device.type}"
        + (", compiled" if recipe.torchcompile else ""),
        "images decoded by": "torchvision" if recipe.decodes_fast(session.device.type) else "pillow",
        "cache_dtype": recipe.cache_dtype,
        "libraries": [f"{name} {version(name)}" for name in _LIBRARIES],
        **views,
    }
    if images.file(0) is None:  # their indices are those of any dataset
        facts |= {"data": recipe.data, "train_split": recipe.train_split}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in facts.items()}


def _digest_of_layers(net: nn.Module) -> str:
    """Of a network's layers, and of what they do not print, such as ``global_pool``."""
    digest = hashlib.sha256(repr(net).encode())
    for name, layer in net.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(layer).items())
            if isinstance(value, (str, int, float, tuple)) and key[0] != "_" and key not in _NO_MATTER
        }
        digest.update(f"{name} {plain}\n".encode())
    return digest.hexdigest()


def _signals(plan: Plan, session: Session) -> dict[Tap, Signal]:
    """What is kept of each tap, found out on a blank image, in the precision of the training."""
    teacher, recipe = plan.tapped, plan.recipe
    assert teacher is not None
    blank = torch.zeros(1, len(teacher.spec.mean), *plan.size, device=session.device, dtype=session.dtype)
    with session.accelerator.autocast():
        said = teacher(blank)
    return {
        tap: Signal(
            (recipe.global_batch, *by_image(tap, signal).shape[1:]),
            _TYPES.get(recipe.cache_dtype, signal.dtype),
        )
        for tap, signal in sorted(said.items())
    }


def by_image(tap: Tap, signal: Tensor) -> Tensor:
    """A signal with its images first, ``[B, ...]``; and back."""
    return signal.transpose(0, 1) if tap.kind == "qkv" else signal


# Its answers ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    """Where the signals of some updates come from: as the main process found it, for all.

    Attributes:
        read: the shards of taps that are there.
        write: taps that are computed and kept, and where their shards are written.
    """

    span: Span
    read: dict[Tap, tuple[Span, Path]] = field(default_factory=dict)
    write: dict[Tap, Path] = field(default_factory=dict)


class CachedTeacher:
    """Answers from the cache, and puts into it what is not there.

    Every process asks for the same updates in the same order. A computed signal is answered as it is kept, so
    that the run that fills a cache trains as those that read it. Only one run writes at a time; another one
    reads the shards that have their name, and computes the rest for itself. Used as a context, around all
    updates; leaving it lets go of the lock.
    """

    def __init__(self, plan: Plan, cache: Cache, session: Session) -> None:
        assert plan.tapped is not None
        self.plan, self.cache, self.session = plan, cache, session
        self.teacher, self.title = plan.tapped, plan.arm.title
        self._main = session.accelerator.is_main_process
        self._source: _Source | None = None
        self._read: dict[Tap, Tensor] = {}
        self._write: dict[Tap, Shard] = {}
        self._done = 0  # the update after the last one that was written
        self._failed = ""  # why something could not be written
        self._lock = ExitStack()
        self._holds_lock, self._writes = False, cache.keeps
        self._sound: set[Path] = set()
        self._damaged: set[Path] = set()
        self._answered = {True: 0, False: 0}  # micro-batches, by whether all was there
        self._said: set[str] = set()

    def __enter__(self) -> Self:
        self.session.main_process_first(self._open)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            if kind is None:
                self.flush()
                steps = self.plan.recipe.grad_accum_steps
                kept, computed = (self._answered[there] // steps for there in (True, False))
                if kept or computed:
                    self.session.reporter.say(
                        f"{self.title}: the teacher's answers of {kept:,} updates were read, those of "
                        f"{computed:,} computed"
                    )
        finally:
            self._abandon()
            self._lock.close()

    def __call__(self, images: Tensor, update: int, rows: Tensor) -> dict[Tap, Tensor]:
        """The teacher's signals for some rows ``[B]`` of an update's images.

        Args:
            images: these rows ``[B, C, H, W]`` as both models see them.
            update: the one whose views they are.
        """
        epoch, within = divmod(update, self.cache.per_epoch)
        if self._source is None or not self._source.span.holds(epoch, within):
            self.flush()
            self._turn_to(epoch, within)
        assert self._source is not None
        there = len(self._read) == len(self.cache.signals)
        self._answered[there] += 1
        live = {} if there else self.teacher(images)
        signals = {}
        for tap, signal in self.cache.signals.items():
            if tap in self._read:
                first = self._source.read[tap][0].start
                kept = self._read[tap][within - first].index_select(0, rows)
                signals[tap] = by_image(tap, to_device(kept, images.device))
                continue
            kept = live[tap].to(signal.dtype)
            self._compare(tap, kept, live[tap])
            signals[tap] = kept
            if tap in self._write and not self._failed:
                try:
                    with self._saving():
                        self._write[tap].write(within, rows, by_image(tap, kept).cpu())
                except CannotWrite as problem:
                    self._failed = problem.message
        self._done = within + 1
        return signals

    def flush(self) -> None:
        """Give what was written so far its name; between updates."""
        if self._source and self._source.write:
            failed = next(filter(None, gather_object([self._failed])), "")
            if self._main and not failed:
                span = replace(self._source.span, stop=self._done)
                try:
                    for tap, shard in self._write.items():
                        path = shards.folder_of(self.cache.folder, tap) / span.file
                        with self._saving():
                            shard.seal(path, span.stop - span.start, self.cache.about(tap, span))
                        self._sound.add(path)
                        self._damaged.discard(path)
                except CannotWrite as problem:
                    failed = problem.message
            if self._main and failed:
                self._give_up(failed)
        self._abandon()

    def _abandon(self) -> None:
        for shard in self._write.values():
            with suppress(OSError):
                shard.close()
        if self._main and self._source:
            self._delete(self._source.write.values())
        self._write, self._read, self._source, self._failed = {}, {}, None, ""

    # The main process -----------------------------------------------------------------------------------

    def _open(self) -> None:
        """Make the folder, and compare what is there with what the teacher says now."""
        cache = self.cache
        cache.check_others()
        try:
            if self._writes:
                with self._saving():
                    cache.begin()
        except CannotWrite as problem:
            self._give_up(problem.message)
        if updates := self._updates_there():
            worst = max(off for update in updates for off in self._off(*update))
            fits = "to the bit" if worst == 0 else f"but for {worst:.0e} of it"
            self.session.reporter.say(
                f"cache    {cache.folder}: {len(updates)} updates of it are as the teacher says them, {fits}"
            )

    def _off(self, epoch: int, within: int) -> Iterator[float]:
        """How far what is kept of an update is from what the teacher says of some of its images.

        Raises:
            UserError: farther than another order of the same sums.
        """
        plan, session, cache = self.plan, self.session, self.cache
        rows = plan.sampler.micro_batches[0]
        few = _CHECKED // 2
        rows = [*rows[:few], *rows[few:][-few:]]  # mirrored pairs are mixed with each other
        order, first = plan.sampler.order(epoch), within * plan.sampler.global_batch
        keys = [(epoch, first + row, order[first + row]) for row in rows]
        batch = next(iter(train_loader(plan.images, [keys])))
        update = epoch * cache.per_epoch + within
        images, _ = plan.shown(batch, update, session.device, session.dtype)
        with session.accelerator.autocast():
            live = self.teacher(images)
        exact = session.accelerator.mixed_precision == "no" and session.device.type == "cpu"
        for tap, (span, path) in self._there(epoch, within).items():
            kept = shards.mapped(path)[within - span.start][torch.tensor(rows)]
            said = by_image(tap, live[tap].to(kept.dtype)).cpu()
            yield (off := relative(kept, said))
            if off > (2e-3 if exact else 3e-2):
                raise UserError(
                    f"{cache.folder} does not hold what the teacher says: {tap} of update {update} is off "
                    f"by {off:.1e}",
                    "delete it: it is made anew",
                    exit_code=3,
                )

    def _updates_there(self) -> list[tuple[int, int]]:
        """The first, a middle and the last update of which something is kept."""
        known = sorted({span for tap in self.cache.signals for span in self._spans(tap)})
        if not known:
            return []
        first, middle, last = known[0], known[len(known) // 2], known[-1]
        places = (
            (first.epoch, first.start),
            (middle.epoch, (middle.start + middle.stop) // 2),
            (last.epoch, last.stop - 1),
        )
        return list(dict.fromkeys(places))

    def _turn_to(self, epoch: int, within: int) -> None:
        """From here on until the source's end."""
        [found] = broadcast_object_list([self._look(epoch, within) if self._main else None])
        self._source = found
        self._read = {tap: shards.mapped(path) for tap, (_, path) in found.read.items()}
        try:
            with self._saving():
                for tap, part in found.write.items():
                    self._write[tap] = Shard(part, self.cache.signals[tap], found.span.start)
        except CannotWrite as problem:
            self._failed = problem.message

    def _look(self, epoch: int, within: int) -> _Source:
        """What is there of an update and of those that follow it, and what can be put there."""
        signals = self.cache.signals
        read = self._there(epoch, within)
        write: list[Tap] = []
        if len(read) < len(signals) and self._may_write():
            read = self._there(epoch, within)  # somebody may have written in between
            write = [tap for tap in signals if tap not in read]
        stop = min([self.cache.per_epoch, *(span.stop for span, _ in read.values())])
        if lacking := [tap for tap in signals if tap not in read]:
            later = (span for tap in lacking for span in self._spans(tap, epoch) if span.start > within)
            each = sum(signals[tap].bytes for tap in lacking)
            left = self.cache.updates - epoch * self.cache.per_epoch
            stop = min([stop, left, within + max(1, _SHARD // each), *(span.start for span in later)])
        span = Span(epoch, within, stop)
        parts = {tap: part_of(shards.folder_of(self.cache.folder, tap) / span.file) for tap in write}
        try:
            if parts:
                self._damaged -= self._delete(self._damaged)
            for tap, part in parts.items():
                with self._saving():
                    shards.reserve(part, (stop - within) * signals[tap].bytes)
        except CannotWrite as problem:
            self._give_up(problem.message)
            self._delete(parts.values())
            parts = {}
        return _Source(span, read, parts)

    def _spans(self, tap: Tap, epoch: int | None = None) -> list[Span]:
        folder = shards.folder_of(self.cache.folder, tap)
        return [span for span in shards.spans(folder, epoch) if folder / span.file not in self._damaged]

    def _there(self, epoch: int, within: int) -> dict[Tap, tuple[Span, Path]]:
        """The shards that hold an update; each is verified once, and one that is damaged is named."""
        found = {}
        for tap, signal in self.cache.signals.items():
            for span in self._spans(tap, epoch):
                path = shards.folder_of(self.cache.folder, tap) / span.file
                if not span.holds(epoch, within):
                    continue
                if path not in self._sound:
                    if why := shards.wrong_with(path, span, signal, self.cache.about(tap, span)):
                        self._damaged.add(path)
                        self._say_once(f"{path} {why}: it is not used, and made anew")
                        continue
                    self._sound.add(path)
                found[tap] = span, path
                break
        return found

    def _may_write(self) -> bool:
        """Are we the one run that writes? It is tried anew for every shard."""
        if not self._writes or self._holds_lock:
            return self._writes
        try:
            self._lock.enter_context(sole_writer(self.cache.folder, 0, lambda line: None))
            for tap in self.cache.signals:
                folder = shards.folder_of(self.cache.folder, tap)
                folder.mkdir(exist_ok=True)
                repair(folder)
        except (UserError, OSError) as problem:
            why = getattr(problem, "message", problem)
            self._say_once(f"{why}: this run reads what is there, and runs the teacher for the rest")
            self._lock.close()
            return False
        self._holds_lock = True
        self._damaged.clear()  # who wrote before may have made them anew
        return True

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Whatever the system refuses is a :class:`CannotWrite`: it ends the cache, and not the training."""
        try:
            with saving(self.cache.folder):
                yield
        except OSError as problem:
            why = (problem.strerror or str(problem)).lower()
            raise CannotWrite(f"cannot write {self.cache.folder}: {why}") from None

    def _delete(self, paths: Iterable[Path]) -> set[Path]:
        """Delete files, as far as they can be; those that are gone."""
        gone = set()
        for path in paths:
            with suppress(OSError, UserError):
                remove(path)
                gone.add(path)
        return gone

    def _give_up(self, why: str) -> None:
        self._writes = False
        self.session.reporter.warn(f"{why}; the training goes on, and keeps no more of what the teacher says")

    def _say_once(self, line: str) -> None:
        if line not in self._said:
            self.session.reporter.warn(f"{self.title}: {line}")
        self._said.add(line)

    def _compare(self, tap: Tap, kept: Tensor, live: Tensor) -> None:
        """Say once what a smaller type costs; refuse one that cannot hold the signal."""
        if kept.dtype == live.dtype:
            return
        if kept.dtype == torch.float16 and bool(live.isfinite().all()) and not bool(kept.isfinite().all()):
            raise UserError(
                f"{tap}: {float(live.abs().max()):.3g} is beyond what fp16 holds",
                "--cache-dtype bf16, or exact",
                exit_code=3,
            )
        if str(tap) not in self._said:
            self._said.add(str(tap))
            name = self.plan.recipe.cache_dtype
            self.session.reporter.say(
                f"cache    {tap} in {name}: off by {relative(kept, live):.1e} of what the teacher says"
            )


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Their distance, over the second one's norm."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
