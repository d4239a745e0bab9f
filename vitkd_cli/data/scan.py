"""Find the image files that cannot be read, before training begins.

The header and the end of every file are read; a whole picture is decoded where its end does not show that it
is complete, and of a sample.
"""

import hashlib
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from threading import Semaphore
from typing import Any, BinaryIO, TypeVar

from vitkd_cli.data.decoding import Decoding, orientation_of
from vitkd_cli.data.images import Images, Split, reason
from vitkd_cli.errors import UserError
from vitkd_cli.files import statuses
from vitkd_cli.text import listed

SAMPLE = 256  # pictures that are decoded whatever their end shows, evenly spaced
_CHUNK = 64  # files per task
_BEAT = 1.0  # seconds between the main process's signs of life to those that wait
_ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82", "GIF": b";"}
Found = TypeVar("Found")
_decoders = Semaphore(4)  # of large pictures more would not fit into memory


@dataclass(frozen=True)
class Scan:
    """What was found.

    Attributes:
        broken: file → why it cannot be read.
        turned: files that carry an EXIF orientation other than upright.
    """

    broken: dict[str, str]
    turned: int


def image_files(*splits: Split | None) -> list[str]:
    """The files of these images, each once; none of what lies in archives, datasets and streams."""
    found: dict[str, None] = {}
    for images in splits:
        if isinstance(images, Images) and images.are_files:
            found |= dict.fromkeys(images.refs)
    return list(found)


def without(images: Images, broken: dict[str, str]) -> Images:
    """The images whose files are not broken."""
    if not images.are_files:
        return images
    kept = [index for index, file in enumerate(images.refs) if file not in broken]
    return images if len(kept) == len(images) else images.subset(kept)


def scan(
    files: Sequence[str],
    decoding: Decoding,
    each: Callable[[int, int], None] = lambda done, total: None,
    accelerator: Any = None,
    found: Scan | None = None,
) -> Scan:
    """Look at every file, in the main process alone; the others get what it found.

    Args:
        each: is called with files done and in all.
        accelerator: an ``accelerate.Accelerator``, where there are several processes.
        found: by an earlier look, where the main process knows of one; the others ask it.
    """

    def look(each: Callable[[int, int], None]) -> Scan:
        return found or _scan(files, decoding, each)

    return by_main(look, each, accelerator)


def by_main(
    act: Callable[[Callable[[int, int], None]], Found],
    each: Callable[[int, int], None],
    accelerator: Any = None,
) -> Found:
    """Call ``act`` in the main process and return its result in all.

    Whenever it calls ``each``, the others hear that it is at work, and do not time out.
    """
    if accelerator is None or accelerator.num_processes == 1:
        return act(each)
    from accelerate.utils import broadcast_object_list

    found: Found | None = None
    if accelerator.is_main_process:
        told = time.monotonic()

        def beat(done: int, total: int) -> None:
            nonlocal told
            each(done, total)
            if time.monotonic() - told > _BEAT:
                broadcast_object_list([None])
                told = time.monotonic()

        found = act(beat)
        broadcast_object_list([found])
    while found is None:
        (found,) = broadcast_object_list([None])
    return found


def on_every_machine(
    act: Callable[[Callable[[int, int], None]], Found],
    each: Callable[[int, int], None],
    say: Callable[[str], None],
    accelerator: Any,
) -> list[Found]:
    """Call ``act`` in one process of each machine, at the same time; what it returned in each, for all.

    All exchange how far they are once a second, so that nobody who waits takes the others for lost.

    Args:
        each: is called with what is done and in all, of the machine that is farthest behind.
        say: is told which machines are waited for, after two seconds.
    """
    if accelerator.num_processes == 1:
        return [act(each)]
    from accelerate.utils import gather_object

    at, waited = (0, 0), 0

    def advance(done: int, total: int) -> None:
        nonlocal at
        at = done, total

    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(act, advance) if accelerator.is_local_main_process else None
        while True:
            if job:
                wait([job], timeout=_BEAT)
            result = job.result() if job and job.done() else None
            told = [one for one in gather_object([(platform.node(), at, result)] if job else []) if one]
            behind = [(node, at) for node, at, result in told if result is None]
            if not behind:
                return [result for *_, result in told]
            each(*min((at for _, at in behind), key=lambda at: at[0] / max(1, at[1])))
            waited += bool(result)
            if waited == 2:
                say(f"waiting for {listed(sorted({node for node, _ in behind}))}, where images are decoded")


def stamp(files: Sequence[str], decoding: Decoding) -> str:
    """Changes when a file is replaced, added or removed, and when pictures are read in another way."""
    digest = hashlib.sha256(repr(decoding).encode())
    for file, status in zip(files, statuses(files), strict=True):
        digest.update(os.fsencode(file))
        if status:
            size, changed = status
            digest.update(f" {size} {changed}\n".encode())
    return digest.hexdigest()


def unreadable(broken: dict[str, str], total: int, hint: str) -> UserError:
    """The refusal that lists every broken file with its reason; ``hint`` is for those that are damaged."""
    large = [int(re.sub(r"\D", "", why)) for why in broken.values() if why.startswith("too large: ")]
    if large:
        only = "scale them down" if len(large) == len(broken) else f"{hint}; too large ones: scale them down"
        hint = f"{only}, or let them pass with --max-pixels {max(large)}"
    return UserError(
        f"{len(broken):,} of {total:,} image files cannot be read:",
        hint,
        exit_code=3,
        details=[f"{file}: {why}" for file, why in broken.items()],
    )


def _scan(files: Sequence[str], decoding: Decoding, each: Callable[[int, int], None]) -> Scan:
    broken: dict[str, str] = {}
    turned = done = 0
    chunks = [range(start, min(start + _CHUNK, len(files))) for start in range(0, len(files), _CHUNK)]
    every = -(-len(files) // SAMPLE)
    pool = ThreadPoolExecutor(min(32, (os.cpu_count() or 1) + 4))
    try:
        for chunk, found in zip(
            chunks, pool.map(partial(_look, files, every, decoding), chunks), strict=True
        ):
            for index, (why, turn) in zip(chunk, found, strict=True):
                turned += turn
                if why:
                    broken[files[index]] = why
            done += len(chunk)
            each(done, len(files))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Scan(broken, turned)


def _look(
    files: Sequence[str], every: int, decoding: Decoding, chunk: range
) -> list[tuple[str | None, bool]]:
    return [_fault(files[index], decoding, whole=index % every == 0) for index in chunk]


def _fault(path: str, decoding: Decoding, whole: bool) -> tuple[str | None, bool]:
    """Why a file cannot be read, if so; does its EXIF turn it?"""
    turned = False
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if not size:
                return "the file is empty", False
            with decoding.open(file) as image:
                # Pillow turns TIFF by itself, and would decode a PNG to look for what stands at its end
                if image.format != "TIFF" and (image.format != "PNG" or "exif" in image.info):
                    turned = orientation_of(image) > 1
                if whole or not _is_whole(file, image.format, size):
                    with _decoders:
                        decoding.upright(image)
    except MemoryError:
        raise
    except Exception as error:  # as in images.reading
        return reason(error), turned
    return None, turned


def _is_whole(file: BinaryIO, kind: str | None, size: int) -> bool:
    """Does the end of the file show that it is complete?"""
    before = file.tell()
    try:
        if kind == "WEBP":
            file.seek(4)
            return int.from_bytes(file.read(4), "little") + 8 <= size
        end = _ENDS.get(kind or "")
        if end is None or size < len(end):
            return False
        file.seek(size - len(end))
        return file.read() == end
    finally:
        file.seek(before)
