"""How fast images come out of tars by index, beside a folder and WebDataset's own reader; memory, and starts.

    python benchmarks/tars.py                                 # images per second and core
    python benchmarks/tars.py --sizes 10000 100000 1000000    # memory of a worker, seconds of a start

Process CPU time on one thread, the variants interleaved, in another order each round; the smallest of
the rounds. Images are JPEGs of
500×375 pixels, 50 in a tar. Folder and tars are read in the order of a random permutation, WebDataset's tars
from begin to end. For memory and starts the tars are sparse, and all of their images one.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import re
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from skimage import data

from vitkd_cli.data.census import summary
from vitkd_cli.data.datasets import hold_out, open_data
from vitkd_cli.data.images import ImageData, Images
from vitkd_cli.data.keyed import BatchSampler, Keyed, train_loader
from vitkd_cli.data.scan import without
from vitkd_cli.data.tars import Contents, Member
from vitkd_cli.data.transforms import train_view
from vitkd_cli.data.webdataset import Samples
from vitkd_cli.recipe import Recipe
from vitkd_cli.training.data import data_of

IN_A_TAR, IN_A_BIG_ONE = 50, 10_000


def jpeg(seed: int, size: tuple[int, int] = (500, 375)) -> bytes:
    generator, picture, file = np.random.default_rng(seed), Image.fromarray(data.coffee()), io.BytesIO()
    x, y = (int(generator.integers(0, length - 250)) for length in picture.size)
    picture.crop((x, y, x + 250, y + 250)).resize(size).save(file, "jpeg", quality=90)
    return file.getvalue()


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def write(root: Path, count: int) -> str:
    """The same images in class folders and in tars; the pattern of these."""
    for start in range(0, count, IN_A_TAR):
        (root / "tars").mkdir(exist_ok=True)
        with tarfile.open(root / "tars" / f"x-{start // IN_A_TAR:04d}.tar", "w") as tar:
            for number in range(start, min(start + IN_A_TAR, count)):
                content, label = jpeg(number), str(number % 10)
                add(tar, f"{number:06d}.jpg", content)
                add(tar, f"{number:06d}.cls", label.encode())
                folder = root / "folder" / label
                folder.mkdir(parents=True, exist_ok=True)
                (folder / f"{number:06d}.jpg").write_bytes(content)
    return f"{root}/tars/x-{{0000..{(count - 1) // IN_A_TAR:04d}}}.tar"


def speed(count: int, rounds: int) -> None:
    import webdataset

    with tempfile.TemporaryDirectory() as place:
        pattern = write(Path(place), count)
        folder = open_data(data=f"{place}/folder", val_fraction=0).train
        tars = open_data(data=f"wds:{pattern}", val_fraction=0).train
        order = np.random.default_rng(0).permutation(count).tolist()
        generator = random.Random(0)

        def by_index(images: Images, read: Callable[[object], object]) -> Callable[[], int]:
            return lambda: sum(images.open(images.refs[index], read) is not None for index in order)

        def content(file: object) -> object:
            return Path(file).read_bytes() if isinstance(file, str) else file.read()  # type: ignore[attr-defined]

        theirs = webdataset.WebDataset(pattern, shardshuffle=False, empty_check=False)
        decoded = theirs.decode("pilrgb").to_tuple("jpg", "cls")
        kinds: dict[str, list[tuple[str, Callable[[], int]]]] = {
            "bytes": [
                ("folder", by_index(folder, content)),
                ("tars by index", by_index(tars, content)),
                ("webdataset", lambda: sum("jpg" in sample for sample in theirs)),
            ],
            "RGB pictures": [
                ("folder", lambda: sum(folder[index] is not None for index in order)),
                ("tars by index", lambda: sum(tars[index] is not None for index in order)),
                ("webdataset", lambda: sum(image.mode == "RGB" for image, _ in decoded)),
            ],
        }
        for what, variants in kinds.items():
            seconds: dict[str, list[float]] = {name: [] for name, _ in variants}
            for _ in range(rounds):
                generator.shuffle(variants)
                for name, act in variants:
                    start = time.process_time()
                    assert act() == count
                    seconds[name].append(time.process_time() - start)
            print(f"{what}:")
            for name, taken in seconds.items():
                least = min(taken)
                share = statistics.median(a / b for a, b in zip(taken, seconds["folder"], strict=True))
                print(
                    f"  {name:15}{count / least:10,.0f} images/s{1e6 * least / count:10,.0f} µs an image, "
                    f"{share:.2f} of the folder's time in the median round"
                )


def sparse(root: Path, count: int) -> str:
    """Tars that are said to hold so many images, and an index of each."""
    picture = jpeg(0, (32, 32))
    shards = -(-count // IN_A_BIG_ONE)
    for shard in range(shards):
        with tarfile.open(root / f"x-{shard:05d}.tar", "w") as tar:
            add(tar, "0.jpg", picture)
    pattern = f"wds:{root}/x-{{00000..{shards - 1:05d}}}.tar"
    size = min(count, IN_A_BIG_ONE)
    members = [Member("0.jpg", 0, 512, len(picture))] * size
    made = Contents(members, np.random.default_rng(0).integers(0, 1000, size).tolist())
    with mock.patch.object(Samples, "contents", lambda *_: made):
        open_data(data=pattern, val_fraction=0)
    return pattern


def worker_memory(images: Images) -> float:
    """MiB that a loader's worker has written itself, after some thousand images from all over.

    What it only reads is the parent's memory, or a file's, once for all workers.
    """
    keys = list(islice(BatchSampler(len(images), 64, seed=0).epoch(0), 60))
    batches = iter(train_loader(Keyed(images, train_view((32, 32)), 0), keys, workers=1))
    for _ in range(50):
        next(batches)
    (worker,) = multiprocessing.active_children()
    facts = dict(re.findall(r"(\w+): +(\d+) kB", Path(f"/proc/{worker.pid}/smaps_rollup").read_text()))
    batches.close()
    return int(facts["Private_Dirty"]) / 2**10


def own_memory() -> float:
    """MiB of this process that no file holds."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    return int(re.search(r"Anonymous: +(\d+)", rollup)[1]) / 2**10  # type: ignore[index]


