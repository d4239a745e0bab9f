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
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parents[1]
# Part → what it is compared with, our commands, and the goal.
PARTS: dict[str, tuple[str, Sequence[str], str]] = {
    "help": ("import typer, rich", ("--help",), "2 ×"),
    "tables": ("import typer, rich", ("recipes", "methods", "models"), "0.5 s"),
    "update": (
        "import torch, timm",
        (
            "distill --teacher vit_tiny --no-teacher-pretrained --student vit_tiny --model-kwargs depth=2"
            " --teacher-kwargs depth=2 --loss labels+vitkd --img-size 32 --batch-size 8 --steps 1"
            " --val-split none --no-report -j 0 --seeds 1 --output {scratch}/run --overwrite -q",
        ),
        "1.3 ×",
    ),
}


def seconds(words: Sequence[str], environment: dict[str, str]) -> float:
    """Processor time of a process and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], env=environment, cwd="/", capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compared(
    variants: dict[str, tuple[Sequence[str], dict[str, str]]], repeats: int
) -> dict[str, list[float]]:
    """Times of each variant, in turn; the first round, which compiles the bytecode, is not counted."""
    rounds = [{name: seconds(*variant) for name, variant in variants.items()} for _ in range(repeats + 1)]
    return {name: [each[name] for each in rounds[1:]] for name in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tree", action="append", help="a checkout to measure; default: this one")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    trees = [Path(tree).resolve() for tree in args.tree or [HERE]]
    print("| what | seconds | smallest times | median of pairs | goal |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        base = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPYCACHEPREFIX": scratch}
        base.pop("PYTHONDONTWRITEBYTECODE", None)
        for part in args.only:
            reference, commands, goal = PARTS[part]
            variants = {f"`{reference}`": (("-c", reference), base)}
            for command in commands:
                for tree in trees:
                    name = f"`vitkd {command.split(' --')[0]}`" + (f" of {tree.name}" if trees[1:] else "")
                    words = ("-m", "vitkd_cli", *command.format(scratch=scratch).split())
                    variants[name] = words, {**base, "PYTHONPATH": str(tree)}
            times = compared(variants, args.repeats)
            floor, *_ = times.values()
            for name, own in times.items():
                pairs = statistics.median(a / b for a, b in zip(own, floor, strict=True))
                wanted = "" if own is floor else goal
                print(
                    f"| {name} | {min(own):.2f} | {min(own) / min(floor):.2f} | {pairs:.2f} | {wanted} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
