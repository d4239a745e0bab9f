"""Which image a process sees when, and with which randomness: both are functions of a key.

A key is (epoch, position in the epoch's order, index of the image). The order is drawn from (seed, epoch),
the view of an image from (seed, epoch, position), so neither the number of workers nor of processes nor a
resumed run changes a pixel. Position, not index: repeated augmentation shows an image several times.
"""

import atexit
import multiprocessing
import random
import re
import signal
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from typing import Any, NamedTuple
from weakref import WeakSet

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from vitkd_cli.data.images import Images, Split, Stream, UnreadableImage
from vitkd_cli.errors import UserError

_NEARBY = 4096  # images among which others of a class are looked for at a time
Key = tuple[int, int, int]
View = Callable[[Image.Image], Any]


class TrainBatch(NamedTuple):
    """A micro-batch of one process.

    Attributes:
        images: ``[B, C, H, W]`` uint8.
        labels: ``[B]`` int64.
        positions: ``[B]`` int64 in the epoch's order; modulo the global batch they are its rows.
        skipped: the unreadable images that others of their class stand in for, by name.
    """

    images: Tensor
    labels: Tensor
    positions: Tensor
    skipped: list[str]


class ValBatch(NamedTuple):
    """Images ``[B, C, H, W]`` uint8, labels ``[B]`` and indices in the split ``[B]``, both int64.

    Of several :class:`vitkd_cli.data.transforms.Views`, ``images`` is a tuple with one batch per view.
    """

    images: Any
    labels: Tensor
    indices: Tensor


@contextmanager
def keyed_generators(*key: int) -> Iterator[None]:
    """Python's, numpy's and torch's (CPU) global generators, seeded by ``key`` and put back afterwards."""
    with _generators_put_back():
        _seed_generators(key)
        yield


def _seed_generators(key: Sequence[int]) -> None:
    # The length tells (1, 0) from (1, 0, 0), which SeedSequence would pad to the same.
    words = np.random.SeedSequence([len(key), *(part % 2**64 for part in key)]).generate_state(3, np.uint64)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]) % 2**32)
    torch.default_generator.manual_seed(int(words[2] >> 1))  # torch.manual_seed would reach the devices too


@contextmanager
def _generators_put_back() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


class Keyed(Dataset[Any]):
    """Training images by key instead of index.

    Args:
        images: a split; a stream is read by :func:`stream_loader` instead.
        view: a random view; it draws from the global generators.
        seed: the run's.
        skip_corrupt: an unreadable image is replaced by the next readable one of its class, and named in the
            batch; otherwise it ends the run.
    """

    def __init__(self, images: Split, view: View, seed: int, skip_corrupt: bool = False) -> None:
        self.images, self.view, self.seed, self.skip_corrupt = images, view, seed, skip_corrupt

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: Key) -> tuple[Tensor, int, int, str | None] | UserError:
        """A view ``[C, H, W]`` uint8, its class, its position, and the name of an image it stands in for.

        A :class:`UserError` is returned, not raised: on its way out of a worker an exception would lose its
        hint and gain a traceback. :class:`Loader` raises it.
        """
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[Key]) -> list[tuple[Tensor, int, int, str | None] | UserError]:
        """A batch of them: putting three generators back takes longer than seeding them."""
        with _generators_put_back():
            return [self._view(*key) for key in keys]

    def _view(self, epoch: int, position: int, index: int) -> Any:
        try:
            image, label, skipped = self._read(index)
        except UserError as error:
            return error
        _seed_generators((self.seed, epoch, position))
        return self.view(image), label, position, skipped

    def _read(self, index: int) -> tuple[Image.Image, int, str | None]:
        assert isinstance(self.images, Images)
        try:
            return *self.images[index], None
        except UnreadableImage as error:
            if not self.skip_corrupt:
                hint = f"{error.hint}, or pass --skip-corrupt"
                raise UnreadableImage(error.message, hint, error.exit_code) from None
        for other in self._others(index):
            with suppress(UnreadableImage):
                return *self.images[other], self.images.path(index)
        raise UnreadableImage(
            f"no image of the class of {self.images.path(index)} can be read", "repair the files", exit_code=3
        )

    def _others(self, index: int) -> Iterator[int]:
        """The other images of its class: those behind it, then the first ones."""
        assert isinstance(self.images, Images)
        labels = self.images.classes
        for start, end in ((index + 1, len(labels)), (0, index)):
            for first in range(start, end, _NEARBY):
                alike = labels[first : min(first + _NEARBY, end)] == labels[index]
                yield from (first + np.flatnonzero(alike)).tolist()


