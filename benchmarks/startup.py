"""How long a person waits before anything happens: ours over what importing the libraries takes.

    python benchmarks/startup.py                          # all of it
    python benchmarks/startup.py --only help tables      # some parts
    python benchmarks/startup.py --tree OLD --tree NEW   # of two checkouts, interleaved

Processor time of whole processes on one thread, each with its bytecode compiled beforehand, the variants
interleaved. A ratio is that of the smallest times, and the median over pairs of neighbours.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from timing import judged, ratios, table

HERE = Path(__file__).parents[1]
LIGHT, HEAVY = "import typer, rich", "import os, torch, timm; os._exit(0)"
# The command line until the first update of a student is made.
FIRST_UPDATE = """
import os, sys
from vitkd_cli.cli import distill, main

def until_the_first(*asked):
    from vitkd_cli.training.trainer import Trainer

    def once(self, batches, update=Trainer.update):
        update(self, batches)
        os._exit(0)

    Trainer.update = once
    return run(*asked)

run, distill.run = distill.run, until_the_first
main()
"""
TINY = (
    "distill --teacher vit_tiny --no-teacher-pretrained --teacher-kwargs depth=2 --student vit_tiny "
    "--model-kwargs depth=2 --loss labels+vitkd --data {folder}/images --val-fraction 0 --img-size 32 "
    "--batch-size 8 --steps 1 -j 0 --output {folder}/run --overwrite -q"
)
COMMAND = ("-m", "vitkd_cli")
# Part → what it is compared with; our programs: what each is called, Python's arguments; the goal as a
# ratio, or half a second.
PARTS: dict[str, tuple[str, dict[str, tuple[str, ...]], float | None]] = {
    "help": (LIGHT, {"`vitkd --help`": (*COMMAND, "--help")}, 2.0),
    "tables": (LIGHT, {f"`vitkd {w}`": (*COMMAND, w) for w in ("recipes", "methods", "models")}, None),
    "update": (HEAVY, {"first update of a tiny run": ("-c", FIRST_UPDATE, *TINY.split())}, 1.3),
}

# A folder of names is listed; seconds of processor time, then bytes an image that are kept, and at most.
LISTING = """
import gc, sys, time, tracemalloc
from vitkd_cli.data.datasets import open_data

start = time.process_time()
open_data(data=sys.argv[1], val_fraction=0)
seconds = time.process_time() - start
gc.collect()
tracemalloc.start()
found = open_data(data=sys.argv[1], val_fraction=0)
gc.collect()
print(seconds, *(size / len(found.train) for size in tracemalloc.get_traced_memory()))
"""
NAMES, CLASSES = 100_000, 1000


def write_names(folder: Path) -> None:
    """Empty files that are called as ImageNet's are."""
    for label in range(CLASSES):
        name = f"n{1_440_764 + 137 * label:08d}"
        (folder / name).mkdir(parents=True)
        for index in range(NAMES // CLASSES):
            (folder / name / f"{name}_{7919 * index % 30_000}.JPEG").touch()


def listing(folder: Path, trees: Sequence[Path], base: dict[str, str], repeats: int) -> None:
    write_names(folder)
    print(f"\n| {NAMES:,} images listed | seconds | bytes an image, kept | at most |\n|---|---|---|---|")
    for tree in trees:
        found = []
        for _ in range(repeats):
            done = subprocess.run(
                [sys.executable, "-c", LISTING, str(folder)],
                env={**base, "PYTHONPATH": str(tree)},
                cwd="/",
                capture_output=True,
                text=True,
                check=True,
            )
            found.append([float(word) for word in done.stdout.split()])
        print(f"| {tree.name} | {' | '.join(f'{number:.3g}' for number in min(found))} |", flush=True)
    print("| goal | 3 | 300 | |")


def write_images(folder: Path) -> None:
    """Noise in three class folders."""
    draw = np.random.default_rng(0)
    for name in "abc":
        (folder / name).mkdir(parents=True)
        for index in range(16):
            noise = draw.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / name / f"{index}.png")


def seconds(words: Sequence[str], environment: dict[str, str]) -> float:
    """Processor time of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], env=environment, cwd="/", capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compared(variants: dict[str, tuple[list[str], dict[str, str]]], repeats: int) -> dict[str, list[float]]:
    """Times of each variant, in turn; the first round, which compiles the bytecode, is not counted."""
    rounds = [{name: seconds(*variant) for name, variant in variants.items()} for _ in range(repeats + 1)]
    return {name: [each[name] for each in rounds[1:]] for name in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=(*PARTS, "listing"), default=[*PARTS, "listing"])
    parser.add_argument("--tree", action="append", help="a checkout to measure; default: this one")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    trees = [Path(tree).resolve() for tree in args.tree or [HERE]]
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch) / "images")
        base = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": scratch}
        base.pop("PYTHONDONTWRITEBYTECODE", None)
        for part in (part for part in args.only if part in PARTS):
            reference, programs, goal = PARTS[part]
            variants = {f"`{reference}`": (["-c", reference], base)}
            for name, words in programs.items():
                for tree in trees:
                    filled = [word.replace("{folder}", scratch) for word in words]
                    called = f"{name} of {tree.name}" if trees[1:] else name
                    variants[called] = filled, {**base, "PYTHONPATH": str(tree)}
            times = compared(variants, args.repeats)
            floor, *_ = times.values()
            for name, own in times.items():
                smallest, paired = ratios(own, floor)
                wanted = "" if own is floor else judged(smallest, goal) if goal else judged(min(own), 0.5)
                rows.append((name, f"{min(own):.2f}", f"{smallest:.2f}", f"{paired:.2f}", wanted))
        if rows:
            print(table(("what", "seconds", "smallest times", "median of pairs", "goal"), rows), flush=True)
        if "listing" in args.only:
            listing(Path(scratch) / "names", trees, base, args.repeats)


if __name__ == "__main__":
    main()
