"""What a distillation step costs over its floor: teacher forward + student step with labels alone.

    python benchmarks/step.py
    python benchmarks/step.py --pair small-tiny --batch 16 --repeats 9
    python benchmarks/step.py --device cuda --mixed-precision bf16 --batch 256 --repeats 20

Process CPU time on one thread, or time on the GPU from an idle queue to an idle queue; the variants
interleaved. A ratio is ours over the floor: of the smallest times, and the median over pairs of neighbours.
Beside it what a step keeps for its backward, and on a GPU the peak of its memory. timm's own task runs in the
plain loop of its train.py, and ours with the same loss. Weights are random.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import timm
import torch
from timing import in_turn, judged, ratios, table
from timm.loss import LabelSmoothingCrossEntropy
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from vitkd_cli.device import tensor_float32
from vitkd_cli.objective import Objective
from vitkd_cli.terms import Batch
from vitkd_cli.terms.generate import Generate
from vitkd_cli.vit.taps import LOGITS, TappedViT

FORMULA = "labels + vitkd + nkd"
IN_BF16 = f"`{FORMULA}`, `--terms-dtype bf16`"
TIMM, LIKE_TIMM = "timm's LogitDistillationTask", "`labels + kd`"
# Teacher and student; the goal of a step on a CPU.
PAIRS = {
    "small-tiny": ("deit3_small_patch16_224", "deit_tiny_patch16_224", 1.07),
    "base-tiny": ("deit3_base_patch16_224", "deit_tiny_patch16_224", 1.12),
}
ON_A_GPU = 1.05  # the goal in bfloat16


class Step:
    """One optimizer step of a student under an objective; the teacher runs in any case."""

    def __init__(
        self, formula: str, args: argparse.Namespace, *, dense: bool = False, bf16: bool = False
    ) -> None:
        teacher, student = models(args)
        probe = TappedViT(teacher, [LOGITS])
        self.student = TappedViT(student, [LOGITS])
        self.objective = Objective(formula, self.student.spec, probe.spec, bf16=bf16)
        self.student = TappedViT(student, self.objective.student_taps, self.student.spec)
        self.teacher = TappedViT(teacher, self.objective.teacher_taps | {LOGITS}, probe.spec)
        if dense:
            for term in self.objective.terms.values():
                if isinstance(term, Generate):
                    term.sparse = False  # both convolutions over the whole grid
        self.device, self.amp = torch.device(args.device), args.mixed_precision == "bf16"
        nn.ModuleList([student, teacher, self.objective]).to(self.device)
        self.optimizer = torch.optim.AdamW(nn.ModuleList([student, self.objective]).parameters())

    def __call__(self, images: Tensor, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            with torch.no_grad():
                teacher = self.teacher(images)
            student = self.student(images)
        total, _ = self.objective(student, teacher, batch)
        total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class TimmStep:
    """The same of timm's task, in the loop of its train.py."""

    def __init__(self, args: argparse.Namespace) -> None:
        teacher, student = models(args)
        self.device, self.amp = torch.device(args.device), args.mixed_precision == "bf16"
        self.task = LogitDistillationTask(
            student.to(self.device), teacher.to(self.device), LabelSmoothingCrossEntropy(0.1), verbose=False
        ).train()
        self.optimizer = torch.optim.AdamW(self.task.trainable_module.parameters())

    def __call__(self, images: Tensor, batch: Batch) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            loss = self.task(images, batch.targets)["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def models(args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Teacher and student of ``args.pair``."""
    torch.manual_seed(0)
    teacher, student = (timm.create_model(name, pretrained=False) for name in PAIRS[args.pair][:2])
    return teacher.eval().requires_grad_(False), student.train()


def kept(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that a step keeps for its backward, a storage once; on a GPU the peak of its memory."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def measure(args: argparse.Namespace) -> str:
    """The table of a pair."""
    steps = {
        "floor": Step("labels", args),
        f"`{FORMULA}`": Step(FORMULA, args),
        "the same with a dense generator, as published": Step(FORMULA, args, dense=True),
        LIKE_TIMM: Step("labels + kd", args),
        TIMM: TimmStep(args),
    }
    if args.mixed_precision == "bf16":
        steps[IN_BF16] = Step(FORMULA, args, bf16=True)
    images = torch.randn(args.batch, 3, 224, 224, device=args.device)

    def batch(repeat: int) -> Batch:
        generator = torch.Generator().manual_seed(repeat)
        labels = torch.randint(0, 1000, (args.batch,), generator=generator)
        return Batch(labels.to(args.device), generator=generator)

    def variant(step: Callable[[Tensor, Batch], None], repeat: int) -> None:
        with tensor_float32(images.device, allowed=True):  # as in training
            step(images, batch(repeat))

    variants = {name: partial(variant, step) for name, step in steps.items()}
    times = in_turn(variants, args.repeats, args.device, warmup=2)
    floor, goal = times["floor"], ON_A_GPU if args.device == "cuda" else PAIRS[args.pair][2]
    if args.device == "cuda" and args.mixed_precision == "no":
        goal = 0.0
    rows = []
    for name, own in times.items():
        smallest, paired = ratios(own, floor)
        wanted = judged(smallest, goal) if goal and name in (f"`{FORMULA}`", IN_BF16) else ""
        if name == LIKE_TIMM:
            wanted = f"timm's: {ratios(own, times[TIMM])[0]:.3f}"
        memory = kept(partial(variants[name], 0), images.device) / 2**20 / args.batch
        rows.append((name, f"{smallest:.3f}", f"{paired:.3f}", f"{memory:.1f}", wanted))
    teacher, student, _ = PAIRS[args.pair]
    what = (
        f"{teacher} → {student}, batch {args.batch}{', bfloat16' if args.mixed_precision == 'bf16' else ''}"
    )
    return table((what, "smallest times", "median of pairs", "MiB an image", "goal"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--pair", choices=PAIRS, action="append", help="all of them, if none is named")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for pair in args.pair or PAIRS:
        print(measure(argparse.Namespace(**{**vars(args), "pair": pair})), "\n", flush=True)


if __name__ == "__main__":
    main()