def updates_per_epoch(length: int, global_batch: int) -> int:
    """Whole global batches of ``length`` images; the rest are dropped for this epoch."""
    return length // global_batch


class BatchSampler:
    """The keys of one process, a micro-batch at a time.

    With mirrored pairs, micro-batch k takes the rows [k·B/2, (k+1)·B/2) of the global batch of G images and
    their mirrors G−1−row, in such an order that reversing the micro-batch pairs what reversing the global
    batch would: mixup and cutmix do not notice how many processes share the work.

    Args:
        length: images of the split.
        batch_size: B, images of a micro-batch.
        accum: micro-batches of a process for each update.
        rank, world: this process, and how many there are. G = B · world · accum.
        seed: draws the order of every epoch, the same on every process.
        aug_repeats: an image comes this many times running in the epoch's order, which is not longer for it:
            an epoch shows 1/aug_repeats of the images.
        mirrored: False takes the rows in plain order, for odd batches that are not mixed.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        *,
        seed: int,
        accum: int = 1,
        rank: int = 0,
        world: int = 1,
        aug_repeats: int = 0,
        mirrored: bool = True,
    ) -> None:
        if mirrored and batch_size % 2:
            raise UserError(
                f"batch_size is {batch_size}: mixup and cutmix mix images in pairs",
                "give an even --batch-size, or --mixup 0 --cutmix 0",
            )
        self.global_batch = batch_size * world * accum
        self.updates = updates_per_epoch(length, self.global_batch)
        if self.updates == 0:
            fits = length // (world * accum)
            fits -= fits % 2 if mirrored else 0
            raise UserError(
                f"{length} training images are fewer than one global batch of {self.global_batch} "
                f"({batch_size} × {world} processes × {accum} accumulation steps)",
                f"--batch-size {fits}, or --global-batch {fits * world * accum} where that is set"
                if fits
                else "use fewer processes or accumulation steps, or a smaller --global-batch",
            )
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.shards: Tensor | None = None
        self.block = 0
        self.aug_repeats, self.mirrored = aug_repeats, mirrored
        self.micro_batches = [self._rows(step * world + rank) for step in range(accum)]

    def epoch(self, number: int, start_update: int = 0) -> Iterator[list[Key]]:
        """The micro-batches of an epoch, of which ``start_update`` updates are done already."""
        order = self.order(number)
        for update in range(start_update, self.updates):
            for rows in self.micro_batches:
                positions = [update * self.global_batch + row for row in rows]
                yield [(number, position, order[position]) for position in positions]

    def in_blocks(self, shards: np.ndarray[Any, Any], block: int) -> None:
        """Shuffle shards, and images within ``block`` of them at a time: an update reads from few shards.

        Args:
            shards: ``[N]``, the shard of each image.
        """
        self.shards, self.block = torch.from_numpy(shards), block

    def order(self, epoch: int) -> Sequence[int]:
        """The index of the image at every position of an epoch."""
        generator = torch.Generator()
        words = np.random.SeedSequence([self.seed % 2**64, epoch]).generate_state(1, np.uint64)
        generator.manual_seed(int(words[0] >> 1))
        order = torch.randperm(self.length, generator=generator)
        if self.shards is not None:
            count = int(self.shards.max()) + 1
            blocks = torch.randperm(count, generator=generator) // self.block  # of each shard
            order = order[blocks[self.shards[order]].argsort(stable=True)]
        if self.aug_repeats > 1:
            order = order.repeat_interleave(self.aug_repeats)
        return array("q", order[: self.updates * self.global_batch].numpy().tobytes())

    def _rows(self, k: int) -> list[int]:
        """Rows of the global batch in micro-batch ``k`` of the update."""
        size = self.batch_size
        if not self.mirrored:
            return list(range(k * size, (k + 1) * size))
        half = range(k * size // 2, (k + 1) * size // 2)
        return [*half, *(self.global_batch - 1 - row for row in reversed(half))]


class Loader(DataLoader[Any]):
    """A DataLoader that raises the :class:`UserError` that a worker handed over in place of a batch.

    Workers ignore SIGTERM and SIGINT: schedulers signal the whole process group, and the current update must
    still finish.

    Args:
        stream: what is read to its end, all images of it.
    """

    def __init__(self, *args: Any, stream: Stream | None = None, **options: Any) -> None:
        super().__init__(*args, **{**options, "worker_init_fn": _ignore_signals})
        self.stream = stream

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches = super().__iter__()
        if self.num_workers:
            _running.add(batches)
            atexit.unregister(_shut_down)
            atexit.register(_shut_down)  # runs before what the workers' start registered, which waits
        seen = 0
        try:
            for batch in batches:
                if isinstance(batch, UserError):
                    raise batch
                seen += len(batch.labels)
                yield batch
            if self.stream is not None and seen < len(self.stream):
                raise UserError(
                    f"{self.stream.name} holds {seen} images, and {len(self.stream)} were announced",
                    "restore what is missing, or correct the count of its split",
                    exit_code=3,
                )
        except (OSError, EOFError):  # perhaps of a worker that was ended while it handed a batch over
            running = {worker.sentinel: str(worker.pid) for worker in getattr(batches, "_workers", ())}
            # Its end may not have been told yet.
            ended = [running[end] for end in connection.wait(running, timeout=1)] if running else []
            if not ended:
                raise
            raise RuntimeError(f"DataLoader worker (pid(s) {', '.join(ended)}) exited unexpectedly") from None
        finally:
            if self.num_workers:  # collected with a traceback, their queues close first, and torch waits 10 s
                batches._shutdown_workers()  # type: ignore[attr-defined]


def _ignore_signals(worker: int) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def abandon_workers() -> None:
    """Kill the loaders' workers: one may hang in a read that never ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch takes their end for a failure
    for worker in multiprocessing.active_children():
        worker.kill()


