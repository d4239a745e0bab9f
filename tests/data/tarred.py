"""Tars to read from, and what is said of those that do not serve."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitkd_cli.data.datasets import open_data
from vitkd_cli.errors import UserError


def picture(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12, 3), np.uint8)).save(file, "png")
    return file.getvalue()


def write_tar(path: Path, files: dict[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def samples(first: int, count: int, **files) -> dict[str, bytes | str]:
    """Images, and what lies beside each: ending → a function of its number."""
    found: dict[str, bytes | str] = {}
    for number in range(first, first + count):
        found[f"{number:05d}.png"] = picture(number)
        found |= {f"{number:05d}.{ending}": of(number) for ending, of in files.items()}
    return found


def cls(number: int) -> str:
    return str(number % 3)


def shards(folder: Path, name: str = "train", sizes=(9, 4, 11)) -> str:
    """Tars of unequal length; their pattern."""
    first = 0
    for shard, size in enumerate(sizes):
        write_tar(folder / f"{name}-{shard:03d}.tar", samples(first, size, cls=cls))
        first += size
    return f"wds:{folder}/{name}-{{000..{len(sizes) - 1:03d}}}.tar"


def refused(data: object, **options: object) -> UserError:
    with pytest.raises(UserError) as caught:
        open_data(data=str(data), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value) and caught.value.hint
    return caught.value
