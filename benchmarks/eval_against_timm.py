"""Does ``vitkd eval`` count what timm's ``validate.py`` counts? To the image, on photographs.

720 crops of scikit-image's photographs, 12 classes, of many sizes; a small model of each family, random but
for its classifier, which is solved on every fourth image so that there is something to count.

    python benchmarks/eval_against_timm.py                   # timm's functions, called as validate.py does
    python benchmarks/eval_against_timm.py --validate FILE   # timm's own script, from its repository

The table of docs/evaluation.md is written anew.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models._hub import save_for_hf
from timm.utils import AverageMeter, accuracy

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "evaluation"))

from test_accuracy import loader_of
from test_docs import with_table

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PAGE = Path(__file__).parents[1] / "docs" / "evaluation.md"
CLASSES = (
    "astronaut", "chelsea", "coffee", "rocket", "camera", "brick", "grass", "gravel", "coins", "text", "page",
    "moon",
)  # fmt: skip
A_CLASS = 60
NARROW = {"embed_dim": 96, "depth": 3, "num_heads": 3}
MODELS = {
    "ViT": ("vit_tiny_patch16_224", NARROW),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", NARROW),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 2)},
    ),
    "BEiT": ("beit_base_patch16_224", NARROW),
    "EVA-02": ("eva02_tiny_patch14_224", NARROW),
    "DeiT III": ("deit3_small_patch16_224.fb_in22k_ft_in1k", NARROW),
    "EdgeNeXt, its test size": ("edgenext_xx_small", {"depths": (1, 1, 2, 1), "dims": (24, 32, 48, 64)}),
}


def photographs(root: Path) -> None:
    """Crops of every size and shape, in class folders of a validation split."""
    from skimage import data

    draw = np.random.default_rng(0)
    for name in CLASSES:
        picture = getattr(data, name)()
        (root / "validation" / name).mkdir(parents=True)
        for index in range(A_CLASS):
            side = int(draw.integers(60, min(picture.shape[:2]) - 1))
            wide = min(picture.shape[1], int(side * draw.uniform(0.7, 1.4)))
            y, x = (
                int(draw.integers(0, full - cut + 1))
                for full, cut in zip(picture.shape, (side, wide), strict=False)
            )
            crop = Image.fromarray(picture[y : y + side, x : x + wide]).convert("RGB")
            crop.save(root / "validation" / name / f"{index:02d}.jpg")


@torch.inference_mode()
def saved(name: str, kwargs: dict[str, object], data: Path, folder: Path) -> None:
    """A random model whose classifier is solved by ridge regression, in timm's folder format."""
    torch.manual_seed(3)
    model = timm.create_model(name, num_classes=len(CLASSES), **kwargs).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.06)
    loader = loader_of(model, data, 60)
    features, labels = [], []
    for images, target in loader:
        features.append(model.forward_head(model.forward_features(images), pre_logits=True))
        labels.append(target)
    known = torch.cat(features).double()[::4]
    known = torch.cat([known, torch.ones(len(known), 1)], 1)
    targets = 8 * F.one_hot(torch.cat(labels)[::4], len(CLASSES)).double()
    ridge = known.T @ known + 0.01 * torch.eye(known.shape[1])
    solved = torch.linalg.solve(ridge, known.T @ targets).float()
    names = model.pretrained_cfg["classifier"]
    for path in (names,) if isinstance(names, str) else names:
        layer = model.get_submodule(path)
        layer.weight.copy_(solved[:-1].T)
        layer.bias.copy_(solved[-1])
    save_for_hf(model, str(folder), safe_serialization=True)


@torch.inference_mode()
def as_validate(folder: Path, data: Path, batch_size: int) -> dict[str, float]:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    loader = loader_of(model, data, batch_size)
    top1, top5 = AverageMeter(), AverageMeter()
    for images, target in loader:
        first, fifth = accuracy(model(images), target, topk=(1, 5))
        top1.update(first.item(), len(images))
        top5.update(fifth.item(), len(images))
    return {"top1": round(top1.avg, 4), "top5": round(top5.avg, 4)}


def by_script(script: str, folder: Path, data: Path, batch_size: int) -> dict[str, float]:
    arguments = ["--data-dir", str(data), "--model", f"local-dir:{folder}", "--pretrained", "--device", "cpu"]
    arguments += ["-b", str(batch_size), "-j", "1"]
    out = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return json.loads(out.stdout.partition("--result\n")[2])


def ours(folder: Path, data: Path, batch_size: int) -> dict[str, float]:
    arguments = ["eval", str(folder), "--data", str(data), "--json", "-q", "-j", "1", "-b", str(batch_size)]
    out = subprocess.run(
        [sys.executable, "-m", "vitkd_cli", *arguments], capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--validate", help="timm's validate.py")
    script = parser.parse_args().validate
    differing = []
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "photographs"
        photographs(data)
        lines = [
            "| model | images | right: timm | right: vitkd | among five: timm | among five: vitkd |",
            "|---|---|---|---|---|---|",
        ]
        for title, (name, kwargs) in MODELS.items():
            folder = Path(scratch) / name
            saved(name, kwargs, data, folder)
            # batches of 64 and of 50: 720 images end in a ragged one
            theirs = by_script(script, folder, data, 64) if script else as_validate(folder, data, 64)
            found = ours(folder, data, 50)
            count = found["count"]
            counts = [round(r[key] * count / 100) for key in ("top1", "top5") for r in (theirs, found)]
            lines.append(f"| {title} | {count} | {' | '.join(map(str, counts))} |")
            print(lines[-1], flush=True)
            if counts[0] != counts[1] or counts[2] != counts[3]:
                differing.append(title)
    how = "its `validate.py`" if script else "its functions, called as its `validate.py` calls them"
    lines += ["", f"timm {timm.__version__}, {how}."]
    PAGE.write_text(with_table(PAGE.read_text(), "against timm", "\n".join(lines)))
    if differing:
        sys.exit(f"differ: {', '.join(differing)}")


if __name__ == "__main__":
    main()
