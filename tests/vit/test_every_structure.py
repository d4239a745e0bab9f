"""One small model of every structure in the zoo, with real values: its signals are the model's own.

``structures.json`` names them, tests/zoo.py makes them; test_zoo.py proves that every name of timm has one of
these structures.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_zoo import STRUCTURES as FILE
from test_zoo import signature
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import small

from vitkd_cli.errors import UserError
from vitkd_cli.objective import Objective
from vitkd_cli.training.learner import Learner, Teacher
from vitkd_cli.training.rehearsal import rehearse
from vitkd_cli.vit.attention import with_heads
from vitkd_cli.vit.blocks import Block, transformer_blocks, watch
from vitkd_cli.vit.layout import split_tokens
from vitkd_cli.vit.model import Model
from vitkd_cli.vit.spec import BlockSpec, ViTSpec, describe
from vitkd_cli.vit.taps import EMBEDDING, FINAL, LOGITS, Tap, TappedViT, check_tap, features
from vitkd_cli.vit.weights import read_weights

STRUCTURES = {name: kinds for kinds, name in json.loads(FILE.read_text()).items()}
# Full size shows what small sizes would hide: deep, wide, and with all their stages.
WHOLE = ["davit_base_fl", "efficientvit_l1", "mvitv2_large", "sam2_hiera_tiny"]


@pytest.fixture(scope="module", params=sorted(STRUCTURES))
def structure(request) -> Model:
    """A small model of every structure; each is built once, its tests run behind each other."""
    return small(request.param)


def test_the_small_model_has_the_structure_of_its_name(structure):
    assert signature(structure.net, structure.spec) == STRUCTURES[structure.spec.name]


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
@torch.no_grad()
def test_at_full_size_too(name):
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    check_signals(model, describe(model, name=name))


def has(tap: Tap, spec: ViTSpec) -> bool:
    try:
        check_tap(tap, spec)
    except UserError:
        return False
    return True


def first_of_each_kind(model: nn.Module, spec: ViTSpec) -> list[int]:
    """A block of every class, layout and kind of map."""
    kinds: dict[Any, int] = {}
    for index, block in enumerate(spec.blocks):
        kind = (type(model.get_submodule(block.path)), block.form, block.maps, block.middle is None)
        kinds.setdefault(kind, index)
    return list(kinds.values())


def test_its_own_names_stay(structure, tmp_path):
    """Names by other hands are turned into timm's; the model's own are not."""
    state = {key: tensor.contiguous().clone() for key, tensor in structure.net.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    read = read_weights(tmp_path / "model.safetensors", own=state.keys())
    assert read.tensors.keys() == state.keys()
    assert not read.notes


@torch.no_grad()
def test_its_signals_are_its_own_numbers(structure):
    check_signals(structure.net, structure.spec)


def check_signals(model: nn.Module, spec: ViTSpec) -> None:
    """Every kind of tap in a block of every kind against what the model itself computes."""
    images = torch.randn(2, len(spec.mean), *spec.input_size)
    chosen = first_of_each_kind(model, spec)
    kinds = ("attention_output", "attention", "qkv")
    inner = [Tap(kind, i) for i in chosen for kind in kinds if has(Tap(kind, i), spec)]
    ends = [tap for tap in (LOGITS, EMBEDDING, FINAL) if has(tap, spec)]
    outputs = [features(i) for i in range(spec.depth)]
    with Recorded() as calls:
        signals = TappedViT(model, [*outputs, *inner, *ends], spec)(images)
    final = model.forward_features(images)

    if LOGITS in signals:
        assert torch.equal(signals[LOGITS], model(images))
        assert torch.equal(signals[EMBEDDING], model.forward_head(final, pre_logits=True))
    if FINAL in signals:
        assert torch.equal(signals[FINAL], split_tokens(final, spec.final)[1])
    as_timm_hands_them_out(model, spec, images, signals)
    blocks = parts_of(model, images)
    for tap in inner:
        block = spec.blocks[tap.block or 0]
        module = model.get_submodule(block.path)
        if tap.kind == "attention_output":
            compared = SILENCED.get(type(module).__name__, silenced)
            wanted, found = compared(model, spec, tap.block, blocks[block.path], images, signals[tap])
            torch.testing.assert_close(
                found, wanted, rtol=1e-4, atol=1e-4 * max(1.0, float(wanted.abs().max()))
            )
        elif tap.kind == "attention":
            is_used(signals[tap], module, block, calls)


def as_timm_hands_them_out(
    model: nn.Module, spec: ViTSpec, images: Tensor, signals: dict[Tap, Tensor]
) -> None:
    """What ``forward_intermediates`` returns for every block is that block's output, to the bit."""
    try:
        _, maps = model.forward_intermediates(images, norm=False)  # [B, D, H, W]
    except AttributeError:
        return
    if len(maps) == spec.depth and not spec.hierarchical:
        rows = [theirs.flatten(2).transpose(1, 2) for theirs in maps]
        assert all(torch.equal(a, signals[features(i)]) for i, a in enumerate(rows))


