"""How fast training images come, beside timm, and how far the fast ones are from timm's.

    python benchmarks/input.py                    # images per second and core
    python benchmarks/input.py --compare 1000     # the pixels of both backends, as a histogram

Process CPU time on one thread, the variants interleaved. A ratio is timm's time over ours, of the smallest
times and the median over pairs of neighbours. The images are JPEGs of 500×375 pixels, cut from
scikit-image's photographs. timm decodes with its own reader, crops, flips, makes a normalised tensor and
erases. ``simplejpeg`` is measured where it is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from skimage import data
from timing import in_turn, judged, ratios, table
from timm.data import auto_augment, create_transform
from torchvision.io import ImageReadMode, decode_jpeg

from vitkd_cli.data import pixels
from vitkd_cli.data.datasets import open_data
from vitkd_cli.data.decoded import cached, fill
from vitkd_cli.data.images import Images
from vitkd_cli.data.keyed import Keyed
from vitkd_cli.data.pixels import decoded_fast
from vitkd_cli.data.transforms import train_view
from vitkd_cli.recipe import Augmentation

BATCH = 32  # images that a worker makes in one call
PAPER = "rand-m9-mstd0.5-inc1"
VIEW = {"scale": (0.08, 1.0), "ratio": (3 / 4, 4 / 3), "hflip": 0.5}


def write_images(folder: Path, count: int) -> Images:
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
    images = open_data(data=str(folder), val_fraction=0).train
    assert isinstance(images, Images)
    return images


def fast(images: Images, decoder: str) -> Images:
    """Decoded by simplejpeg, or by torchvision although that is installed."""
    found = decoded_fast(images)
    assert isinstance(found, Images)

    def by_torchvision(content: bytes) -> torch.Tensor:
        return decode_jpeg(torch.from_numpy(np.frombuffer(bytearray(content), np.uint8)), ImageReadMode.RGB)

    own = pixels._decoder()

    def open_with(ref: str, decoding: object) -> object:
        pixels._decoder = lambda: by_torchvision if decoder == "torchvision" else own
        return images.open(ref, decoding)

    found.open = open_with  # type: ignore[assignment]
    return found


def timms(images: Images, aa: str) -> Callable[[int], None]:
    def posterize(image: Image.Image, bits_to_keep: int, **options: object) -> Image.Image:
        kept: Image.Image = auto_augment.posterize(image, max(1, bits_to_keep), **options)
        return kept  # with 0 bits timm fails on Pillow 13

    auto_augment.NAME_TO_OP["PosterizeIncreasing"] = posterize
    transform = create_transform(
        224,
        is_training=True,
        **VIEW,
        interpolation="bicubic",
        auto_augment=None if aa == "none" else aa,
        color_jitter=None,
        re_prob=0.25,
        re_mode="pixel",
    )

    def run(_: int) -> None:
        for start in range(0, len(images), BATCH):
            views = []
            for index in range(start, min(start + BATCH, len(images))):
                with open(images.refs[index], "rb") as file:
                    views.append(transform(Image.open(file).convert("RGB")))
            torch.stack(views)

    return run


def ours(images: Images, aa: str) -> Callable[[int], None]:
    keyed = Keyed(images, train_view((224, 224), Augmentation(**VIEW, aa=aa)), seed=0)

    def run(_: int) -> None:
        for start in range(0, len(images), BATCH):
            keys = [(0, index, index) for index in range(start, min(start + BATCH, len(images)))]
            torch.stack([view[0] for view in keyed.__getitems__(keys)])

    return run


def decoding(images: Images) -> Callable[[int], object]:
    return lambda _: [images[index] for index in range(len(images))]


def measure(images: Images, folder: str, repeats: int) -> str:
    """A table of images per second and core, and × timm, without and with the paper's RandAugment."""
    fill(images, folder)
    pillow, fastest = "`--input-backend pillow`", "`--input-backend torchvision`"
    sources = {pillow: images, fastest: fast(images, "torchvision")}
    if find_spec("simplejpeg"):
        sources["the same with simplejpeg"] = fast(images, "simplejpeg")
    sources["`--cache-images`"] = cached(fast(images, "torchvision"), folder)
    sources["`--cache-images`"].open.images = images  # type: ignore[attr-defined]
    columns: list[dict[str, tuple[str, ...]]] = []
    for aa, goals in (("none", {fastest: 2.5, "`--cache-images`": 5.0}), (PAPER, {fastest: 1.8})):
        random.seed(0)
        variants = {"timm": timms(images, aa)} | {name: ours(part, aa) for name, part in sources.items()}
        if aa == "none":
            variants |= {f"{name}: decoding alone": decoding(part) for name, part in sources.items()}
        times = in_turn(variants, repeats)
        columns.append({})
        for name, spent in times.items():
            smallest, paired = (1 / ratio for ratio in ratios(spent, times["timm"]))
            goal = judged(smallest, goals[name], at_least=True) if name in goals else ""
            rate = f"{len(images) / min(spent):.0f}"
            columns[-1][name] = (rate, f"{smallest:.2f}", f"{paired:.2f}", goal)
    rows = [(name, *plain, *columns[1].get(name, ("", "", "", ""))) for name, plain in columns[0].items()]
    half = ("images/s and core", "× timm, smallest times", "median of pairs", "goal")
    return table(("crop, flip, erasing; then with RandAugment", *half, *half), rows)


