"""Every timm ViT, none left out: found, described, and its taps wired to the very tensors they name.

Models are built without weights, on the meta device. ``python tests/vit/test_zoo.py --write`` walks over all
of timm's names and rewrites ``vitkd_cli/vit/zoo.json`` and ``docs/models.md``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from vitkd_cli.errors import UserError
from vitkd_cli.vit.spec import ViTSpec, describe
from vitkd_cli.vit.taps import Tap, TappedViT, check_tap
from vitkd_cli.vit.zoo import row, timm_version, zoo

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "models.md"
# A new timm release has more: walk again, and look at what it brought.
TIMM_NAMES, VIT_NAMES, SIGNATURES = 1371, 647, 87


def signature(model: torch.nn.Module, spec: ViTSpec) -> str:
    """What of a model's structure its taps depend on: its class, and its blocks' classes and children."""
    kinds = set()
    for block in spec.blocks:
        module = model.get_submodule(block.path)
        kinds.add(f"{type(module).__name__}({','.join(sorted(dict(module.named_children())))})")
    return " ".join([type(model).__name__, *sorted(kinds)])


def walk(name: str) -> tuple[dict[str, Any], str, int]:
    """A name's row, its signature, and how many of its block outputs timm hands out as well.

    Every tap that the row promises is read, and has the shape that its name says. What timm's
    ``forward_intermediates`` returns in the same forward is the very tensor of a tap: it shares its storage.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        spec = describe(model, name=name)
        facts = row(name, model, spec)
        taps = every_tap(spec)
        theirs: list[torch.Tensor] = []
        plain = model.forward_features

        def with_intermediates(images: torch.Tensor) -> torch.Tensor:
            options = {"norm": False, "output_fmt": "NLC" if spec.blocks[0].form == "NLC" else "NCHW"}
            try:
                final, theirs[:] = model.forward_intermediates(images, **options)
            except (AssertionError, NotImplementedError):  # it knows no such format
                return plain(images)
            return final

        model.forward_features = with_intermediates
        signals = TappedViT(model, taps, spec)(torch.zeros(1, len(spec.mean), *spec.input_size))
        for tap in taps:
            assert_shape(tap, tuple(signals[tap].shape), spec)
        kinds = Counter(tap.kind for tap in taps)
        assert kinds["features"] == spec.depth
        assert kinds["attention_output"] == facts["attention_outputs"]
        assert kinds["attention"] == spec.depth - facts["maps"].get("none", 0)
        assert kinds["qkv"] == facts["qkv"]
        ours = {signals[tap].untyped_storage()._cdata for tap in taps if tap.kind == "features"}
        return facts, signature(model, spec), sum(t.untyped_storage()._cdata in ours for t in theirs)


def every_tap(spec: ViTSpec) -> list[Tap]:
    """Every tap that a model has; the others are refused with a reason."""
    taps = [Tap(kind) for kind in ("logits", "embedding", "final", "final_prefix")]
    for index in range(spec.depth):
        taps += [Tap(kind, index) for kind in ("features", "prefix", "attention_output", "attention", "qkv")]
    there = []
    for tap in taps:
        with contextlib.suppress(UserError):
            check_tap(tap, spec)
            there.append(tap)
    return there


def assert_shape(tap: Tap, shape: tuple[int, ...], spec: ViTSpec) -> None:
    block = spec.blocks[tap.block or 0]
    patches = block.grid[0] * block.grid[1]
    tokens = patches + block.num_prefix_tokens
    match tap.kind:
        case "features" | "attention_output":
            assert shape == (1, patches, block.dim)
        case "prefix":
            assert shape == (1, block.num_prefix_tokens, block.dim)
        case "attention":
            images, heads, queries, keys = shape
            assert heads == block.heads
            if block.maps == "tokens":
                assert (images, queries, keys) == (1, tokens, tokens)
            elif block.maps == "reduced":
                assert (images, queries) == (1, tokens) and keys != tokens
            else:
                assert block.maps == "windows" and images * queries >= patches
        case "logits":
            assert spec.num_classes in (0, shape[-1]) and shape[0] == 1
        case "embedding":
            assert shape == (1, spec.embed_dim)
        case "final":
            assert shape == (1, spec.final_grid[0] * spec.final_grid[1], spec.final_dim)
        case "final_prefix":
            assert shape == (1, spec.num_prefix_tokens, spec.final_dim)
        case "qkv":
            assert shape[0] == 3 and shape[2] == block.heads and shape[1] * shape[3] >= tokens


def shards() -> list[list[str]]:
    names = list(zoo())
    return [names[start::16] for start in range(16)]


@pytest.mark.parametrize("shard", range(16))
def test_every_name_is_as_the_table_says(shard):
    if timm.__version__ != timm_version():
        pytest.skip(f"the table was read off timm {timm_version()}")
    warnings.simplefilter("ignore")
    for name in shards()[shard]:
        facts, _, _ = walk(name)
        assert facts == zoo()[name], name


def test_no_name_is_new():
    if timm.__version__ != timm_version():
        pytest.skip(f"the table was read off timm {timm_version()}")
    names = timm.list_models()
    assert len(names) == TIMM_NAMES, "timm brought other models: python tests/vit/test_zoo.py --write"
    assert len(zoo()) == VIT_NAMES and set(zoo()) <= set(names)
