"""Training images decoded once and kept (``--cache-images``): files of pixels that are mapped into memory.

A shard holds ``SHARD`` images. Its name is a hash of how they were decoded and of each file's path, size and
time of change, so a changed image has another shard, and one folder serves any runs, at the same time too.
It is written beside its place and renamed, and its checksum is verified before a run reads it.
"""

import atexit
import hashlib
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitkd_cli.data.images import Images, UnreadableImage, reading
from vitkd_cli.data.pixels import FastDecoding, Pixels, as_values
from vitkd_cli.device import cores
from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.files import CannotWrite, free_bytes, is_leftover, repair, saving, whole_file
from vitkd_cli.text import in_bytes

SHARD = 64  # images of a file
OFF, RAM = "off", "ram"
SHARED_MEMORY = Path("/dev/shm")
_LOCK, _IN_USE = ".lock", ".in-use"
_MEMORY = 0.25  # of what is free, for the shards that are being made
_SAMPLE = 256  # headers that are read to tell how much room all images take
_verified: set[Path] = set()  # in this process
Each = Callable[[int, int], None]


class DecodedImages:
    """Opens cached images by their row in the cache.

    Args:
        images: before they were cached.
        paths: of the shards, in the order of the images.
        side: see :func:`fill`.
    """

    def __init__(self, images: Images, paths: Sequence[Path], side: int | None) -> None:
        self.images, self.paths, self.side = images, paths, side
        self._mapped: dict[int, tuple[Tensor, list[list[int]]]] = {}

    def __call__(self, row: int, decoding: Callable[[Any], Any]) -> Any:
        """:class:`Pixels` for a :class:`FastDecoding`, else a PIL image."""
        pixels = self._pixels(*divmod(row, SHARD))
        if pixels is None:  # there is none of it: the file itself, which may say why
            pixels = _decoded(self.images, self.images.refs[row], self.side)
        return pixels if isinstance(decoding, FastDecoding) else pixels.image()

    def _pixels(self, number: int, row: int) -> Pixels | None:
        if number not in self._mapped:
            if not self.paths[number].is_file():
                return None
            values, places, _ = _mapped(self.paths[number])
            self._mapped[number] = values, places.tolist()
        kept, rows_of = self._mapped[number]
        start, rows, columns, height, width = rows_of[row]
        if not rows:
            return None
        flat = kept[start : start + 3 * rows * columns]
        return Pixels(flat.view(rows, columns, 3).permute(2, 0, 1), (height, width))

    def name(self, row: int) -> str:
        return self.images.path(row)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}  # a worker maps its own


def cached(images: Images, place: str, side: int | None = None) -> Images:
    """The same images from the shards that :func:`fill` made."""
    shards = DecodedImages(images, shards_of(images, cache_folder(place), side), side)
    found = Images(range(len(images)), images.labels(), shards, shards.name)
    found.decode_by(images.decoding)
    return found


def cache_folder(place: str) -> Path:
    """The folder that ``--cache-images`` means."""
    if place != RAM:
        return expanded(place)
    if not SHARED_MEMORY.is_dir():
        raise UserError(f"--cache-images ram: this system has no {SHARED_MEMORY}", "--cache-images FOLDER")
    return SHARED_MEMORY / f"vitkd-{os.getuid()}"


def shards_of(images: Images, folder: Path, side: int | None) -> list[Path]:
    """Where the shards of these images are, or will be."""
    decoding = sorted(asdict(images.decoding).items())
    paths = []
    for start in range(0, len(images), SHARD):
        digest = hashlib.sha256(repr((1, SHARD, side, decoding)).encode())
        for index in range(start, min(start + SHARD, len(images))):
            if (place := images.place(index)) is None:
                raise UserError("--cache-images keeps image files, and these are none", "--cache-images off")
            file, start_in = place
            digest.update(os.fsencode(file) + (b" %d" % start_in if start_in else b""))
            with suppress(OSError):
                status = os.stat(file)
                digest.update(f" {status.st_size} {status.st_mtime_ns}\n".encode())
        paths.append(folder / f"{digest.hexdigest()[:32]}.safetensors")
    return paths


