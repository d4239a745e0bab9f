"""What a teacher said of consecutive updates, in files that are whole or not there.

A shard is a safetensors file with one tensor ``[updates, G, ...]``, for G images an update, that is read
memory-mapped. ``features-3/000002-00000120-00000180.safetensors`` has a tap's signals at the updates 120 to
179 of epoch 2. Every process writes its own rows; the main process makes room for the file beforehand, and
gives it its header and its name when all have written.
"""

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vitkd_cli.files import flush, saving
from vitkd_cli.vit.taps import Tap

_DATA = 4096  # bytes before the tensor: the header, padded with spaces
_TYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_NAME = "signals"


@dataclass(frozen=True, order=True)
class Span:
    """Consecutive updates of an epoch, from ``start`` to the one before ``stop``."""

    epoch: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"{self.epoch:06}-{self.start:08}-{self.stop:08}.safetensors"

    @classmethod
    def of(cls, file: str) -> Self | None:
        """The span of a shard by its name; None for what is no shard."""
        found = re.fullmatch(r"(\d{6})-(\d{8})-(\d{8})\.safetensors", file)
        return cls(*map(int, found.groups())) if found else None

    def holds(self, epoch: int, update: int) -> bool:
        return self.epoch == epoch and self.start <= update < self.stop


@dataclass(frozen=True)
class Signal:
    """What is kept of a tap.

    Attributes:
        shape: of one update: its images first.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of one update."""
        return prod(self.shape) * self.dtype.itemsize


def folder_of(cache: Path, tap: Tap) -> Path:
    return cache / (tap.kind if tap.block is None else f"{tap.kind}-{tap.block}")


def spans(folder: Path, epoch: int | None = None) -> list[Span]:
    """Of the shards in a tap's folder, of one epoch or of all, in their order."""
    start = "" if epoch is None else f"{epoch:06}-"  # of short epochs there are thousands
    try:
        return sorted(filter(None, (Span.of(name) for name in os.listdir(folder) if name.startswith(start))))
    except OSError:  # none that can be read
        return []


class Shard:
    """A shard under way, as one process writes it.

    Args:
        part: where it is written; :func:`reserve` has made room there.
        signal: what it holds of each update.
        start: its first update.
    """

    def __init__(self, part: Path, signal: Signal, start: int) -> None:
        self.part, self.signal, self.start = part, signal, start
        self._descriptor = os.open(part, os.O_RDWR)

    def write(self, update: int, rows: Tensor, values: Tensor) -> None:
        """Write ``values [B, ...]`` into the rows ``[B]`` of an update."""
        row = self.signal.bytes // self.signal.shape[0]
        place = _DATA + (update - self.start) * self.signal.bytes
        content = values.contiguous().view(-1).view(torch.uint8).numpy().data
        for _, run in groupby(enumerate(rows.tolist()), lambda pair: pair[1] - pair[0]):  # of rows in a row
            (index, first), *more = run
            part = content[index * row : (index + 1 + len(more)) * row]
            _write(self._descriptor, part, place + first * row)

    def seal(self, path: Path, updates: int, about: Mapping[str, str]) -> None:
        """Cut it after so many updates, and give it its header and its name.

        Args:
            about: whose it is; :func:`wrong_with` asks for it.
        """
        size = updates * self.signal.bytes
        with saving(path):
            os.ftruncate(self._descriptor, _DATA + size)
            content: dict[str, Any] = {
                "__metadata__": {**about, "sha256": _digest(self.part)},
                _NAME: {
                    "dtype": _TYPES[self.signal.dtype],
                    "shape": [updates, *self.signal.shape],
                    "data_offsets": [0, size],
                },
            }
            header = json.dumps(content).encode().ljust(_DATA - 8)
            _write(self._descriptor, memoryview(struct.pack("<Q", len(header)) + header), 0)
            flush(self.part)
            os.replace(self.part, path)
            flush(path.parent)

    def close(self) -> None:
        os.close(self._descriptor)


def reserve(part: Path, size: int) -> None:
    """Make a file with room for so many bytes of a shard; a disk that is full says so here."""
    part.parent.mkdir(parents=True, exist_ok=True)
    with open(part, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, _DATA + size)
        else:
            file.truncate(_DATA + size)


def mapped(path: Path) -> Tensor:
    """The signals ``[updates, G, ...]`` of a shard, memory-mapped: what is not read takes no memory."""
    with safe_open(path, "pt") as file:
        return file.get_tensor(_NAME)


def wrong_with(path: Path, span: Span, signal: Signal, about: Mapping[str, str]) -> str:
    """What keeps a shard from being used; empty if nothing does."""
    try:
        with safe_open(path, "pt") as file:
            told, kept = file.metadata() or {}, file.get_slice(_NAME)
            shape, dtype = kept.get_shape(), kept.get_dtype()
        if any(told.get(key) != value for key, value in about.items()):
            return "is of another cache"
        if shape != [span.stop - span.start, *signal.shape] or dtype != _TYPES[signal.dtype]:
            return "does not have the shape or type that it should"
        return "" if told.get("sha256") == _digest(path) else "does not have the content that was written"
    except SafetensorError as problem:
        return f"is no shard: {problem}"
    except OSError as problem:
        return (problem.strerror or "cannot be read").lower()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        file.seek(_DATA)
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write(descriptor: int, content: memoryview, place: int) -> None:
    while content:
        done = os.pwrite(descriptor, content, place)
        content, place = content[done:], place + done