def compare(images: Images) -> None:
    """Pixels of both backends by the same keys, and whether both left the generators alike."""
    quick = decoded_fast(images)
    assert isinstance(quick, Images)
    same = sum(
        isinstance(found := quick[index][0], pixels.Pixels)
        and np.array_equal(np.asarray(images[index][0]), np.asarray(found.image()))
        for index in range(len(images))
    )
    print(f"decoded to the same pixels: {same} of {len(images)} images")
    for aa in ("none", PAPER):
        drawn: list[list[bytes]] = []
        counts = torch.zeros(256, dtype=torch.int64)
        view = train_view((224, 224), Augmentation(**VIEW, aa=aa))

        def noted(picture: object, view: object = view, drawn: list[list[bytes]] = drawn) -> torch.Tensor:
            found: torch.Tensor = view(picture)  # type: ignore[operator]
            states = (
                random.getstate(),
                np.random.get_state()[1].tobytes(),
                torch.get_rng_state().numpy().tobytes(),
            )
            drawn[-1].append(hashlib.sha256(repr(states).encode()).digest())
            return found

        views = []
        for part in (images, quick):
            drawn.append([])
            keyed = Keyed(part, noted, seed=0)
            views.append([item[0] for item in keyed.__getitems__([(0, i, i) for i in range(len(part))])])
        for timm_view, fast_view in zip(*views, strict=True):
            counts += torch.bincount((timm_view.int() - fast_view.int()).abs().flatten(), minlength=256)
        alike = sum(a == b for a, b in zip(*drawn, strict=True))
        print(f"\naa {aa}: the same draws for {alike} of {len(images)} images; grey levels apart:")
        total, bounds = int(counts.sum()), [0, 1, 2, 3, 5, 9, 17, 33, 256]
        for low, high in pairwise(bounds):
            part = int(counts[low:high].sum())
            span = str(low) if high == low + 1 else f"{low}–{high - 1}"
            print(f"  {span:>7s} {part:12,} {part / total:10.5%} {'#' * round(50 * part / total)}")
        print(f"  within 1: {int(counts[:2].sum()) / total:.4%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compare", type=int, default=0, metavar="IMAGES")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if args.compare:
            compare(write_images(Path(folder) / "images", args.compare))
        else:
            images = write_images(Path(folder) / "images", args.images)
            print(measure(images, f"{folder}/cache", args.repeats))


if __name__ == "__main__":
    main()
