"""Load weights into a model, and report what did not fit."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from vitkd_cli.errors import UserError
from vitkd_cli.text import listed
from vitkd_cli.vit.construct import Outline, create
from vitkd_cli.vit.copying import copy_weights
from vitkd_cli.vit.spec import ViTSpec, describe
from vitkd_cli.vit.weights import read_weights
from vitkd_cli.vit.zoo import anatomy, zoo

_HEAD = re.compile(
    r"(?:.*\.)?(?:heads?|classifier|fc|linear|last_linear|(?:mlp|cls|classification)_head)"
    r"(?:\.(?:head|fc|classifier|linear|\d+))?"
)


class Loaded(NamedTuple):
    """A model with its weights, its facts, and notes on what was dropped, missing or resampled."""

    net: nn.Module
    spec: ViTSpec
    notes: tuple[str, ...] = ()


def load_pretrained(name: str, blank: Outline, title: str, *, pretrained: bool) -> Loaded:
    """A model with timm's own weights, or with random ones."""
    with timm_loading() as tried:
        net = create(name, blank.arguments, pretrained=pretrained)
    _check_finite(tried, name)
    return Loaded(net, describe(net, name=title, img_size=blank.size))


def load_file(name: str, blank: Outline, title: str, file: Path, *, use_ema: bool) -> Loaded:
    """A model with the weights of a file; head, position embedding and window tables adapt.

    Args:
        name: as ``timm.create_model`` takes it.
        blank: the model on the meta device, and its arguments.
        title: the model's name in messages.
    """
    net: Any = blank.net
    state, notes = read_weights(file, use_ema=use_ema, own=net.state_dict().keys())
    named = net.pretrained_cfg.get("classifier") or ()
    heads = (named,) if isinstance(named, str) else tuple(named)
    state, renamed = _with_its_head(state, heads, getattr(net, "head_hidden_size", None) or net.num_features)
    arguments = dict(blank.arguments)
    if _averages_patches(state, net):
        arguments["global_pool"] = "avg"
        renamed += ("patch tokens are averaged (global_pool=avg): the file has fc_norm in place of norm",)
    classes = _classes_in(state, heads)
    arguments.setdefault("num_classes", classes)  # a file without a head makes a model without one
    # A folder or address is a source, before which timm forgets the file.
    overlay = {"file": str(file), "num_classes": classes, "custom_load": False, "source": ""}
    before = net.pretrained_cfg.get("file")
    try:
        with timm_loading(state) as tried:
            net = create(name, {**arguments, "pretrained_cfg_overlay": overlay}, pretrained=True)
    except UserError:  # the model itself can be built: timm could not convert the weights
        _check_fit(state, net, describe(net, name=title), file, state)
        raise
    for config in (net.pretrained_cfg, getattr(net, "default_cfg", {})):
        if isinstance(config, dict):
            config |= {"file": before}
            if before is None:
                del config["file"]
    if arguments["num_classes"] == classes and _is_classifier(tried.tensors, heads, classes):
        net.tells_classes = True
    spec = describe(net, name=title, img_size=blank.size)
    _check_fit(tried.tensors, net, spec, file, state)
    _check_finite(tried, f"{file}")
    return Loaded(net, spec, (*notes, *renamed, *_load_report(state, tried.tensors, net)))


@dataclass
class Tried:
    """What timm's builder tried to load.

    Attributes:
        tensors: by the model's names; of timm's own weights none, whose memory is wanted.
        odd: the names of those that hold NaN or infinite values.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    odd: list[str] = field(default_factory=list)


@contextmanager
def timm_loading(given: dict[str, Tensor] | None = None) -> Iterator[Tried]:
    """Record what timm's builder tries to load, and copy it in without another copy in between.

    timm renames and resamples inside of its builder, by functions whose names differ by family, so the
    result is only seen there. Functions of torch and timm are replaced for the whole process meanwhile: two
    threads must not build at once.

    Args:
        given: what timm takes for the content of a file. Of this whatever fits is loaded, where timm
            would refuse the whole.

    Yields:
        What it tries, filled in when the model is built.
    """
    from timm.models import _builder

    tried = Tried()
    original, reader = nn.Module.load_state_dict, _builder.load_state_dict

    def load(net: nn.Module, state: Any, strict: bool = True, **options: Any) -> Any:
        own = {name: tensor.shape for name, tensor in net.state_dict().items()}
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if given is not None:
            tried.tensors.update(state)
        elif (strict and (missing or unexpected)) or any(
            state[k].shape != own[k] for k in own.keys() & state
        ):
            original(net, state, strict, **options)  # which says what does not fit
        tried.odd += copy_weights(net, state)
        return _IncompatibleKeys(missing, unexpected)

    nn.Module.load_state_dict = load  # type: ignore[method-assign, assignment]
    if given is not None:
        _builder.load_state_dict = lambda *_, **__: given
    try:
        yield tried
    finally:
        nn.Module.load_state_dict, _builder.load_state_dict = original, reader  # type: ignore[method-assign]


# The head ---------------------------------------------------------------------------------------------


def _classes_in(state: dict[str, Tensor], heads: tuple[str, ...]) -> int:
    """Classes of the head in a weight file; 0 if it holds none."""
    names = (*heads, "head")  # as Swin's authors call what timm renames
    found = (state[name] for head in names for name in (f"{head}.weight", f"{head}.bias") if name in state)
    return next((len(tensor) for tensor in found if tensor.ndim), 0)


def _is_classifier(state: dict[str, Tensor], heads: tuple[str, ...], classes: int) -> bool:
    """Whether the head in a weight file tells classes: it has a bias, which heads that embed lack.

    timm's converters of CLIP towers write a bias of zeros.
    """
    biases = [state.get(f"{head}.bias") for head in (*heads, "head")]
    return any(bias is not None and bias.shape == (classes,) and bool(bias.any()) for bias in biases)


def _with_its_head(
    state: dict[str, Tensor], heads: tuple[str, ...], width: int
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename the head of a state dict as the model has it, where its name and its shape show which it is.

    Args:
        heads: the model's names for its classifiers.
        width: of the features that the head reads.

    Returns:
        The tensors, and a note.
    """
    if not heads or any(f"{head}.weight" in state for head in (*heads, "head")):
        return state, ()
    found = []
    for key, weight in state.items():
        name = key.removesuffix(".weight")
        parent, _, last = name.rpartition(".")
        alone = not last.isdigit() or not any(
            other.startswith(f"{parent}.") and not other.startswith(f"{name}.") for other in state
        )
        bias = state.get(f"{name}.bias")
        fits = weight.ndim == 2 and weight.shape[1] == width and bias is not None and len(bias) == len(weight)
        if key.endswith(".weight") and fits and alone and _HEAD.fullmatch(name):
            found.append(name)
    if len(found) != 1:  # the load report names what is not used
        return state, ()
    renamed = {re.sub(rf"^{re.escape(found[0])}\.", f"{heads[0]}.", key): t for key, t in state.items()}
    classes = len(state[f"{found[0]}.weight"])
    return renamed, (f"its head of {classes} classes is called {found[0]} in the file",)


