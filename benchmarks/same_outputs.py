"""Do two commits print and write the same? A diff for each command, without paths, times and speeds.

    python benchmarks/same_outputs.py BEFORE AFTER [--only NAME …]

BEFORE and AFTER are commits, which get a git worktree each, or folders that hold a checkout already.
Models are small, images the built-in digits: some minutes on a CPU, nothing to download.
"""

import argparse
import difflib
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
SMALL = "img_size=32,patch_size=8,depth=3,num_heads=3"
RUN = (
    "distill --device cpu --teacher vit_tiny --no-teacher-pretrained --student vit_tiny --data digits "
    f"--teacher-kwargs {SMALL},embed_dim=48,num_classes=10 --model-kwargs {SMALL},embed_dim=24 "
    "--shots 10 --epochs 4 --batch-size 20 --workers 0 --log-interval 5"  # 100 images: 20 updates
)
COMMANDS = ["distill", "eval", "inspect-attention", "export", "models", "methods", "demo", "recipes", "env"]

# What each case runs, in order; a step without a blank is a place whose content is read.
CASES: dict[str, list[str]] = {
    "help": ["--help", *(f"{command} --help" for command in COMMANDS)],
    "help-all": ["distill --help-all"],
    "print-recipe": [
        "distill --print-recipe",
        "distill --print-recipe --recipe tiny-cpu",
        "distill --print-recipe --recipe paper/deit3-s_deit-t",
    ],
    "dry-run": [f"{RUN} --dry-run --output dry"],
    "plain": [f"{RUN} --output plain", "plain/"],
    "baseline": [f"{RUN} --baseline --seeds 2 --output baseline", "baseline/"],
    "finetuned": [f"{RUN} --finetune-teacher 1 --output finetuned", "finetuned/"],
    "eval": [
        "eval plain --device cpu --workers 0 --json",
        "eval plain finetuned --teacher finetuned/teacher --device cpu --workers 0 --json --output scores",
        "scores/",
    ],
    "export": [
        *(f"export plain --to {form} --device cpu --num-images 20 --json" for form in ("timm", "state-dict")),
        "export plain --to torch --device cpu --num-images 20 --json",
        "plain/student-timm/",
        "plain/student.safetensors",
    ],
    "onnx": ["export plain --to onnx --preprocess --device cpu --num-images 20 --json"],
    "inspect-attention": [
        "inspect-attention finetuned/teacher/student finetuned/student --device cpu --num-images 20"
        " --num-pictures 2 --output looked --json",
        "looked/",
    ],
    "refusals": [
        "distill --lr -1 --teacher vit_tiny --student vit_tiny",
        "distill --learning_rate x",
        "distill --kd-temperature 3",
        "distill --teacher vit_tiny --student vit_tinny --dry-run",
        "eval plain --batch-size 0",
        "eval plain --crop_mode round",
        "export plain --to nothing",
        "export plain --to timm --half",
        "export plain --to timm",
        "inspect-attention plain --layer 1",
        "inspect-attention plain --output scores",
        "methods nothing",
        "train --lr 1",
    ],
    "models": ["models --json"],
    "methods": ["methods --json"],
}
NEEDS = {"eval": ("plain", "finetuned"), "export": ("plain",), "onnx": ("plain",)}
NEEDS["refusals"] = ("plain", "eval", "export")
NEEDS["inspect-attention"] = ("finetuned",)

# What differs from one call to the next.
CLOCK = ("time", "images_per_second", "data_wait", "seconds", "latency", "python", "sha256")  # keys of JSON
PASSING = [
    (r"\d{8}-\d{6}", "TIME"),
    (r"\d+:\d\d:\d\d|\d\d:\d\d\b", "TIME"),
    (r"[\d.,]+ images/s|[\d,]+ at 32", "N images/s"),
    (r"[\d,]+ MiB at most while", "N MiB at most while"),
    (r"(?m)^validation: \d+ of \d+\n", ""),  # once a while
    (r"(?m) {2,}| +$", " "),  # a column is as wide as its numbers
    (r"[\d.]+ (s|ms|min|h|hours?|minutes?|seconds?)\b", "T"),
    (r"[\d,.]+ ([KMG]i?B)( free)", r"N \1\2"),
]


def differences(name: str, before: Path, after: Path) -> str:
    """The unified diff of what a case printed and wrote; empty where there is none."""
    texts = [(side / f"{name}.txt").read_text().splitlines() for side in (before, after)]
    return "\n".join(difflib.unified_diff(*texts, "before", "after", lineterm="", n=1))