def parts_of(model: nn.Module, images: Tensor) -> dict[str, Block]:
    modules = dict(model.named_modules())
    with watch(modules) as trace:
        model.forward_features(images[:1])
    return {block.path: block for block in transformer_blocks(modules, trace)}


# What a block returns when its MLP says nothing is what its attention left: the residual stream between.


def silenced(
    model: nn.Module, spec: ViTSpec, index: int, block: Block, images: Tensor, tap: Tensor, *more: str
) -> tuple[Tensor, Tensor]:
    """The block's output with its MLP (and ``more`` of its children) silent, and the tap."""
    module, mlp = model.get_submodule(block.path), model.get_submodule(block.mlp)
    parent = model.get_submodule(block.mlp.rpartition(".")[0])
    quiet = list(parent) if isinstance(parent, nn.ModuleList) else [mlp]
    # Where the skip is inside the MLP's wrapper, what it wraps falls silent.
    quiet = [getattr(part, "m", None) or getattr(part, "main", None) or part for part in quiet]
    quiet += [getattr(module, name) for name in more]
    handles = [part.register_forward_hook(lambda _m, _a, out: torch.zeros_like(out)) for part in quiet]
    try:
        return TappedViT(model, [features(index)], spec)(images)[features(index)], tap
    finally:
        for handle in handles:
            handle.remove()


def post_norm(model, spec, index, block, images, tap):
    """The norm behind the MLP has a bias of its own."""
    return silenced(model, spec, index, block, images, tap, "norm2")


def scaled_skip(model, spec, index, block, images, tap):
    """MetaFormer scales the skip itself."""
    scale = model.get_submodule(block.path).res_scale2.scale.flatten()
    return silenced(model, spec, index, block, images, tap)[0], tap * scale


def gated_skip(model, spec, index, block, images, tap):
    """EfficientViM mixes the skip and the MLP by a learned share."""
    alpha = model.get_submodule(block.path).alpha.sigmoid()[3].flatten()
    return silenced(model, spec, index, block, images, tap)[0], (1 - alpha) * tap


def skips_the_attention(model, spec, index, block, images, tap):
    """EdgeNeXt adds its MLP to the block's input, not to what the attention left."""
    module, seen = model.get_submodule(block.path), {}
    handle = module.register_forward_hook(lambda _m, args, out: seen.update(taken=args[0], returned=out))
    model.forward_features(images)
    handle.remove()
    branch = module.mlp(module.norm(tap.unflatten(1, spec.blocks[index].grid))) * module.gamma  # [B, H, W, D]
    return seen["returned"], seen["taken"] + branch.permute(0, 3, 1, 2)


SILENCED: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "EvaBlockPostNorm": post_norm,
    "ResPostBlock": post_norm,
    "ResPostRelPosBlock": post_norm,
    "SwinTransformerV2Block": post_norm,
    "SwinTransformerV2CrBlock": post_norm,
    "MetaFormerBlock": scaled_skip,
    "EfficientViMBlock": gated_skip,
    "SplitTransposeBlock": skips_the_attention,
}


