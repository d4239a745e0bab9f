"""How cost grows: with the images of an epoch, and with the terms of a formula; and memory over many updates.

    python benchmarks/growth.py
    python benchmarks/growth.py --only memory --updates 1000

Process CPU time on one thread. An epoch is a whole ``vitkd distill`` of a tiny student on JPEGs of 64 pixels,
from listing them on; what does not depend on their number is measured on 50 images and taken off. A step with
several terms mimics one more block with each, deit3_small → deit_tiny at 224 pixels. Memory is that of a run
with every fast path: torchvision's decoder, cached images, a cached teacher, two workers.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

import matplotlib
import numpy as np
import psutil
import torch
from PIL import Image
from step import Step
from timing import in_turn, ratios, table
from torch.optim.optimizer import register_optimizer_step_post_hook

import vitkd_cli as vitkd
from vitkd_cli.plots import COLOURS
from vitkd_cli.terms import Batch
from vitkd_cli.training import Reporter

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).parents[1] / "docs" / "images"
THOUSANDS, TERMS = (1, 2, 4, 8), (1, 2, 4, 8)
SMALL = "img_size=32,patch_size=8,depth=3,num_heads=3"
RUN = {
    "teacher": "vit_tiny",
    "teacher_pretrained": False,
    "teacher_kwargs": f"{SMALL},embed_dim=96",
    "student": "vit_tiny",
    "model_kwargs": f"{SMALL},embed_dim=48",
    "val_fraction": 0,
    "batch_size": 50,
    "epochs": 1,
    "warmup_epochs": 0,
    "workers": 0,
    "device": "cpu",
    "report": False,
    "loss": "labels + vitkd",
}


def write_images(folder: Path, number: int) -> Path:
    """Noise in ten class folders."""
    draw = np.random.default_rng(0)
    for index in range(number):
        place = folder / str(index % 10)
        place.mkdir(parents=True, exist_ok=True)
        noise = draw.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(place / f"{index:05d}.jpg")
    return folder


def trained(data: Path, **changes: object) -> None:
    with tempfile.TemporaryDirectory() as output:
        recipe = vitkd.Recipe(**{**RUN, **changes}, data=str(data), output=output)  # type: ignore[arg-type]
        vitkd.distill(recipe, reporter=Reporter(silent=True), overwrite=True)


def with_images(scratch: Path) -> str:
    """The table of an epoch's time by its number of images, and its picture."""
    folders = {thousand: write_images(scratch / f"{thousand}", 1000 * thousand) for thousand in THOUSANDS}
    few = write_images(scratch / "few", 50)
    trained(few)  # whatever is loaded at the first call
    times = in_turn({"few": lambda _: trained(few)}, 2, warmup=0)["few"]
    seconds = []
    for folder in folders.values():
        start = time.process_time()
        trained(folder)
        seconds.append(time.process_time() - start - min(times))
    drawn("growth-images", "thousand images", "seconds of an epoch", THOUSANDS, seconds)
    each = [second / thousand for second, thousand in zip(seconds, THOUSANDS, strict=True)]
    rows = [
        (f"{thousand},000", f"{second:.1f}", f"{one / each[0]:.2f}")
        for thousand, second, one in zip(THOUSANDS, seconds, each, strict=True)
    ]
    return table(("images", "seconds of an epoch", "an image, over the first line's"), rows)


def with_terms(repeats: int) -> str:
    """The table of a step's time by its number of terms, and its picture."""
    args = argparse.Namespace(pair="small-tiny", batch=4, device="cpu", mixed_precision="no")
    formulas = {0: "labels"} | {
        n: " + ".join(["labels", *(f"3e-5*mimic(blocks=({block},))" for block in range(n))]) for n in TERMS
    }
    images = torch.randn(args.batch, 3, 224, 224)
    batch = Batch(torch.randint(0, 1000, (args.batch,)), generator=torch.Generator().manual_seed(0))

    def step(one: Step, _: int) -> None:
        one(images, batch)

    times = in_turn({str(n): partial(step, Step(f, args)) for n, f in formulas.items()}, repeats)
    rows = [(n, *(f"{ratio:.3f}" for ratio in ratios(times[str(n)], times["0"]))) for n in formulas]
    drawn(
        "growth-terms",
        "terms that mimic",
        "× a step without",
        list(formulas),
        [float(row[1]) for row in rows],
    )
    return table(("terms that mimic", "× a step without, smallest times", "median of pairs"), rows)


def anonymous(pid: int) -> float:
    """MiB of a process that no file holds; what several processes share counts in parts."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return float(re.search(r"Pss_Anon:\s+(\d+)", rollup)[1]) / 1024  # type: ignore[index]


@contextmanager
def sampled(every: int) -> Iterator[dict[int, float]]:
    """Update → MiB of this process and its workers, every so many updates."""
    found: dict[int, float] = {}
    updates, own = count(1), psutil.Process()

    def sample(*_: object) -> None:
        if (update := next(updates)) % every == 0:
            found[update] = sum(anonymous(one.pid) for one in (own, *own.children(recursive=True)))

    hook = register_optimizer_step_post_hook(sample)
    try:
        yield found
    finally:
        hook.remove()


def over_updates(scratch: Path, updates: int) -> str:
    """The table of memory over a run with every fast path, and its picture."""
    data = write_images(scratch / "images", 1000)
    with sampled(max(1, updates // 40)) as found:
        trained(
            data,
            epochs=updates // 20,
            workers=2,
            input_backend="torchvision",
            cache_images=str(scratch / "decoded"),
            teacher_cache=str(scratch / "teacher"),
            cached_epochs=2,
        )
    drawn("memory", "updates", "MiB of the run and its workers", list(found), list(found.values()))
    shown = list(found.items())[4::5]
    return table(("update", "MiB of the run and its two workers"), [(n, f"{size:.0f}") for n, size in shown])


def drawn(name: str, x: str, y: str, places: Sequence[int], values: Sequence[float]) -> None:
    figure, axes = plt.subplots(figsize=(5, 3), dpi=130, layout="constrained")
    axes.plot(places, values, color=COLOURS[0], marker="o", markersize=3)
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    axes.grid(alpha=0.25)
    figure.savefig(IMAGES / f"{name}.png")
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parts = ("images", "terms", "memory")
    parser.add_argument("--only", choices=parts, nargs="+", default=parts)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--updates", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        if "images" in args.only:
            print(with_images(Path(scratch)), "\n", flush=True)
        if "terms" in args.only:
            print(with_terms(args.repeats), "\n", flush=True)
        if "memory" in args.only:
            print(over_updates(Path(scratch), args.updates), flush=True)


if __name__ == "__main__":
    main()