def lost_worker(problem: RuntimeError, hint: str) -> UserError | None:
    """What torch says of a loader worker that the system ended, in words; None if it is something else.

    It may say so at any moment: it hears of its workers' ends by a signal.
    """
    words = r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([^.]+))?"
    if not (found := re.search(words, str(problem))):
        return None
    return UserError(
        f"loader worker (process {found[1]}) was ended" + (f": {found[2]}" if found[2] else ""),
        f"memory or /dev/shm ran out, as a rule: fewer --workers; {hint}",
        exit_code=3,
    )


_running: WeakSet[Any] = WeakSet()


def _shut_down() -> None:
    """Shut down workers that a traceback keeps alive; they ignore multiprocessing's SIGTERM."""
    for batches in list(_running):
        batches._shutdown_workers()
    for worker in multiprocessing.active_children():
        if worker.daemon:  # multiprocessing would send it a SIGTERM and wait forever
            worker.kill()


def train_loader(
    keyed: Keyed, keys: Iterable[list[Key]], workers: int = 0, pin_memory: bool = False
) -> Loader:
    """:class:`TrainBatch` after :class:`TrainBatch`, of the keys of a :class:`BatchSampler`.

    They are this process's own; Accelerate must not prepare the loader. One loader for many epochs spares
    each of them the start of its workers and the wait for its first batch.
    """
    return Loader(
        keyed,
        batch_sampler=keys,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_train_batch,
        generator=torch.Generator(),  # a DataLoader draws its workers' seeds; not from the run's generator
    )


