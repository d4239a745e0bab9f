"""What ``vitkd eval`` costs beside timm's validation loop, on the same images and with the same counts.

    python benchmarks/eval_speed.py --images 256 --repeats 3

Processor time on one thread from the first file to the last answer, the two interleaved, with a random
deit_tiny on JPEGs of 500×375 pixels; the looking at the files is ours alone and counts. Each has its own
default batch, timm's of 256. A ratio is timm's time over ours, of the smallest and the median over pairs.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from input import write_images
from timing import in_turn, judged, ratios, table
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.utils import accuracy

from vitkd_cli.evaluation import evaluate

MODEL, CLASSES = "deit_tiny_patch16_224", 3


@torch.inference_mode()
def validated(model: torch.nn.Module, folder: str, batch_size: int) -> tuple[int, ...]:
    """Right at first, and among three: timm's loop as its validate.py has it."""
    config = resolve_data_config({}, model=model, use_test_size=True)
    loader = create_loader(
        create_dataset("", root=folder, split="validation"),
        input_size=config["input_size"],
        batch_size=batch_size,
        use_prefetcher=False,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        num_workers=0,
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
        device=torch.device("cpu"),
    )
    right = torch.zeros(2)
    for images, labels in loader:
        top1, top2 = accuracy(model(images), labels, topk=(1, 2))
        right += torch.tensor([top1.item(), top2.item()]) * len(images) / 100
    return tuple(right.round().int().tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=CLASSES).eval()
    with tempfile.TemporaryDirectory() as scratch:
        write_images(Path(scratch), args.images)
        (Path(scratch) / "train").rename(Path(scratch) / "validation")

        def ours() -> tuple[int, ...]:
            found = evaluate(model, scratch, workers=0, device="cpu").metrics
            return tuple(int((found.ranked[:, :k] == found.labels[:, None]).sum()) for k in (1, 2))

        passes = {
            "timm, 256 a batch, its default": lambda: validated(model, scratch, 256),
            "timm, 32 a batch": lambda: validated(model, scratch, 32),
            "`vitkd eval`, 32 a batch on a CPU": ours,
        }
        counts = set()
        times = in_turn(
            {name: lambda _, run=run: counts.add(run()) for name, run in passes.items()},  # type: ignore[misc]
            args.repeats,
            warmup=0,
        )
    assert len(counts) == 1, counts  # the same answers
    timms, *_ = times.values()
    rows = []
    for name, own in times.items():
        smallest, paired = (1 / ratio for ratio in ratios(own, timms))
        goal = judged(smallest, 1.3, at_least=True) if "vitkd" in name else ""
        rows.append((name, f"{1000 * min(own) / args.images:.1f}", f"{smallest:.2f}", f"{paired:.2f}", goal))
    print(table(("loop", "ms an image", "× timm, smallest times", "median of pairs", "goal"), rows))


if __name__ == "__main__":
    main()
