"""What a distillation step costs over its floor: teacher forward + student step with labels alone.

    python benchmarks/step.py --batch 16 --repeats 7
    python benchmarks/step.py --device cuda --mixed-precision bf16 --batch 256 --repeats 20

Process CPU time on one thread, or time on the GPU from an idle queue to an idle queue; the variants
interleaved, so that a busy machine tilts none of them. A ratio is ours over the floor: of the smallest times,
and the median over pairs of neighbours.
Weights are random. We ask for 1.10 or less with the defaults.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch
from torch import Tensor, nn

from vitkd_cli.device import tensor_float32
from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.terms.generate import Generate
from vitkd_cli.vit.taps import LOGITS, TappedViT

FORMULA = "labels + vitkd + nkd"


class Step:
    """One optimizer step of a student under an objective; the teacher runs in any case."""

    def __init__(self, formula: str, args: argparse.Namespace, *, dense: bool = False) -> None:
        torch.manual_seed(0)
        teacher = timm.create_model(args.teacher, pretrained=False).eval().requires_grad_(False)
        student = timm.create_model(args.student, pretrained=False).train()
        self.device, self.amp = torch.device(args.device), args.mixed_precision == "bf16"
        probe = TappedViT(teacher, [LOGITS])
        self.student = TappedViT(student, [LOGITS])
        self.objective = Objective(formula, self.student.spec, probe.spec)
        self.student = TappedViT(student, self.objective.student_taps, self.student.spec)
        self.teacher = TappedViT(teacher, self.objective.teacher_taps | {LOGITS}, probe.spec)
        if dense:
            for term in self.objective.terms.values():
                if isinstance(term, Generate):
                    term.sparse = False  # both convolutions over the whole grid
        nn.ModuleList([student, teacher, self.objective]).to(self.device)
        self.optimizer = torch.optim.AdamW(nn.ModuleList([student, self.objective]).parameters())

    def __call__(self, images: Tensor, batch: Batch) -> float:
        start = clock(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            with torch.no_grad():
                teacher = self.teacher(images)
            student = self.student(images)
        total, _ = self.objective(student, teacher, batch)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return clock(self.device) - start


def clock(device: torch.device) -> float:
    """Seconds of this process on a CPU, or by the clock once the GPU is idle."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--teacher", default="deit3_small_patch16_224")
    parser.add_argument("--student", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()
    torch.set_num_threads(1)

    steps = {
        "floor": Step("labels", args),
        "ours": Step(FORMULA, args),
        "dense generator": Step(FORMULA, args, dense=True),
    }
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(-2, args.repeats):  # the first rounds warm up
        batch = Batch(
            torch.randint(0, 1000, (args.batch,), device=args.device),
            generator=torch.Generator().manual_seed(repeat + 2),
        )
        for name, step in steps.items():
            with tensor_float32(images.device, allowed=True):  # as in training
                spent = step(images, batch)
            if repeat >= 0:
                seconds[name].append(spent)

    print(f"{FORMULA}: {args.teacher} -> {args.student}, batch {args.batch}, {args.repeats} repeats")
    floor = seconds["floor"]
    for name, ours in seconds.items():
        paired = statistics.median(a / b for a, b in zip(ours, floor, strict=True))
        print(
            f"{name:16s} min {min(ours):7.4f} s   min/min {min(ours) / min(floor):.3f}   paired {paired:.3f}"
        )


if __name__ == "__main__":
    main()