# Maps ------------------------------------------------------------------------------------------------


class Recorded(TorchFunctionMode):
    """Every fused attention call, and every softmax, of the forward that runs inside."""

    def __init__(self) -> None:
        super().__init__()
        self.fused: list[tuple[tuple[Tensor, ...], Tensor]] = []
        self.softmaxed: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.scaled_dot_product_attention:
            self.fused.append((args[:3], out))
        elif func in (F.softmax, torch.softmax, Tensor.softmax):
            self.softmaxed.append(out)
        return out


# These mix their maps before they use them; tests/vit/test_attention.py computes each by hand.
MIXED = ("TalkingHeadAttn", "Attention2d", "GPSA", "DiffAttention", "DiffParallelScalingBlock")


def is_used(map_: Tensor, module: nn.Module, block: BlockSpec, calls: Recorded) -> None:
    """A map times the values of a fused call is what that returned; else it is a softmax that was taken."""
    if any(type(part).__name__ in MIXED for part in module.modules()):
        return
    torch.testing.assert_close(map_.sum(-1), torch.ones(map_.shape[:-1]), atol=1e-4, rtol=0)
    if block.form == "unrolled":
        return  # Hiera's are put in another order
    if calls.fused:
        attended = [(value, out) for (_, _, value), out in calls.fused]
        candidates = [
            (with_heads(value, block.heads), with_heads(out, block.heads)) for value, out in attended
        ]
        assert any(
            value.shape[:-1] == (*map_.shape[:2], map_.shape[3])
            and torch.allclose(map_ @ value, out, atol=1e-4)
            for value, out in candidates
        )
    else:
        heads = [map_, *map_.unbind(1)]
        assert any(
            softmax.numel() == head.numel() and torch.equal(softmax.reshape(head.shape), head)
            for softmax in calls.softmaxed
            for head in heads
        )


# Order, and the whole road -----------------------------------------------------------------------------


@torch.no_grad()
def test_a_spot_shows_up_where_it_is(structure):
    model, spec = structure.net, structure.spec
    index = 0
    rows, columns = spec.blocks[index].grid
    assert rows >= 2 and columns >= 3, "the grid is too small to tell where something is"
    torch.manual_seed(0)
    plain = torch.randn(8, len(spec.mean), *spec.input_size)
    height, width = spec.input_size
    tapped = TappedViT(model, [features(index)], spec)
    before = tapped(plain)[features(index)]
    for row, column in ((0.2, 0.7), (0.8, 0.3)):
        spot = plain.clone()
        top, left = int(row * height), int(column * width)
        size = max(2, height // 16)
        spot[..., top - size // 2 : top + size // 2 + 1, left - size // 2 : left + size // 2 + 1] += 3.0
        change = (tapped(spot)[features(index)] - before).square().sum((0, 2)).view(rows, columns)
        heaviest = int(change.flatten().argmax())
        found = ((heaviest // columns + 0.5) / rows, (heaviest % columns + 0.5) / columns)
        assert math.dist(found, (row, column)) < 0.2 + 1.0 / rows, (found, (row, column))


def test_vitkd_reaches_its_first_layer(structure, teacher):
    model, spec = copy.deepcopy(structure.net), structure.spec
    # Some have a single block.
    formula = "vitkd" if spec.depth > 1 else "3e-5*mimic(blocks=0) + 3e-6*generate"
    objective = Objective(formula, spec, teacher.spec)
    learner = Learner(model, objective, spec)
    found = rehearse(
        learner,
        Teacher(teacher.built, objective.teacher_taps),
        size=spec.input_size,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    weights = ((path, p) for path, p in model.named_parameters() if p.ndim > 1)
    first = next(path for path, _ in weights if "token" not in path and "pos" not in path)
    assert first not in found.frozen


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher(small("vit_tiny_patch16_224", img_size=64, depth=4), frozenset())
