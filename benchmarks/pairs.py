"""Fifteen pairs over as many families, each trained for 20 updates on JPEGs: the table of docs/models.md.

    python benchmarks/pairs.py

Weights are random and models small, so the figures prove the plumbing, not a gain. Every student is loaded
again by timm alone.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from skimage import data

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
SLIM, WIDE = "img_size=64,depth=4,embed_dim=96,num_heads=3", "img_size=64,depth=6,embed_dim=192,num_heads=3"
SWIN = "img_size=64,window_size=4,embed_dim=48,depths=(2,2,2,2)"
# it takes no other size than 224
TINY = "embed_dims=(16,32,64,96),num_heads=(1,2,4,6),depths=(1,1,2,1)"
VIT, DEIT = "vit_tiny_patch16_224", "deit_tiny_patch16_224"
# teacher, its arguments, student, its arguments, objective
PAIRS = [
    ("vit_small_patch16_224", WIDE, VIT, SLIM, "labels + vitkd + nkd"),
    ("deit3_small_patch16_224", WIDE, DEIT, SLIM, "labels + vitkd + kd"),
    ("deit_small_patch16_224", WIDE, "deit_tiny_distilled_patch16_224", SLIM, "0.5*labels + 0.5*token"),
    ("beit_base_patch16_224", WIDE, VIT, SLIM, "labels + 1e-6*correlation + kd"),
    ("eva02_tiny_patch14_224", "img_size=56,depth=6", VIT, SLIM, "labels + relations + kd"),
    ("cait_xxs24_224", WIDE, DEIT, SLIM, "labels + 3e-5*mimic(blocks=(0, 1))"),
    ("vit_small_patch14_reg4_dinov2", WIDE.replace("img_size=64,", ""), VIT, SLIM, "features"),
    ("vit_base_patch16_siglip_224", WIDE, VIT, SLIM, "labels + vkd"),
    ("vit_tiny_r_s16_p8_224", "img_size=64", VIT, SLIM, "labels + 0.2*spectral(blocks=(-2, -1))"),
    ("xcit_nano_12_p16_224", "img_size=64", VIT, SLIM, "labels + vitkd + dist"),
    ("swin_small_patch4_window7_224", SWIN.replace("2,2)", "4,2)"), "swin_tiny_patch4_window7_224", SWIN,
     "labels + vitkd + kd"),
    ("levit_128", "img_size=64", "levit_128s", "img_size=64", "labels + 3e-5*mimic + dkd"),
    ("tiny_vit_11m_224", TINY.replace("2,1)", "3,1)"), "tiny_vit_5m_224", TINY,
     "labels + kd + 3e-6*generate"),
    ("naflexvit_base_patch16_gap", WIDE, "convit_tiny", SLIM, "labels + vitkd + kd"),
    ("deit3_small_patch16_224", WIDE, "swin_tiny_patch4_window7_224", SWIN, "labels + vitkd + kd"),
]  # fmt: skip


def photographs(root: Path) -> Path:
    """JPEGs cut from scikit-image's photographs, a folder a class."""
    generator = np.random.default_rng(0)
    for name, picture in {
        "astronaut": data.astronaut(),
        "cat": data.chelsea(),
        "coffee": data.coffee(),
    }.items():
        (root / name).mkdir(parents=True)
        for index in range(30):
            y, x = (int(generator.integers(0, side - 96)) for side in picture.shape[:2])
            Image.fromarray(picture[y : y + 96, x : x + 96]).save(root / name / f"{index:02d}.jpg")
    return root


def trained(pair: tuple[str, str | None, str, str | None, str], images: Path, output: Path) -> str:
    """One pair through the command line: a row of the table."""
    teacher, teacher_kwargs, student, kwargs, loss = pair
    command = [
        sys.executable, "-m", "vitkd_cli", "distill", "--teacher", teacher, "--no-teacher-pretrained",
        "--student", student, "--loss", loss, "--data", str(images), "--output", str(output),
        "--epochs", "4", "--steps", "20", "--batch-size", "8", "--lr", "1e-3", "--warmup-epochs", "0",
        "--aa", "none", "--mixup", "0", "--cutmix", "0", "--reprob", "0", "--workers", "0", "--device", "cpu",
        "--log-interval", "1",
    ]  # fmt: skip
    for flag, value in (("--teacher-kwargs", teacher_kwargs), ("--model-kwargs", kwargs)):
        command += [flag, value] if value else []
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{teacher} -> {student}, {loss}: {done.stderr.strip()[-600:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    log = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "lr" in line]
    assert len(losses) == 20
    model = timm.create_model(f"local-dir:{output / 'student'}", pretrained=True).eval()
    side = timm.data.resolve_model_data_config(model)["input_size"][-1]
    with torch.no_grad():
        finite = bool(model(torch.rand(1, 3, side, side)).isfinite().all())
    values = f"{losses[0]:.3f} | {losses[-1]:.3f} | {np.mean(losses[-3:]):.3f}"
    figures = f"{values} | {seconds:.0f} s | {'yes' if finite else 'no'}"
    return f"| {teacher} | {student} | `{loss}` | {figures} |"


def main() -> None:
    lines = [
        "| teacher | student | loss | first | 20th | mean of last 3 | CPU time | timm reloads |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        images = photographs(Path(folder) / "images")
        for index, pair in enumerate(PAIRS):
            lines.append(trained(pair, images, Path(folder) / f"run-{index}"))
            print(lines[-1], flush=True)
    start, end = "<!-- generated: pairs -->", "<!-- end: pairs -->"
    before, _, rest = PAGE.read_text().partition(start)
    table = "\n".join(lines)
    PAGE.write_text(f"{before}{start}\n{table}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