def fill(
    images: Images,
    place: str,
    side: int | None = None,
    each: Each = lambda done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Verify the shards of these images, and write those that lack; one process of a machine does it.

    Args:
        place: a folder, or ``ram``.
        side: rows or columns, whichever are fewer, of a larger image are reduced to so many.
        each: is called with shards done and in all, and while another run is waited for.
        say: is told what is odd.

    Returns:
        A line about the cache.

    Raises:
        UserError: it does not fit, with numbers.
        CannotWrite: the disk became full on the way; whole shards stay.
    """
    folder = cache_folder(place)
    try:
        with saving(folder):
            folder.mkdir(mode=0o700 if place == RAM else 0o777, parents=True, exist_ok=True)
    except CannotWrite as problem:
        raise UserError(problem.message, "--cache-images FOLDER, on --resume too", exit_code=3) from None
    if place == RAM and (folder.lstat().st_uid != os.getuid() or folder.is_symlink()):
        raise UserError(f"{folder} is a link or another user's", "--cache-images FOLDER")
    paths = shards_of(images, folder, side)
    if place == RAM:
        _hold(folder, paths)
    lacking: dict[int, str] = {}
    if _faults(paths):  # else another user's folder, or a read-only one, will do
        lock = _locked(folder, lambda: each(0, len(paths)), say)
        try:
            repair(folder)
            lacking = _faults(paths)
            for number, fault in lacking.items():
                if fault:
                    say(f"{paths[number]} is damaged ({fault}): it is made anew")
                    paths[number].unlink(missing_ok=True)
            _make(images, paths, place, side, [*lacking], each)
            _verified.update(paths)
        finally:
            lock.release()
    size = _bytes_of(paths)
    others = _bytes_of({*folder.glob("*.safetensors")} - {*paths})
    more = f"; {in_bytes(others)} there of other images or settings" if others else ""
    kept = f"{len(images):,} images decoded, {in_bytes(size)}"
    return f"{folder}: {kept}, {len(paths) - len(lacking)} of {len(paths)} shards were there{more}"


def planned(images: Images, place: str, side: int | None = None) -> str:
    """A line about what :func:`fill` would have to do, which is refused where it does not fit."""
    folder = cache_folder(place)
    paths = shards_of(images, folder, side)
    lacking = [number for number, path in enumerate(paths) if not path.is_file()]
    room = _check_room(images, folder, place, side, lacking)
    takes = (
        f"about {in_bytes(room.needed)} more, and {in_bytes(room.free)} are free"
        if lacking
        else "nothing more"
    )
    there = f"{len(paths) - len(lacking)} of {len(paths)} shards are there"
    return f"{folder}: {len(images):,} images decoded take {takes}; {there}"


def _faults(paths: Sequence[Path]) -> dict[int, str]:
    """Number of a shard → what is wrong with it, empty if it lacks; those that are whole are left out."""
    there = [n for n, path in enumerate(paths) if path not in _verified and path.is_file()]
    with ThreadPoolExecutor(cores()) as pool:
        faults = dict(zip(there, pool.map(lambda n: _fault(paths[n]), there), strict=True))
    _verified.update(paths[n] for n, fault in faults.items() if not fault)
    return {n: faults.get(n, "") for n, path in enumerate(paths) if faults.get(n) or not path.is_file()}


def _bytes_of(paths: Iterable[Path]) -> int:
    size = 0
    for path in paths:
        with suppress(OSError):  # another run may take it away, or rename it
            size += 0 if is_leftover(path.name) else path.stat().st_size
    return size


def _locked(folder: Path, wait: Callable[[], None], say: Callable[[str], None]) -> FileLock:
    lock, told = FileLock(folder / _LOCK), False
    while True:
        try:
            with saving(folder):
                lock.acquire(timeout=1)
            return lock
        except Timeout:
            if not told:
                say(f"another run fills {folder}: waiting for it")
            told = True
            wait()


def _hold(folder: Path, paths: Sequence[Path]) -> None:
    """Keep what is in memory while this process lives; what killed runs left there goes first."""
    import fcntl

    if folder in _held:
        return
    file = _held[folder] = open(folder / _IN_USE, "a")  # noqa: SIM115  # as long as the process

    def forget(kept: Sequence[Path]) -> None:
        with suppress(BlockingIOError):  # another run is reading
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in {*folder.glob("*.safetensors")} - {*kept}:
                path.unlink(missing_ok=True)

    forget(paths)
    fcntl.flock(file, fcntl.LOCK_SH)
    atexit.register(forget, ())


_held: dict[Path, Any] = {}


def _make(
    images: Images, paths: Sequence[Path], place: str, side: int | None, lacking: Sequence[int], each: Each
) -> None:
    """Write the shards that lack, in as many threads as a part of the memory holds."""
    size = _check_room(images, paths[0].parent, place, side, lacking).shard
    fit = int(_MEMORY * psutil.virtual_memory().available / size)
    pool = ThreadPoolExecutor(max(1, min(cores(), fit)))
    try:
        make = partial(_write, images, paths, side)
        for done, _ in enumerate(pool.map(make, lacking), len(paths) - len(lacking) + 1):
            each(done, len(paths))
    finally:
        pool.shutdown(cancel_futures=True)


class _Room(NamedTuple):
    """Bytes that the lacking shards take, that are free for them, and of memory to make one."""

    needed: float
    free: int
    shard: float


def _check_room(images: Images, folder: Path, place: str, side: int | None, lacking: Sequence[int]) -> _Room:
    """What room there is and must be, by some images' headers; refuses to begin what does not fit."""
    rows = [row for number in lacking for row in _rows(images, number)]
    sizes = []
    for row in rows[:: -(-len(rows) // _SAMPLE) or 1]:
        with suppress(Exception), images.open(images.refs[row], images.decoding.open) as image:
            sizes.append(image.size)
    free = free_bytes(folder)
    if place == RAM:
        free = min(free, psutil.virtual_memory().available)
    if not sizes:
        return _Room(0, free, 1)

    def needed(side: int | None) -> float:
        shares = (min(1.0, side / min(size)) ** 2 if side else 1.0 for size in sizes)
        areas = (share * size[0] * size[1] for share, size in zip(shares, sizes, strict=True))
        return 3 * sum(areas) / len(sizes) * len(rows)

    if needed(side) <= free:
        # A shard's pixels, and a picture as it is decoded, turned and reduced.
        shard = SHARD * needed(side) / len(rows) + 9 * max(width * height for width, height in sizes)
        return _Room(needed(side), free, shard)
    smaller = 256 if side is None or side > 256 else 128
    other = "--cache-images FOLDER" if place == RAM else "another --cache-images FOLDER"
    raise UserError(
        f"--cache-images {place}: {len(rows):,} images take about {in_bytes(needed(side))}, and "
        f"{in_bytes(free)} are free in {folder}",
        f"{other}, --cache-side {smaller} (about {in_bytes(needed(smaller))}), or --cache-images off",
    )


def _rows(images: Images, number: int) -> range:
    return range(number * SHARD, min((number + 1) * SHARD, len(images)))


def _decoded(images: Images, ref: Any, side: int | None) -> Pixels:
    picture = images.open(ref, FastDecoding.like(images.decoding))
    if isinstance(picture, Pixels):
        pixels = picture
    else:
        values = as_values(picture)
        pixels = Pixels(values, (values.shape[1], values.shape[2]))
    (height, width), least = pixels.size, min(pixels.size)
    if side is None or least <= side:
        return pixels
    smaller = round(height * side / least), round(width * side / least)
    return Pixels(pixels.crop((0, 0, height, width), smaller, "bicubic"), pixels.size)


def _write(images: Images, paths: Sequence[Path], side: int | None, number: int) -> None:
    """Decode the images of a shard, and write it; an image that cannot be read has no pixels in it."""
    content, places = bytearray(), []  # it grows in place: one copy of the pixels
    for row in _rows(images, number):
        try:
            with reading(partial(images.path, row)):
                pixels = _decoded(images, images.refs[row], side)
        except UnreadableImage:
            places.append([len(content), 0, 0, 0, 0])
            continue
        places.append([len(content), *pixels.values.shape[1:], *pixels.size])
        content += pixels.values.permute(1, 2, 0).numpy().tobytes()
    values = torch.from_numpy(np.frombuffer(content, np.uint8))
    tensors = {"values": values, "places": torch.tensor(places)}  # [bytes], [images, 5]
    with whole_file(paths[number]) as beside:
        save_file(tensors, beside, {"crc32": str(_checksum(**tensors))})


def _checksum(values: Tensor, places: Tensor) -> int:
    return zlib.crc32(places.numpy().data, zlib.crc32(values.numpy().data))


def _mapped(path: Path) -> tuple[Tensor, Tensor, str]:
    """A shard's pixels and places, not read before they are used, and its checksum."""
    with safe_open(path, "pt") as file:
        return file.get_tensor("values"), file.get_tensor("places"), file.metadata()["crc32"]


def _fault(path: Path) -> str:
    """What is wrong with a shard; empty if nothing is."""
    try:
        values, places, checksum = _mapped(path)
        whole = str(_checksum(values, places)) == checksum
    except (SafetensorError, OSError, KeyError, TypeError, RuntimeError) as problem:
        return first_line(problem)
    return "" if whole else "does not have the content that was written"
