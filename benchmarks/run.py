"""All that is measured of speed and memory, and the tables and pictures of docs/performance.md.

    python benchmarks/run.py                      # a quarter of an hour on two cores
    python benchmarks/run.py --only step input
    python benchmarks/run.py --device cuda        # the parts that a GPU changes, eight minutes at most

Each part is a script of its own beside this one, whose tables go into the page as they are printed.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
PAGE = HERE.parent / "docs" / "performance.md"

BF16 = ("--device", "cuda", "--mixed-precision", "bf16")
# Part → the commands that measure it; on a GPU other parts, of which the page has tables of their own.
ON_A_CPU = {
    "step": [("step.py",)],
    "input": [("input.py",)],
    "cache": [("teacher_cache.py",), ("teacher_cache.py", "--loss", "labels + kd")],
    "startup": [("startup.py", "--repeats", "3")],
    "eval": [("eval_speed.py",)],
    "growth": [("growth.py", "--only", "images", "terms")],
    "memory": [("growth.py", "--only", "memory")],
}
ON_A_GPU = {
    "step on a GPU": [
        ("step.py", *BF16, "--batch", "256", "--repeats", "20"),
        ("step.py", "--device", "cuda", "--batch", "128", "--repeats", "10"),
    ],
    "cache on a GPU": [
        ("teacher_cache.py", *BF16, "--batch", "128", "--repeats", "10", "--loss", loss)
        for loss in ("labels + vitkd + nkd", "labels + kd")
    ],
}


def measured(command: tuple[str, ...]) -> str:
    """The tables that a script prints, shown as they come."""
    words = [sys.executable, str(HERE / command[0]), *command[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    lines = []
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip() if line.startswith("|") else "")
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return "\n".join(lines).strip()


def machine(device: str) -> str:
    """What it was measured on, in a sentence."""
    packages = ("torch", "torchvision", "timm", "pillow", "numpy")
    with_versions = ", ".join(f"{name} {version(name)}" for name in packages)
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    where = f"{os.cpu_count()} cores of {model}"
    if device == "cuda":
        where = f"{torch.cuda.get_device_name()}, {where}"
    return f"{where}; Python {platform.python_version()}, {with_versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=[*ON_A_CPU, *ON_A_GPU], metavar="PART")
    args = parser.parse_args()
    from test_docs import with_table

    parts = ON_A_GPU if args.device == "cuda" else ON_A_CPU
    for name in args.only or parts:
        print(f"\n{name}\n", flush=True)
        tables = "\n\n".join(measured(command) for command in parts[name])
        said = f"{tables}\n\nMeasured on {machine(args.device)}"
        PAGE.write_text(with_table(PAGE.read_text(), f"measured {name}", f"\n{said}\n"))


if __name__ == "__main__":
    main()
