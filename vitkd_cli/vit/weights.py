"""Weight files as people have them → tensors under timm's names. No pickle is executed."""

import argparse
import codecs
import json
import pickle
import re
from collections.abc import Set
from pathlib import Path
from typing import Any, NamedTuple, Self
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import torch
from torch import Tensor

from vitkd_cli.errors import UserError, expanded, first_line
from vitkd_cli.text import listed
from vitkd_cli.vit.dialects import in_timm_s_names

_AVERAGES = ("state_dict_ema", "model_ema", "ema")
# DINO's evaluation takes the teacher, which is the student's average.
_CONTAINERS = ("state_dict", "model", "module", "teacher", "student", *_AVERAGES)
_WRAPPERS = (  # modules that people wrap a ViT in
    *("module", "_orig_mod", "model", "backbone", "net", "network", "bottom_up", "encoder"),
    *("student", "teacher", "base_encoder", "momentum_encoder", "target_encoder"),
    *("vit", "deit", "dinov2", "dinov2_with_registers"),
)
_WRAPPED = rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*"
_STEM = re.compile(
    rf"({_WRAPPED})(?:patch_embed\.proj(?:ection)?|embeddings\.patch_embeddings\.projection|conv_proj)\.weight"
)
_PREFERRED = ("teacher.", "target_encoder.", "student.", "base_encoder.")  # of several in one file
_CORE: Any = getattr(np, "_core", None) or np.core  # NumPy 2 and 1
# Data beside the tensors that needs no code to be read.
_SAFE: list[Any] = [
    argparse.Namespace,
    np.ndarray,
    np.dtype,
    *{type(np.dtype(code)) for code in np.typecodes["AllInteger"] + np.typecodes["AllFloat"] + "?"},
    *(
        (getattr(_CORE.multiarray, name), f"numpy.{core}.multiarray.{name}")
        for name in ("scalar", "_reconstruct")
        for core in ("core", "_core")
    ),
]
# Configurations of other libraries: an empty object is read in their place, and nothing is imported.
_ASIDE = re.compile(
    r"(omegaconf|yacs|lightning|lightning_fabric|pytorch_lightning|mmengine|mmcv|pathlib|typing)\."
    r"|builtins\.(dict|list|tuple|int|float|str|bool)$|collections\.defaultdict$"
)


class StateDict(NamedTuple):
    """A weight file's tensors under timm's names, and a note on each choice that reading it took."""

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()


def read_weights(path: str | Path, *, use_ema: bool = False, own: Set[str] = frozenset()) -> StateDict:
    """Read a weight file's tensors under timm's names.

    Containers (``state_dict``, ``model``, DINO's ``teacher``) are opened, wrappers (``module.``,
    ``backbone.``, ``bottom_up.net.``) dropped, and the names of MMPretrain, transformers and torchvision
    turned into timm's. The index of a sharded file stands for all of its shards.

    Args:
        use_ema: take the averaged weights (``model_ema``, ``state_dict_ema``, ``ema``).
        own: the names that the model itself has. A file that mostly has these is read as it is: some models
            have an ``encoder.`` or projections ``q``, ``k`` and ``v`` of their own.
    """
    path = expanded(path)
    if path.is_dir():
        inside = next((p for p in (path / "student", path) if (p / "model.safetensors").is_file()), None)
        raise UserError(
            f"{path} is a folder, not a weight file",
            f"give {inside}/model.safetensors, or name the folder as the model"
            if inside
            else "give the file in it that holds the weights",
        )
    if not path.is_file():
        raise UserError(f"there is no weight file {path}", "check the path")
    if shard := re.search(r"-0*(\d+)-of-0*(\d+)(?=\.)", path.name):
        index = path.with_name(f"{path.name[: shard.start()]}{path.suffix}.index.json")
        raise UserError(
            f"{path} is shard {shard[1]} of {shard[2]}, not the whole of the weights",
            f"give {index.name}, with all shards beside it",
        )
    state, notes = _content(path), []
    entries = state if isinstance(state, dict) else {}
    held = [k for k in (_AVERAGES if use_ema else _CONTAINERS) if isinstance(entries.get(k), dict)]
    if use_ema and not held:
        raise UserError(
            f"{path} holds no averaged weights",
            "leave out --use-ema; a run of vitkd keeps its average in ema.safetensors beside the weights",
        )
    while held:
        if {"teacher", "student"} <= set(held) and held[0] == "teacher":
            notes.append(f"{path.name} holds a teacher and a student: the teacher was taken")
        entries = entries[held[0]]
        held = [k for k in _CONTAINERS if isinstance(entries.get(k), dict)]
    tensors = {str(key): value for key, value in entries.items() if isinstance(value, Tensor)}
    if odd := [key for key, tensor in tensors.items() if not _is_plain(tensor)]:
        notes.append(f"not used from the file, for they are sparse, quantised or complex: {listed(odd)}")
        tensors = {key: tensor for key, tensor in tensors.items() if key not in odd}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name", "give a state dict")
    if len(own & tensors.keys()) > len(tensors) / 2:
        return StateDict(tensors, tuple(notes))
    tensors, chosen = _unwrapped(tensors, path)
    notes += [f"{path.name} holds several models: {chosen} was taken"] if chosen else []
    return StateDict(in_timm_s_names(tensors), tuple(notes))


