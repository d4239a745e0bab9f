"""Answers on disk, so that a scoring that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitkd_cli.data import Decoding, Images
from vitkd_cli.data.scan import stamp
from vitkd_cli.evaluation.metrics import Tables
from vitkd_cli.files import whole_file


class Kept:
    """The answers of models, one file per model (and process, while they come).

    Args:
        folder: where; made when something is kept.
        models: how each was typed, and a token of all that its answers depend on.
        rank: of this process.
    """

    def __init__(self, folder: Path, models: Sequence[tuple[str, str]], rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.names = [
            re.sub(r"[^\w.-]+", "_", typed)[-60:].strip("._") + f"-{token[:16]}" for typed, token in models
        ]

    def read(self, images: int) -> list[Tables]:
        """What is known of each model; answers that depend on anything else go by another name."""
        found = []
        for name in self.names:
            table = Tables(1, images)
            for file in self.folder.glob(f"{name}.*.safetensors"):
                with suppress(SafetensorError, OSError):  # damaged, or gone
                    with safe_open(file, "pt") as opened:
                        known = {key: opened.get_tensor(key) for key in ("rows", "seen")}
                        if (opened.metadata() or {}).get("sha256") != _digest(known):
                            continue
                    new = known["seen"] > 0
                    table.rows[0, new] = known["rows"][new]
                    table.seen[new] = 1
            found.append(table)
        return found

    def write(self, models: Sequence[int], tables: Tables, *, last: bool = False) -> None:
        """Keep what these models have answered; the last time, for all processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, table in zip(models, tables.apart(), strict=True):
            file = self.folder / f"{self.names[index]}.{self.rank}.safetensors"
            tensors = {"rows": table.rows[0].cpu().contiguous(), "seen": table.seen.cpu()}
            with whole_file(file) as beside:
                save_file(tensors, beside, {"sha256": _digest(tensors)})
            for other in self.folder.glob(f"{self.names[index]}.*.safetensors") if last else ():
                if other != file:
                    other.unlink()


def token_of(*facts: Any) -> str:
    """A short name for everything that answers depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """Changes with any weight."""
    return _digest(model.state_dict())


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_images(images: Images, decoding: Decoding) -> str:
    """Changes with the images' number, classes and names, with their files, and with how these are decoded.

    Of many images some thousand names are asked: a dataset of timm's may have to open an image for its name.
    """
    some = range(0, len(images), max(1, len(images) // 1000))
    files = {file for index in range(len(images)) if (file := images.file(index)) is not None}
    return token_of([images.path(index) for index in some], images.labels(), stamp(sorted(files), decoding))