def val_loader(
    images: Split,
    view: View,
    batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Loader:
    """:class:`ValBatch` after :class:`ValBatch`: images rank, rank + world, ...

    No image is padded, repeated or dropped. An unreadable one ends the evaluation. The indices of a stream
    have gaps where its workers do not read alike.
    """
    stream = isinstance(images, Stream)
    if stream and world > 1:
        raise UserError(
            "a stream cannot be shared among processes image by image",
            "score it in one process, or use a dataset with an index",
        )
    return Loader(
        _Counted(images, view) if isinstance(images, Stream) else _Indexed(images, view),
        batch_size,
        sampler=None if stream else range(rank, len(images), world),
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_val_batch,
        generator=torch.Generator(),
        stream=images if isinstance(images, Stream) else None,
    )


def stream_loader(
    stream: Stream,
    view: View,
    batch_size: int,
    *,
    epoch: int,
    start_update: int = 0,
    accum: int = 1,
    workers: int = 0,
    pin_memory: bool = False,
) -> Iterator[TrainBatch]:
    """One epoch of a stream in one process: whole batches, as :func:`train_loader` hands them over.

    The reader shuffles and may repeat; views are drawn from the workers' running generators. Only the
    positions, by which terms draw their masks, are keyed.
    """
    stream.images.set_epoch(epoch)
    stream.images.set_loader_cfg(num_workers=workers)
    loader = Loader(
        _Counted(stream, view),
        batch_size,
        num_workers=workers,
        pin_memory=pin_memory,
        collate_fn=_val_batch,
        drop_last=True,
    )
    end = updates_per_epoch(len(stream), batch_size * accum) * accum
    for step, batch in enumerate(loader, start_update * accum):
        positions = torch.arange(step * batch_size, (step + 1) * batch_size)
        yield TrainBatch(batch.images, batch.labels, positions, [])
        if step + 1 == end:
            return
    raise UserError(
        "the data ended before its epoch did: its readers share it out unevenly",
        "--workers 1, or a dataset with an index",
        exit_code=3,
    )


class _Indexed(Dataset[Any]):
    """Evaluation images with their indices."""

    def __init__(self, images: Images, view: View) -> None:
        self.images, self.view = images, view

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | UserError:
        try:
            image, label = self.images[index]
        except UserError as error:
            return error
        return self.view(image), label, index


class _Counted(IterableDataset[Any]):
    """A stream's images, counted as they come; one of several workers counts in steps of their number."""

    def __init__(self, stream: Stream, view: View) -> None:
        self.stream, self.view = stream, view

    def __iter__(self) -> Iterator[tuple[Tensor, int, int]]:
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        upright = self.stream.decoding.upright
        for count, (image, label) in enumerate(self.stream.images):
            yield self.view(upright(image)), int(label), first + count * step


def _train_batch(samples: Sequence[Any]) -> TrainBatch | UserError:
    if error := next((sample for sample in samples if isinstance(sample, UserError)), None):
        return error
    images, labels, positions, skipped = zip(*samples, strict=True)
    return TrainBatch(
        torch.stack(images), torch.tensor(labels), torch.tensor(positions), [name for name in skipped if name]
    )


def _val_batch(samples: Sequence[Any]) -> ValBatch | UserError:
    if error := next((sample for sample in samples if isinstance(sample, UserError)), None):
        return error
    images, labels, indices = zip(*samples, strict=True)
    if isinstance(images[0], tuple):
        views: Any = tuple(torch.stack(view) for view in zip(*images, strict=True))
    else:
        views = torch.stack(images)
    return ValBatch(views, torch.tensor(labels), torch.tensor(indices))
