"""A small random model of every family in every form that is exported: the table of docs/export.md.

    python benchmarks/export.py

A figure is the largest difference from the model's own outputs on 20 images, as a share of the largest of
these. Every model has a process and ten minutes of its own; what is done is kept in export.jsonl beside the
page until all are, so that the command can be stopped and started again.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "export.md"
KEPT = PAGE.with_name("export.jsonl")
SECONDS = 600
MODELS = [
    "vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224",
    "aimv2_large_patch14_224", "vit_pwee_patch16_reg1_gap_256", "vit_dwee_patch16_reg1_gap_256",
    "deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224",
    "vit_small_patch16_dinov3", "beit_base_patch16_224", "vit_relpos_small_patch16_224",
    "naflexvit_base_patch16_gap", "samvit_base_patch16_224", "qwen3_vit_88m", "cait_xxs24_224",
    "xcit_nano_12_p16_224", "convit_tiny", "tnt_s_patch16_224", "crossvit_tiny_240", "pit_ti_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "hiera_tiny_224",
    "mvitv2_tiny", "pvt_v2_b0", "twins_svt_small", "nest_tiny", "davit_tiny", "maxvit_pico_rw_256",
    "coatnet_nano_rw_224", "volo_d1_224", "levit_128s", "tiny_vit_5m_224", "mobilevit_xxs",
    "edgenext_xx_small",
]  # fmt: skip
# What makes a model small, tried in this order.
SMALLER: list[dict[str, object]] = [
    {"img_size": 64, "depth": 2, "embed_dim": 96, "num_heads": 3},
    {"img_size": 112, "depth": 2, "embed_dim": 96, "num_heads": 3},  # patches of 14 and 16
    {"img_size": 64, "depth": 2},
    {"img_size": 128, "depth": 2},
    {"img_size": 64, "window_size": 4, "embed_dim": 48, "depths": (1, 1, 2, 1)},
    {"img_size": 64, "depths": (1, 1, 2, 1)},
    {"img_size": 128},
    {"depths": (1, 1, 2, 1)},
    {},
]


def saved(name: str, folder: Path) -> None:
    """A small random model in timm's own folder format, with every weight away from where it starts."""
    import timm
    import torch
    from timm.models._hub import save_for_hf

    from vitkd_cli.vit.spec import describe

    for arguments in SMALLER:
        torch.manual_seed(0)
        with contextlib.suppress(TypeError, AssertionError, RuntimeError, ValueError, IndexError):
            model = timm.create_model(name, num_classes=10, **arguments).eval()
            describe(model)
            break
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    save_for_hf(model, str(folder), safe_serialization=True)


def one(name: str) -> None:
    """Print a line of JSON for every form of one model."""
    from vitkd_cli import UserError
    from vitkd_cli.export import TARGETS, export

    with tempfile.TemporaryDirectory() as room:
        saved(name, Path(room) / "model")
        for to in TARGETS:
            try:
                found = export(str(Path(room) / "model"), to, num_images=20, device="cpu").found
                assert found is not None
                cell = f"{found.difference / found.scale:.1e}" if found.difference else "0"
            except UserError as error:
                cell = f"unsupported: {error.message.partition(': ')[2] or error.message}"
            print(json.dumps({"model": name, "to": to, "cell": cell}), flush=True)


def main() -> None:
    rows: dict[str, dict[str, str]] = {}
    if KEPT.is_file():
        for cell in map(json.loads, KEPT.read_text().splitlines()):
            rows.setdefault(cell["model"], {})[cell["to"]] = cell["cell"]
    from vitkd_cli.export import TARGETS

    for name in MODELS:
        if len(rows.get(name, {})) == len(TARGETS):
            continue
        rows[name] = {}
        with tempfile.TemporaryFile("w+") as out, contextlib.suppress(subprocess.TimeoutExpired):
            try:
                subprocess.run([sys.executable, __file__, name], stdout=out, timeout=SECONDS)
            finally:
                out.seek(0)
                lines = out.read().splitlines()
                for cell in map(json.loads, lines):
                    rows[name][cell["to"]] = cell["cell"]
                KEPT.open("a").writelines(f"{line}\n" for line in lines)
        print(name, rows[name], flush=True)
    table = ["| model | " + " | ".join(f"`{to}`" for to in TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for name in MODELS:
        cells = (rows[name].get(to, "not done in ten minutes").replace("|", r"\|") for to in TARGETS)
        table.append(f"| {name} | " + " | ".join(cells) + " |")
    start, end = "<!-- generated: matrix -->", "<!-- end: matrix -->"
    before, _, rest = PAGE.read_text().partition(start)
    lines = "\n".join(table)
    PAGE.write_text(f"{before}{start}\n{lines}\n{end}{rest.partition(end)[2]}")
    KEPT.unlink()


if __name__ == "__main__":
    one(sys.argv[1]) if sys.argv[1:] else main()
