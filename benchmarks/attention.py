"""What looking at attention costs over plain forwards: the table of docs/attention.md.

    python benchmarks/attention.py
    python benchmarks/attention.py cuda

deit3_base with random weights at 224 pixels on 16 images of noise, all twelve layers. Each row is a process
of its own, as the peak of memory is a process's.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from vitkd_cli.data.images import loose_images
from vitkd_cli.inspection.images import batches
from vitkd_cli.inspection.maps import attend, attention_layers
from vitkd_cli.inspection.numbers import survey
from vitkd_cli.inspection.run import inspect_attention
from vitkd_cli.vit.build import open_model
from vitkd_cli.vit.spec import as_seen_by

IMAGES, BATCH = 16, 8
CASES = {
    "plain": "forwards alone",
    "maps": "every map handed on",
    "numbers": "and counted",
    "all": "the command: counted, four pictures, the page",
}


def measure(device: str, case: str, folder: Path) -> str:
    """CPU seconds, which other work on the machine hardly moves, and MiB of the GPU or of the process."""
    built = open_model("deit3_base_patch16_224", pretrained=False)
    built.net.to(device)
    layers = attention_layers(built)
    images = loose_images([folder / "images"])
    start = time.process_time()
    if case in ("plain", "maps"):
        for [views] in batches(images, [built], BATCH):
            seen = as_seen_by(built.spec, views.to(device).float() / 255)
            if case == "maps":
                attend(built, layers, seen, lambda _layer, _map: None)
            else:
                with torch.no_grad():
                    built.net(seen)
    elif case == "numbers":
        survey([(built, layers)], batches(images, [built], BATCH))
    else:
        inspect_attention(built, images, output=folder / "out", batch_size=BATCH, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    return f"| {CASES[case]} | {seconds:.1f} s | {peak:,.0f} MiB |"


def main(device: str) -> None:
    print("| 16 images, deit3_base | CPU time | peak memory |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        (folder / "out").mkdir()
        generator = np.random.default_rng(0)
        for index in range(IMAGES):
            noise = generator.integers(0, 256, (224, 224, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / "images" / f"{index:02d}.png")
        for case in CASES:
            subprocess.run([sys.executable, __file__, device, case, name], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        print(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3])), flush=True)
    else:
        main(*sys.argv[1:] or ["cpu"])