def _averages_patches(state: dict[str, Tensor], net: nn.Module) -> bool:
    """Whether the file's model averages patch tokens before its norm, where this one reads its class token.

    MAE's fine-tuned models do; timm's ViT can be built for either.
    """
    norms = (f"{norm}.weight" in state for norm in ("fc_norm", "norm"))
    return tuple(norms) == (True, False) and isinstance(getattr(net, "fc_norm", None), nn.Identity)


# The report -------------------------------------------------------------------------------------------


def _check_finite(tried: Tried, source: str) -> None:
    if tried.odd:
        raise UserError(
            f"{source}: {tried.odd[0]} holds NaN or infinite values",
            "the training that left it diverged, or the file is damaged: take an earlier one",
        )


def _check_fit(
    tried: dict[str, Tensor], net: nn.Module, spec: ViTSpec, file: Path, state: dict[str, Tensor]
) -> None:
    """Refuse another architecture's weights, naming the architecture that they look like."""
    if not (reasons := incompatible_keys(tried, net, spec)):
        return
    more = f" and {len(reasons) - 2} more" if len(reasons) > 2 else ""
    likely = looks_like(state)
    raise UserError(
        f"{file} does not fit {spec.name}: {'; '.join(reasons[:2])}{more}",
        f"it looks like {listed(likely, 3)}: name that architecture"
        if likely
        else "name the architecture that it was trained with",
    ) from None


def incompatible_keys(tried: dict[str, Tensor], net: nn.Module, spec: ViTSpec) -> list[str]:
    """Why these are another architecture's weights, one phrase per tensor; empty if they are not.

    Tensors of another shape count, and those inside the blocks that only one side has. Heads, norms and
    tokens that only one side has are notes: the model is usable without them.
    """
    blocks = tuple({block.path.rpartition(".")[0] + "." for block in spec.blocks})
    own, learned = net.state_dict(), dict(net.named_parameters())
    reasons = []
    for key, tensor in own.items():
        if key not in tried and key in learned and key.startswith(blocks):
            reasons.append(f"{key} is not in the file")
        elif key in tried and tried[key].shape != tensor.shape:
            reasons.append(f"{key} comes to {_shape(tried[key])} where the model has {_shape(tensor)}")
        elif key in tried and tensor.is_floating_point() and not tried[key].is_floating_point():
            reasons.append(f"{key} holds {str(tried[key].dtype).removeprefix('torch.')}, no weights")
    known = own.keys() | dict(net.named_buffers()).keys()  # timm once kept tables that it now computes
    return reasons + [
        f"{key} is not in the model" for key in tried if key.startswith(blocks) and key not in known
    ]


def _load_report(state: dict[str, Tensor], tried: dict[str, Tensor], net: nn.Module) -> tuple[str, ...]:
    """Which tensors were resized, unused or missing, one line per kind.

    Args:
        state: the file's tensors.
        tried: what timm made of them.
    """
    own = net.state_dict()

    def from_file(tensor: Tensor) -> bool:  # as it is, under this name or another; torch.equal minds shapes
        return any(torch.equal(tensor, other) for other in state.values())

    changed = [k for k in state if k in own and state[k].shape != own[k].shape]
    changed = [k for k in changed if k not in tried or not from_file(tried[k])]
    lines = {
        "resampled or renewed: ": ", ".join(changed),
        "not used from the file: ": listed([k for k in tried if k not in own]),
        "not in the file, left at random: ": listed([k for k in own if k not in tried and k not in changed]),
    }
    return tuple(title + keys for title, keys in lines.items() if keys)


def looks_like(state: dict[str, Tensor]) -> list[str]:
    """timm's ViTs with the same number of tensors and parameters, heads and positions aside."""
    found = anatomy(state)
    return [name for name, facts in zoo().items() if found.items() <= facts.items()]


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a number"
