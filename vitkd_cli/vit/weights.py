"""Weight files as people have them → tensors under timm's names, and what became of them in a model."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitkd_cli.errors import UserError
from vitkd_cli.vit.spec import ViTSpec
from vitkd_cli.vit.zoo import anatomy, zoo

_AVERAGES = ("state_dict_ema", "model_ema", "ema")
_CONTAINERS = ("state_dict", "model", "module", *_AVERAGES)
_PREFIXES = ("module.", "_orig_mod.", "backbone.", "model.", "student.model.")
# MMClassification's and MMPretrain's ViT, DeiT, DeiT III and BEiT → timm's, in this order.
_MMPRETRAIN = (
    (r"^layers\.", "blocks."),
    (r"^(blocks\.\d+\.)ln", r"\1norm"),
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"\.(?:attn|ffn)\.gamma([12])\.weight$", r".ls\1.gamma"),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
    (r"^ln1\.", "norm."),
    (r"^ln2\.", "fc_norm."),  # where patch tokens are averaged
    (r"^pre_norm\.", "norm_pre."),
    (r"^head\.(?:layers\.head|fc)\.", "head."),
    (r"^head\.layers\.head_dist\.", "head_dist."),
)


def read_weights(path: str | Path, *, use_ema: bool = False) -> dict[str, Tensor]:
    """A weight file's tensors under timm's names; no pickle is executed.

    Common containers (``state_dict``, ``model``, ``model_ema``) are opened, common prefixes
    (``module.``, ``_orig_mod.``, ``backbone.``) dropped, and MMPretrain's names turned into timm's.

    Args:
        use_ema: take the averaged weights (``model_ema``, ``state_dict_ema``, ``ema``).

    Raises:
        UserError: no such file, not a weight file, one that needs pickle, or one without an average.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        inside = next((p for p in (path / "student", path) if (p / "model.safetensors").is_file()), None)
        raise UserError(
            f"{path} is a folder, not a weight file",
            f"give {inside}/model.safetensors, or name the folder as the model"
            if inside
            else "give the file in it that holds the weights",
        )
    if not path.is_file():
        raise UserError(f"there is no weight file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            # timm's own training checkpoints carry their argparse.Namespace, which holds data only.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UserError(
            f"{path} needs Python's pickle to load, which could run any code; it was refused",
            "save its state_dict as .safetensors on a machine that trusts it",
        ) from None
    except Exception as problem:
        reason = str(problem).splitlines()[0] if str(problem) else type(problem).__name__
        raise UserError(f"{path} is not a readable weight file: {reason}") from None
    entries = state if isinstance(state, dict) else {}
    held = [k for k in (_AVERAGES if use_ema else _CONTAINERS) if isinstance(entries.get(k), dict)]
    if use_ema and not held:
        raise UserError(
            f"{path} holds no averaged weights",
            "leave out --use-ema; a run of vitkd keeps its average in ema.safetensors beside the weights",
        )
    entries = entries[held[0]] if held else entries
    tensors = {key: value for key, value in entries.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError(f"{path} holds no tensors by name", "give a state dict")
    if ours := {k: v for k, v in tensors.items() if k.startswith("student.model.")}:  # a checkpoint of ours
        tensors = ours
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in tensors)), None):
        tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    tensors = {k.removeprefix("backbone."): v for k, v in tensors.items()}  # beside a head without it
    if any(re.match(r"layers\.\d+\.ln1\.", key) for key in tensors):
        tensors = {_from_mmpretrain(k): v for k, v in tensors.items()}
    return tensors


def _from_mmpretrain(key: str) -> str:
    for pattern, name in _MMPRETRAIN:
        key = re.sub(pattern, name, key)
    return key


def classes_in_file(state: dict[str, Tensor], classifiers: str | Sequence[str] | None) -> int:
    """Classes of the head in a weight file; 0 if it holds none."""
    names = [classifiers] if isinstance(classifiers, str) else [*(classifiers or ())]
    names.append("head")  # as Swin's authors call what timm renames
    found = (state[name] for head in names for name in (f"{head}.weight", f"{head}.bias") if name in state)
    return next((len(tensor) for tensor in found), 0)


@contextmanager
def lenient_loading() -> Iterator[dict[str, Tensor]]:
    """Let timm's builder load what fits of a state dict, and tell what it tried to load.

    timm renames and resamples inside of its builder; only there is to be seen what a file comes to.

    Yields:
        The tensors by the model's names, filled in when the model is built.
    """
    tried: dict[str, Tensor] = {}
    original = nn.Module.load_state_dict

    def load(model: nn.Module, state: Any, *_: Any, **__: Any) -> Any:
        tried.update(state)
        own = model.state_dict()
        fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
        return original(model, fitting, strict=False)

    nn.Module.load_state_dict = load  # type: ignore[method-assign, assignment]
    try:
        yield tried
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]


def came_to(state: dict[str, Tensor], tried: dict[str, Tensor], model: nn.Module) -> tuple[str, ...]:
    """What of a weight file did not go into the model as it stood, a line a kind.

    Args:
        state: the file's tensors.
        tried: what timm made of them.
    """
    own = model.state_dict()

    def from_file(tensor: Tensor) -> bool:  # as it is, under this name or another; torch.equal minds shapes
        return any(torch.equal(tensor, other) for other in state.values())

    changed = [k for k in state if k in own and state[k].shape != own[k].shape]
    changed = [k for k in changed if k not in tried or not from_file(tried[k])]
    dropped = [k for k in tried if k not in own]
    missing = [k for k in own if k not in tried and k not in changed]
    notes = []
    if changed:
        notes.append("resampled or renewed: " + ", ".join(changed))
    if dropped:
        notes.append("not used from the file: " + _some(dropped))
    if missing:
        notes.append("not in the file, left at random: " + _some(missing))
    return tuple(notes)


def misfits(tried: dict[str, Tensor], model: nn.Module, spec: ViTSpec) -> list[str]:
    """Why these are another architecture's weights, a phrase a tensor; empty if they are not.

    A tensor of another shape tells, and one inside the blocks that only one side has. Heads, norms and
    tokens that only one side has do not: they are noted, and the model is usable without.
    """
    blocks = tuple({block.path.rpartition(".")[0] + "." for block in spec.blocks})
    own, learned = model.state_dict(), dict(model.named_parameters())
    reasons = []
    for key, tensor in own.items():
        if key not in tried and key in learned and key.startswith(blocks):
            reasons.append(f"{key} is not in the file")
        elif key in tried and tried[key].shape != tensor.shape:
            reasons.append(f"{key} comes to {_shape(tried[key])} where the model has {_shape(tensor)}")
    known = own.keys() | dict(model.named_buffers()).keys()  # timm once kept tables that it now computes
    return reasons + [
        f"{key} is not in the model" for key in tried if key.startswith(blocks) and key not in known
    ]


def another_architecture(file: str, name: str, state: dict[str, Tensor], reasons: list[str]) -> UserError:
    """Weights that do not fit: the first reasons, and the architecture that they look like."""
    more = f" and {len(reasons) - 2} more" if len(reasons) > 2 else ""
    likely = looks_like(state)
    return UserError(
        f"{file} does not fit {name}: {'; '.join(reasons[:2])}{more}",
        f"it looks like {_some(likely, 3)}: name that architecture"
        if likely
        else "name the architecture that it was trained with",
    )


def looks_like(state: dict[str, Tensor]) -> list[str]:
    """timm's ViTs with as many tensors and parameters as a weight file, heads and positions aside."""
    found = anatomy(state)
    return [name for name, facts in zoo().items() if found.items() <= facts.items()]


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
