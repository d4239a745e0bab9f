"""What keyed randomness costs the input pipeline: ours over timm's transforms on the same images.

    python benchmarks/pipeline.py --images 96 --repeats 7

Process CPU time on one thread, the variants interleaved. A ratio is ours over timm's, of the smallest
times and the median over pairs of neighbours. The images are JPEGs of 500×375 pixels, cut from
scikit-image's photographs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from timm.data import create_transform

from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.keyed import Keyed
from vitkd_cli.data.transforms import train_view
from vitkd_cli.recipe import Augmentation

BATCH = 32  # images that a worker makes in one call
VIEW = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5}


def write_images(folder: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    pictures = [data.astronaut(), data.coffee(), data.rocket()]
    for index in range(count):
        picture = Image.fromarray(pictures[index % len(pictures)])
        side = int(generator.integers(250, 400))
        x, y = (int(generator.integers(0, length - side + 1)) for length in picture.size)
        crop = picture.crop((x, y, x + side, y + side)).resize((500, 375))
        target = folder / "train" / str(index % len(pictures))
        target.mkdir(parents=True, exist_ok=True)
        crop.save(target / f"{index:04d}.jpg", quality=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--aa", default="none")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), args.images)
        images = open_data(data=folder, val_fraction=0).train
        assert images is not None
        keyed = Keyed(images, train_view((224, 224), Augmentation(**VIEW, aa=args.aa)), seed=0)
        plain = create_transform(
            224,
            is_training=True,
            **VIEW,
            interpolation="bicubic",
            auto_augment=None if args.aa == "none" else args.aa,
            color_jitter=None,
            re_prob=0.25,
            re_mode="pixel",
        )

        def ours() -> None:
            for start in range(0, len(images), BATCH):
                keyed.__getitems__(
                    [(0, index, index) for index in range(start, min(start + BATCH, len(images)))]
                )

        def timms() -> None:
            for index in range(len(images)):
                plain(images[index][0].convert("RGB"))

        variants: dict[str, Callable[[], None]] = {"timm": timms, "ours": ours}
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(-1, args.repeats):  # the first round warms up
            random.seed(repeat)
            for name, run in variants.items():
                start = time.process_time()
                run()
                if repeat >= 0:
                    seconds[name].append(time.process_time() - start)
    for name, spent in seconds.items():
        paired = statistics.median(a / b for a, b in zip(spent, seconds["timm"], strict=True))
        print(
            f"{name:5s} {len(images) / min(spent):6.0f} images/s and core   "
            f"min/min {min(spent) / min(seconds['timm']):.3f}   paired {paired:.3f}"
        )


if __name__ == "__main__":
    main()
