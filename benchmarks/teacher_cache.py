"""What an update costs with a live teacher, and with one whose answers are read from a cache.

    python benchmarks/teacher_cache.py --batch 8 --repeats 7
    python benchmarks/teacher_cache.py --device cuda --mixed-precision bf16 --batch 128 --repeats 20

Both run the student's forward, the terms, backward and the optimizer; the cached one maps the shards of a
cache that the live one filled, on disk, as training does. Process CPU time on one thread, or time on the GPU
from an idle queue to an idle queue; the variants interleaved, so that a busy machine tilts none of them. A
speed-up is live over cached: of the smallest times, and the median over pairs of neighbours. Images are noise
and cost nothing; weights are random. On a CPU we
ask for 3 from base to tiny, and 1.9 from small to tiny.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import timm
import torch
from timing import clock, judged, ratios, table
from torch import Tensor, nn

from vitkd_cli.device import tensor_float32
from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch, to_device
from vitkd_cli.text import in_bytes
from vitkd_cli.training import shards
from vitkd_cli.training.shards import Shard, Signal
from vitkd_cli.vit.taps import LOGITS, Tap, TappedViT

PAIRS = {
    "base-tiny": ("deit3_base_patch16_224", "deit_tiny_patch16_224"),
    "small-tiny": ("deit3_small_patch16_224", "deit_tiny_patch16_224"),
}
GOALS = {"base-tiny": 3.0, "small-tiny": 1.9}
TYPES = {"exact": None, "fp16": torch.float16}
UPDATES = 4  # in the cache


class Update:
    """One update of a student under the formula."""

    def __init__(self, pair: str, images: Tensor, folder: Path, args: argparse.Namespace) -> None:
        torch.manual_seed(0)
        teacher, student = (timm.create_model(name, pretrained=False) for name in PAIRS[pair])
        seen, learns = (TappedViT(model, [LOGITS]).spec for model in (teacher, student))
        self.objective = Objective(args.loss, learns, seen)
        self.student = TappedViT(student.train(), self.objective.student_taps, learns)
        self.teacher = TappedViT(teacher.eval().requires_grad_(False), self.objective.teacher_taps, seen)
        self.device, self.amp, self.images = images.device, args.mixed_precision == "bf16", images
        nn.ModuleList([student, teacher, self.objective]).to(self.device)
        self.optimizer = torch.optim.AdamW(nn.ModuleList([student, self.objective]).parameters())
        self.rows = torch.arange(len(images[0]))
        said = [self.live(update) for update in range(UPDATES)]
        self.kept = {name: self.fill(folder / name, said, dtype) for name, dtype in TYPES.items()}

    def live(self, update: int) -> dict[Tap, Tensor]:
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return self.teacher(self.images[update])

    def fill(
        self, folder: Path, said: list[dict[Tap, Tensor]], dtype: torch.dtype | None
    ) -> dict[Tap, Tensor]:
        """Keep what the teacher said: the mapped shards."""
        kept = {}
        for tap, signal in said[0].items():
            path = shards.folder_of(folder, tap) / "shard"
            of_it = Signal(tuple(signal.shape), dtype or signal.dtype)
            shards.reserve(path, UPDATES * of_it.bytes)
            shard = Shard(path, of_it, 0)
            for update, signals in enumerate(said):
                shard.write(update, self.rows, signals[tap].to(of_it.dtype).cpu())
            shard.seal(path.with_name("sealed"), UPDATES, {})
            shard.close()
            kept[tap] = shards.mapped(path.with_name("sealed"))
        return kept

    def __call__(self, name: str, update: int) -> tuple[float, float]:
        """The seconds of all of it, and of the teacher's part."""
        start = clock(self.device)
        if name == "live":
            signals = self.live(update)
        else:
            kept = self.kept[name].items()
            signals = {
                tap: to_device(each[update].index_select(0, self.rows), self.device) for tap, each in kept
            }
        teacher = clock(self.device) - start
        batch = Batch(self.rows.to(self.device), generator=torch.Generator().manual_seed(update))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            student = self.student(self.images[update])
        total, _ = self.objective(student, signals, batch)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return clock(self.device) - start, teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loss", default="labels + vitkd + nkd")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pair", choices=PAIRS, action="append", help="all of them, if none is named")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()
    torch.set_num_threads(1)
    images = torch.rand(UPDATES, args.batch, 3, 224, 224, device=args.device)

    rows, asked = [], "exact" if args.device == "cpu" else None  # what has a goal
    for pair in args.pair or PAIRS:
        with tempfile.TemporaryDirectory() as folder, tensor_float32(images.device, allowed=True):
            update = Update(pair, images, Path(folder), args)
            seconds: dict[str, list[float]] = {name: [] for name in ("live", *TYPES)}
            teachers: dict[str, list[float]] = {name: [] for name in seconds}
            for repeat in range(-1, args.repeats):  # the first round warms up
                for name, spent in seconds.items():
                    took, teacher = update(name, repeat % UPDATES)
                    if repeat >= 0:
                        spent.append(took)
                        teachers[name].append(teacher)
        for name, ours in seconds.items():
            smallest, paired = (1 / ratio for ratio in ratios(ours, seconds["live"]))
            kept = update.kept.get(name, {}).values()
            rows.append(
                (
                    f"{pair}, {name}",
                    f"{1000 * min(ours):.0f}",
                    f"{1000 * min(teachers[name]):.0f}",
                    f"{smallest:.2f}",
                    f"{paired:.2f}",
                    in_bytes(sum(each[0, 0].nbytes for each in kept)) if kept else "",
                    judged(smallest, GOALS[pair], at_least=True) if name == asked else "",
                )
            )
    what = f"`{args.loss}`, batch {args.batch}"
    heading = (
        "ms",
        "of it the teacher",
        "live over it, smallest times",
        "median of pairs",
        "an image",
        "goal",
    )
    print(table((what, *heading), rows))


if __name__ == "__main__":
    main()
