"""A cache of answers, one file per model, so that a model that was scored is not run again."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitkd_cli.data.decoding import Decoding
from vitkd_cli.data.images import Images
from vitkd_cli.data.scan import image_files, stamp
from vitkd_cli.files import whole_file


def cache_file(folder: Path, name: str, *facts: Any) -> Path:
    """The file of a model's answers; its name changes with any of the facts that they depend on."""
    return folder / f"{safe_name(name)}-{_token(facts)[:16]}.safetensors"


def safe_name(text: str) -> str:
    """The end of a model's name, as part of a file's."""
    return re.sub(r"[^\w.-]+", "_", text)[-60:].strip("._")


def read_rows(file: Path) -> Tensor | None:
    """The rows of every image; None where there are none, or they are damaged."""
    return (read_tensors(file) or {}).get("rows")


def write_rows(file: Path, rows: Tensor) -> None:
    write_tensors(file, {"rows": rows})


def read_tensors(file: Path) -> dict[str, Tensor] | None:
    """What :func:`write_tensors` wrote; None where there is nothing, or it is damaged."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
            whole = (opened.metadata() or {}).get("sha256") == _digest(tensors)
            return tensors if whole else None
    except (SafetensorError, OSError):
        return None


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors, and a digest of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
    with whole_file(file) as beside:
        save_file(tensors, beside, {"sha256": _digest(tensors)})


def digest_of_weights(net: nn.Module) -> str:
    """Changes with any weight."""
    return _digest(net.state_dict())


def digest_of_images(images: Images, decoding: Decoding) -> str:
    """Changes with the images' number, classes and names, with their files, and with how these are decoded.

    Of many images some thousand names are asked: a dataset of timm's may have to open an image for its name.
    """
    some = range(0, len(images), max(1, len(images) // 1000))
    files = images.archives or image_files(images)
    return _token([[images.path(index) for index in some], images.labels(), stamp(sorted(files), decoding)])


def digest_in_order(images: Images) -> str:
    """Changes with the images, their classes and their order: with every file's name, size and time.

    What lies in a dataset is told by its index; which dataset that is, nothing here says but some names.
    """
    if images.file(0) is None:
        return _token([digest_of_images(images, Decoding()), list(map(repr, images.refs))])
    return _token([stamp(list(images.refs), Decoding()), images.labels()])


def _token(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