def _is_plain(tensor: Tensor) -> bool:
    """Does it hold a real number for each element?"""
    dense = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    return dense and not tensor.is_complex()


def weight_file_of(folder: Path) -> Path:
    """The file of a folder in timm's hub format that holds its weights."""
    names = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
    others = (path.name for path in sorted(folder.glob("*.safetensors")) if "-of-" not in path.name)
    found = next((folder / name for name in (*names, *others) if (folder / name).is_file()), None)
    if found is None:
        raise UserError(f"{folder} has no .safetensors weights", "save the model with safe serialization")
    return found


class _Empty:
    """In place of an object of another library: takes any arguments and state, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _content(path: Path) -> Any:
    """What a file holds; its first bytes tell the format, not its name."""
    try:
        with open(path, "rb") as file:
            head = file.read(512)
        text = head.removeprefix(codecs.BOM_UTF8).lstrip().lower()
        if text.startswith(b"version https://git-lfs"):
            raise UserError(
                f"{path} is a git-lfs pointer, not the weights", "git lfs pull fetches what it points to"
            )
        if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
            raise UserError(
                f"{path} is a web page, not the weights",
                "fetch the file itself: on the Hub its address has /resolve/ where the page's has /blob/",
            )
        if head[8:9] == b"{" and head[:1] != b"{":
            from safetensors.torch import load_file

            return load_file(path)
        if text.startswith(b"{"):
            return _shards(path)
        pickled = head.startswith((b"PK", b"\x80"))
        if path.suffix == ".safetensors":
            what = "PyTorch's pickle" if pickled else "of another format, or damaged"
            raise UserError(f"{path} is no safetensors file: it is {what}", "fetch it again")
        if not pickled:
            raise ValueError("it is of neither safetensors nor torch.save")
        strange, stored = [], False
        if head.startswith(b"PK"):
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            with ZipFile(path) as archive:  # what somebody packed again cannot be read where it lies
                stored = all(record.compress_type == ZIP_STORED for record in archive.infolist())
        aside = [(_Empty, name) for name in strange if _ASIDE.match(name)]
        with torch.serialization.safe_globals([*_SAFE, *aside]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=stored)
    except UserError:
        raise
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} needs Python's pickle to load, which could run any code; it was refused",
            "save its state_dict as .safetensors on a machine that trusts it",
        ) from None
    except Exception as problem:  # of safetensors, torch, zipfile, the system
        reason = first_line(problem)
        raise UserError(f"{path} is not a readable weight file: {reason}", "fetch it again") from None


def _shards(index: Path) -> dict[str, Any]:
    """The tensors of all files that the index of a sharded checkpoint names."""
    content = json.loads(index.read_text(encoding="utf-8-sig"))
    shard_of = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shard_of, dict) or not all(isinstance(name, str) for name in shard_of.values()):
        raise UserError(f"{index} is JSON without a weight_map, no weights", "give the weight file itself")
    tensors: dict[str, Any] = {}
    for name in sorted(set(shard_of.values())):
        shard = index.with_name(Path(name).name)
        if not shard.is_file():
            raise UserError(f"{index} names {shard.name}, which is not beside it", "fetch all of its shards")
        tensors |= _content(shard)
    if missing := [key for key in shard_of if key not in tensors]:
        raise UserError(f"{index} names {listed(missing)}, which its shards lack", "fetch all of them again")
    return tensors


def _unwrapped(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors without the prefix of the modules around the model; and which of several models it is."""
    prefixes = {found[1] for key in tensors if (found := _STEM.fullmatch(key))}
    if not prefixes:
        prefix = ""
        while (word := next(iter(tensors)).removeprefix(prefix).partition(".")[0]) in _WRAPPERS:
            if not all(key.startswith(f"{prefix}{word}.") for key in tensors):
                break
            prefix += f"{word}."
        prefixes = {prefix}
    ranked = [p for word in _PREFERRED for p in sorted(prefixes) if word in p]
    if len(prefixes) > 1 and not ranked:
        raise UserError(
            f"{path} holds several models: {listed(sorted(prefixes))}", "save the one that is meant by itself"
        )
    prefix = ranked[0] if ranked else next(iter(prefixes))
    own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    root = prefix.partition(".")[0] if len(prefixes) > 1 else ""
    for key, value in tensors.items():  # a head beside its backbone
        if not key.startswith(prefix) and key.startswith(root):
            own.setdefault(re.sub(f"^{_WRAPPED}", "", key), value)
    return own, prefix.rstrip(".") if len(prefixes) > 1 else ""