def play(name: str, tree: Path, room: Path) -> None:
    """Run a case with the package in ``tree``; what it prints and writes goes to ``room/NAME.txt``."""
    parts = []
    for step in CASES[name]:
        words = shlex.split(step)
        command = len(words) > 1 or words[0].startswith("-")
        parts.append(f"== {step}\n{called(words, tree, room) if command else read(room / step)}")
    text = "\n".join(parts).replace(str(room), "ROOM").replace(str(tree), "TREE")
    for pattern, word in PASSING:
        text = re.sub(pattern, word, text)
    (room / f"{name}.txt").write_text(text)


def called(arguments: list[str], tree: Path, room: Path) -> str:
    """What a command says, and how it ends."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "400", "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-m", "vitkd_cli", *arguments]
    done = subprocess.run(command, cwd=room, env=environment, capture_output=True, text=True, timeout=900)
    said = flat(done.stdout) if "--help" in arguments or "--help-all" in arguments else pretty(done.stdout)
    return f"{said}\n-- stderr\n{done.stderr}-- exit code {done.returncode}\n"


def read(path: Path) -> str:
    """A folder's files, or one: text as it is, weights and pictures by what they hold."""
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return "\n".join(f"-- {file.relative_to(path.parent)}\n{content(file)}" for file in files)


def content(file: Path) -> str:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            tensors = [(key, opened.get_tensor(key)) for key in sorted(opened.keys())]
        return "\n".join(f"{key} {list(t.shape)} {digest(t.numpy().tobytes())}" for key, t in tensors)
    if file.suffix == ".jsonl":
        return "\n".join(json.dumps(without_clock(json.loads(line))) for line in file.open())
    if file.suffix in (".json", ".toml", ".md", ".csv"):
        return "its digests" if file.name == "manifest.json" else pretty(file.read_text())
    return "" if file.suffix in (".png", ".html", ".pt", ".npz") else f"{file.stat().st_size} bytes"


def digest(data: bytes) -> str:
    from hashlib import sha256

    return sha256(data).hexdigest()[:16]


def pretty(text: str) -> str:
    """JSON a value a line, so that a diff shows the one that changed; other text as it is."""
    try:
        return json.dumps(without_clock(json.loads(text)), indent=1, ensure_ascii=False)
    except ValueError:
        return text


def flat(text: str) -> str:
    """A page of help as one sorted line per flag: where it stands on the page is no difference."""
    lines: list[str] = []
    for line in text.splitlines():
        words = " ".join(line.strip("│╭╰╮╯─ ").split())
        if line.startswith("│") and not re.match(r"--|\* ", words) and lines:
            lines[-1] += f" {words}"
        elif words:
            lines.append(words)
    return "\n".join(sorted(lines))


def without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: "…" if any(c in k for c in CLOCK) else without_clock(v) for k, v in value.items()}
    return [without_clock(item) for item in value] if isinstance(value, list) else value


@contextmanager
def checkout(of: str, beside: Path) -> Iterator[Path]:
    """A folder with the package of a commit."""
    if (Path(of) / "vitkd_cli").is_dir():
        yield Path(of).resolve()
        return
    git: Callable[..., Any] = lambda *words: subprocess.run(["git", "-C", ROOT, *words], check=True)  # noqa: E731
    git("worktree", "add", "--quiet", "--detach", beside, of)
    try:
        yield beside
    finally:
        git("worktree", "remove", "--force", beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("before")
    parser.add_argument("after")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    wanted = parser.parse_args()
    needed = set(wanted.only)
    for name in reversed(CASES):
        needed |= {*NEEDS.get(name, ())} if name in needed else set()
    with tempfile.TemporaryDirectory() as place:
        rooms = Path(place, "before"), Path(place, "after")
        with (
            checkout(wanted.before, Path(place, "old")) as old,
            checkout(wanted.after, Path(place, "new")) as new,
        ):
            for room in rooms:
                room.mkdir()
            for name in CASES:
                if name not in needed or (name == "onnx" and not find_spec("onnxruntime")):
                    continue
                for tree, room in zip((old, new), rooms, strict=True):
                    play(name, tree, room)
                if name in wanted.only:
                    print(f"### {name}: {differences(name, *rooms) or 'equal'}", flush=True)


if __name__ == "__main__":
    main()
