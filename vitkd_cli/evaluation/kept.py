"""Answers on disk, so that a scoring that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from vitkd_cli.data import Images
from vitkd_cli.evaluation.metrics import Tables


class Kept:
    """The answers of models, a file each (and a process each, while they come).

    Args:
        folder: where; made when something is kept.
        models: how each was typed, and a token of all that its answers depend on.
        rank: of this process.
    """

    def __init__(self, folder: Path, models: Sequence[tuple[str, str]], rank: int = 0) -> None:
        self.folder, self.models, self.rank = folder, models, rank

    def read(self, images: int) -> list[Tables]:
        """What is known of each model; answers that depend on anything else are passed over."""
        found = []
        for name, token in self.models:
            table = Tables(1, images)
            for file in self.folder.glob(f"{_slug(name)}.*.safetensors"):
                with suppress(SafetensorError, OSError), safe_open(file, "pt") as opened:  # or half gone
                    if (opened.metadata() or {}).get("token") == token:
                        new = opened.get_tensor("seen") > 0
                        table.rows[0, new] = opened.get_tensor("rows")[new]
                        table.seen[new] = 1
            found.append(table)
        return found

    def write(self, models: Sequence[int], tables: Tables, *, last: bool = False) -> None:
        """Keep what these models have answered; the last time, for all processes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, table in zip(models, tables.apart(), strict=True):
            name, token = self.models[index]
            file = self.folder / f"{_slug(name)}.{self.rank}.safetensors"
            beside = file.with_suffix(".writing")
            tensors = {"rows": table.rows[0].cpu().contiguous(), "seen": table.seen.cpu().contiguous()}
            save_file(tensors, beside, metadata={"token": token, "model": name})
            os.replace(beside, file)  # a reader sees the old answers or the new ones
            if last:
                for other in self.folder.glob(f"{_slug(name)}.*.safetensors"):
                    if other != file:
                        other.unlink()


def _slug(name: str) -> str:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return re.sub(r"[^\w.-]+", "_", name)[-60:].strip("._") + "-" + digest


def token_of(*facts: Any) -> str:
    """A short name for everything that answers depend on."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def digest_of_weights(model: nn.Module) -> str:
    """Changes with any weight."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def digest_of_images(images: Images) -> str:
    """Changes with the number, the classes and the names of the images; not with their pixels.

    Of many images some thousand names are asked: a dataset of timm's may have to open an image for its name.
    """
    some = range(0, len(images), max(1, len(images) // 1000))
    return token_of([images.path(index) for index in some], images.labels())