def cpu(act: Callable[[], object]) -> float:
    """Seconds of process CPU time."""
    start = time.process_time()
    act()
    return time.process_time() - start


def starts(sizes: Sequence[int]) -> None:
    """Print for each size what a run pays before its first image, and what it pays once an epoch."""
    for count in sizes:
        with tempfile.TemporaryDirectory() as place:
            pattern = sparse(Path(place), count)
            picture = Path(place) / "0.jpg"
            picture.write_bytes(jpeg(0, (32, 32)))
            names = (f"/data/imagenet/train/n{n % 1000:08d}/n{n % 1000:08d}_{n}.JPEG" for n in range(count))
            labels = np.random.default_rng(0).integers(0, 1000, count)
            for kind in ("tars", "folder"):
                before, clock = own_memory(), (time.perf_counter(), time.process_time())
                if kind == "tars":
                    found = data_of(Recipe(student="vit_tiny", loss="labels", data=pattern), True, None)
                else:
                    read = partial(_of_one, str(picture))
                    train = Images(names, labels, open=read)
                    found = hold_out(ImageData("folder", train), train, Recipe.val_fraction, 42, None)
                summary(found)
                start = time.perf_counter() - clock[0], time.process_time() - clock[1]
                images = found.train
                assert isinstance(images, Images)
                sampler = BatchSampler(len(images), 64, seed=0)
                first = cpu(lambda sampler=sampler: next(sampler.epoch(0)))
                others = Keyed(images, train_view((32, 32)), 0)._others(len(images) - 1)
                other, gone = cpu(lambda others=others: next(others)), {images.path(0): ""}
                dropped = cpu(lambda images=images, gone=gone: without(images, gone))
                facts = (
                    f"{count:10,} in {kind}",
                    f"start {start[0]:.2f} s ({start[1]:.2f} s CPU)",
                    f"order of an epoch {first:.3f} s",
                    f"another of a class {1e3 * other:.2f} ms",
                    f"one left out {dropped:.3f} s",
                    f"main process {own_memory() - before:.0f} MiB more",
                    f"worker {worker_memory(images):.0f} MiB",
                )
                print(", ".join(facts), flush=True)


def _of_one(file: str, ref: str, read: Callable[[str], object]) -> object:
    return read(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.sizes:
        starts(asked.sizes)
    else:
        speed(asked.images, asked.rounds)


if __name__ == "__main__":
    main()
