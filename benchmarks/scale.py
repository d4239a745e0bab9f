"""What to expect at 8, 64 and 512 GPUs: the table of docs/scale.md, a model on paper.

    python benchmarks/scale.py
    python benchmarks/scale.py --images-per-second 7100 --network 12.5 --gpus 8 64

An update takes as long as the slower of the images and the GPU; the gradients' sum is hidden behind the
backward as far as that lasts, and a checkpoint is written by one process while the others wait. Constants are
those of docs/performance.md (deit3_small → deit_tiny, bfloat16, one H200) and of the machines that are named.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from timing import table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"
IMAGENET, EPOCHS, GLOBAL_BATCH = 1_281_167, 300, 1024
BACKWARD = 0.45  # of an update: two passes of the student, of two and the teacher's forward


@dataclass(frozen=True)
class Cluster:
    """GPUs, and what they read, send and write by; gigabytes are 1e9 bytes.

    Attributes:
        rate: images per second that one GPU distils.
        least: seconds of an update however few its images: kernels are launched one by one.
        loaded: images per second that the cores of one GPU load.
        network: gigabytes per second of a GPU's share of the network.
        disk: gigabytes per second at which a checkpoint is written.
        parameters: that are trained.
    """

    rate: float
    least: float
    loaded: float
    network: float
    disk: float
    parameters: int

    def update(self, gpus: int, images: int) -> dict[str, float]:
        """Seconds of an update with so many images on each GPU, by what takes them."""
        compute, data = max(self.least, images / self.rate), images / self.loaded
        ring = 2 * 4 * self.parameters * (gpus - 1) / gpus / (1e9 * self.network)
        saved = 3 * 4 * self.parameters / (1e9 * self.disk)  # weights and two averages of AdamW
        return {
            "compute": compute,
            "images": max(0.0, data - compute),
            "gradients": max(0.0, ring - BACKWARD * compute),
            "saving": saved / 1000,
        }


def rows(cluster: Cluster, gpus: list[int]) -> list[tuple[str, ...]]:
    found = []
    for number in gpus:
        for total in dict.fromkeys((GLOBAL_BATCH, 128 * number)):
            parts = cluster.update(number, total // number)
            seconds = sum(parts.values())
            hours = EPOCHS * (IMAGENET // total) * seconds / 3600
            most = max(parts, key=lambda part: parts[part])
            found.append(
                (
                    f"{number}",
                    f"{total:,} ({total // number})",
                    *(f"{1000 * second:.1f}" for second in parts.values()),
                    f"{total / seconds:,.0f}",
                    f"{hours:.1f}",
                    most,
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images-per-second", type=float, default=7100, help="of one GPU")
    parser.add_argument("--least", type=float, default=15, help="milliseconds of an update with few images")
    parser.add_argument("--loaded", type=float, default=1500, help="images/s by the cores of one GPU")
    parser.add_argument("--network", type=float, default=6.25, help="GB/s of one GPU: 400 Gbit/s among eight")
    parser.add_argument("--disk", type=float, default=1.0, help="GB/s of a checkpoint")
    parser.add_argument("--student", default="deit_tiny_patch16_224")
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    args = parser.parse_args()
    with torch.device("meta"):
        parameters = sum(weight.numel() for weight in timm.create_model(args.student).parameters())
    cluster = Cluster(
        args.images_per_second, args.least / 1000, args.loaded, args.network, args.disk, parameters
    )
    heading = (
        *("GPUs", "images an update (a GPU)", "compute, ms", "+ waiting for images", "+ gradients"),
        *("+ saving", "images/s", "hours of 300 epochs", "what takes most"),
    )
    print(written := table(heading, rows(cluster, args.gpus)))
    if len(sys.argv) == 1:
        from test_docs import with_table

        PAGE.write_text(with_table(PAGE.read_text(), "what to expect", written))


if __name__ == "__main__":
    main()
