"""Every timm ViT, none left out: found, described, and its taps wired to the very tensors they name.

Models are built without weights, on the meta device. One name in 64 is walked over by default, others
every day, and all of them with ``VITKD_WALK=all``: what the names of one structure differ in is size, and
test_every_structure.py runs every structure. ``python tests/vit/test_zoo.py --write`` walks over all
of timm's names and rewrites ``vitkd_cli/vit/zoo.json``, ``tests/vit/structures.json`` (the smallest model of
each structure, which test_every_structure.py runs with real values) and ``docs/models.md``.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import warnings
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import get_arch_pretrained_cfgs

from vitkd_cli.errors import UserError
from vitkd_cli.vit.config import classes_of
from vitkd_cli.vit.spec import ViTSpec, describe
from vitkd_cli.vit.taps import Tap, TappedViT, check_tap
from vitkd_cli.vit.zoo import TABLE, anatomy, onnx_of, timm_version, zoo

STRUCTURES = Path(__file__).with_name("structures.json")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
# A new timm release has more: walk again, and look at what it brought.
TIMM_NAMES, VIT_NAMES = 1371, 647
SHARDS = 64
TODAY = [date.today().toordinal() % SHARDS]


def signature(model: torch.nn.Module, spec: ViTSpec) -> str:
    """What of a model's structure its taps depend on: its class, and those of its blocks and what attends.

    Each with the names of its children; of what attends, those that do something.
    """
    kinds = set()
    for block in spec.blocks:
        module, attention = model.get_submodule(block.path), model.get_submodule(block.attention)
        inside = [n for n, part in attention.named_children() if not isinstance(part, torch.nn.Identity)]
        names = ",".join(sorted(dict(module.named_children())))
        kinds.add(f"{type(module).__name__}({names}; {type(attention).__name__}({','.join(sorted(inside))}))")
    return " ".join([type(model).__name__, *sorted(kinds)])


def walk(name: str) -> tuple[dict[str, Any], str, int]:
    """A name's row, its signature, and how many of its block outputs timm hands out as well.

    Every tap that the row promises is read, and has the shape that its name says. What timm's
    ``forward_intermediates`` returns in the same forward is the very tensor of a tap: it shares its storage.
    Maps cost most, so one of each kind is made.
    """
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        spec = describe(model, name=name)
        facts = row(name, model, spec)
        every = every_tap(spec)
        costly = {
            (tap.kind, spec.blocks[tap.block].maps, spec.blocks[tap.block].grid): tap
            for tap in every
            if tap.kind in ("attention", "qkv")
        }
        taps = [t for t in every if t.kind not in ("attention", "qkv") or t in costly.values()]
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
        kinds = Counter(tap.kind for tap in every)
        assert kinds["features"] == spec.depth
        assert kinds["attention_output"] == facts["attention_outputs"]
        assert kinds["attention"] == spec.depth - facts["maps"].get("none", 0)
        assert kinds["qkv"] == facts["qkv"]
        ours = [signals[tap].untyped_storage()._cdata for tap in taps if tap.kind == "features"]
        met = [t.untyped_storage()._cdata for t in theirs]
        if len(met) == spec.depth and not spec.hierarchical and spec.blocks[0].form == "NLC":
            assert met == ours  # every block's, in order
        return facts, signature(model, spec), sum(storage in ours for storage in met)


def row(name: str, model: torch.nn.Module, spec: ViTSpec) -> dict[str, Any]:
    """A model's row of the table; :func:`vitkd_cli.vit.zoo.zoo` says what is in it."""
    blocks = spec.blocks
    kinds = [block.maps for block in blocks]
    tags = {full.partition(".")[2]: cfg for full, cfg in get_arch_pretrained_cfgs(name).items()}
    return {
        "family": type(model).__module__.rpartition(".")[2],
        "class": type(model).__name__,
        "depth": spec.depth,
        "widths": list(dict.fromkeys(block.dim for block in blocks)),
        "grids": [list(grid) for grid in dict.fromkeys(block.grid for block in blocks)],
        "heads": list(dict.fromkeys(block.heads for block in blocks)),
        "prefix_tokens": spec.num_prefix_tokens,
        "class_token": spec.class_token,
        "distilled": spec.distilled,
        "input_size": list(spec.input_size),
        "num_classes": spec.num_classes,
        "embed_dim": spec.embed_dim,
        "parameters": sum(p.numel() for p in model.parameters()),
        **anatomy(model.state_dict()),
        "tags": {tag: classes_of(cfg) if cfg.has_weights else None for tag, cfg in tags.items()},
        "final": spec.final_grid != (0, 0),
        "attention_outputs": sum(block.attention_output is not None for block in blocks),
        "maps": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)},
        "qkv": sum(block.qkv for block in blocks),
    }


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
        case "features":
            assert shape == (1, patches, block.dim)
        case "attention_output":
            assert shape == (1, patches, block.attention_dim)
        case "prefix":
            assert shape == (1, block.num_prefix_tokens, block.dim)
        case "attention":
            images, heads, queries, keys = shape
            assert heads == block.heads, (tap, shape, block)
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


pytestmark = pytest.mark.skipif(
    timm.__version__ != timm_version(), reason=f"the table was read off timm {timm_version()}"
)


@pytest.mark.parametrize("shard", range(SHARDS) if os.environ.get("VITKD_WALK") == "all" else TODAY)
def test_every_name_is_as_the_table_says(shard):
    warnings.simplefilter("ignore")
    structures = json.loads(STRUCTURES.read_text())
    for name in list(zoo())[shard::SHARDS]:
        facts, structure, _ = walk(name)
        assert facts == zoo()[name], name
        assert structure in structures, name


def test_no_name_is_new():
    names = timm.list_models()
    assert len(names) == TIMM_NAMES, "timm brought other models: python tests/vit/test_zoo.py --write"
    assert len(zoo()) == VIT_NAMES and set(zoo()) <= set(names)


def test_block_outputs_of_every_name():
    assert all(facts["depth"] >= 1 for facts in zoo().values())


def test_the_page_is_the_table_s():
    text = PAGE.read_text(encoding="utf-8")
    assert text == with_part(text, "families", families()), "python tests/vit/test_zoo.py --write"


# The page --------------------------------------------------------------------------------------------


def families() -> str:
    """A line a family: what can be read of how many of its names."""
    by_family: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for facts in zoo().values():
        by_family[facts["family"]].append(facts)
    lines = [
        "| family | names | blocks | block outputs | attention outputs | after the final norm | maps "
        "| q, k, v | ONNX |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for family, rows in sorted(by_family.items(), key=lambda item: (-len(item[1]), item[0])):
        depths = sorted({facts["depth"] for facts in rows})
        depth = f"{depths[0]}–{depths[-1]}" if len(depths) > 1 else str(depths[0])
        maps: Counter[str] = Counter()
        for facts in rows:
            maps.update(facts["maps"])
        shown = ", ".join(f"{kind} {_share(count, maps.total())}" for kind, count in maps.most_common())
        lines.append(
            f"| {family} | {len(rows)} | {depth} | all | {_of_blocks(rows, 'attention_outputs')} | "
            f"{_share(sum(facts['final'] for facts in rows), len(rows))} | {shown} | "
            f"{_of_blocks(rows, 'qkv')} | {onnx_of(family)} |"
        )
    return "\n".join(lines)


def _of_blocks(rows: list[dict[str, Any]], key: str) -> str:
    return _share(sum(facts[key] for facts in rows), sum(facts["depth"] for facts in rows))


def _share(count: int, of: int) -> str:
    return "all" if count == of else "none" if not count else f"{100 * count / of:.0f} %"


def walked(seconds: float, signatures: int, met: int, others: Counter[str]) -> str:
    """What the walk over all names found."""
    table = zoo()
    names, blocks = len(table), sum(facts["depth"] for facts in table.values())
    refused = defaultdict(list)
    for name, facts in table.items():
        if facts["attention_outputs"] < facts["depth"]:
            refused["attention output (attention and MLP run in parallel)"].append(name)
        if not facts["final"]:
            refused[
                "patch tokens after the final norm (it ends in class tokens, or in several sequences)"
            ].append(name)
        if set(facts["maps"]) == {"none"}:
            refused["attention map of its tokens in any block (over channels, linear, or pooled)"].append(
                name
            )
        if not facts["qkv"]:
            refused["queries, keys and values (its attention is not one fused call)"].append(name)
        if not facts["embed_dim"]:
            refused["embedding and logits (an encoder without a head)"].append(name)
    lines = [
        f"timm {timm.__version__} has {len(timm.list_models())} names. {names} of them are vision "
        f"transformers by the rule above, with {blocks:,} blocks and {signatures} different structures. The "
        f"walk took {seconds / 60:.1f} minutes on two processes.",
        "",
        "| | names | of all |",
        "|---|---|---|",
        f"| blocks found, and every block output of the shape that its block says | {names} | 100.0 % |",
    ]
    lines += [f"| no {what} | {len(who)} | {100 * len(who) / names:.1f} % |" for what, who in refused.items()]
    lines += [
        "",
        f"timm's own `forward_intermediates` hands out {met:,} of the {blocks:,} block outputs in a form in "
        "which nothing is copied; each of them is the very tensor that the tap returns, by its storage. "
        "The others are held to numbers: one small model of each structure runs with real values.",
        "",
        f"Not vision transformers by the rule: {sum(others.values())} names, such as "
        + ", ".join(f"{family} ({count})" for family, count in others.most_common(8))
        + ".",
    ]
    return "\n".join(lines)


def with_part(text: str, part: str, content: str) -> str:
    start, end = f"<!-- generated: {part} -->", f"<!-- end: {part} -->"
    before, found, rest = text.partition(start)
    assert found and end in rest, part
    return f"{before}{start}\n{content}\n{end}{rest.partition(end)[2]}"


def _walk(name: str) -> tuple[str, Any]:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        return name, walk(name)
    except UserError:
        return name, timm.models._registry._model_to_module[name]
    except Exception as problem:
        raise RuntimeError(f"{name}: {problem}") from problem


def write() -> None:
    """Walk over all of timm's names and write what was found."""
    start, models, met, others = time.time(), {}, 0, Counter[str]()
    structures: dict[str, str] = {}
    with ProcessPoolExecutor(2) as pool:
        walks = [pool.submit(_walk, name) for name in timm.list_models()]
        for done, each in enumerate(walks, 1):
            if each.exception() is not None:
                print(f"\n{each.exception()}", file=sys.stderr)
                continue
            name, found = each.result()
            if isinstance(found, str):
                others[found] += 1
            else:
                models[name], structure, shared = found
                smallest = structures.setdefault(structure, name)
                if models[name]["parameters"] < models[smallest]["parameters"]:
                    structures[structure] = name
                met += shared
            print(f"\r{done} {name:60}", end="", file=sys.stderr)
    lines = [f"  {json.dumps(name)}: {json.dumps(facts)}" for name, facts in models.items()]
    version = json.dumps(timm.__version__)
    TABLE.write_text(f'{{"timm": {version}, "models": {{\n' + ",\n".join(lines) + "\n}}\n", encoding="utf-8")
    STRUCTURES.write_text(json.dumps(structures, indent=1) + "\n")
    _fresh_table()
    text = PAGE.read_text(encoding="utf-8")
    text = with_part(text, "walk", walked(time.time() - start, len(structures), met, others))
    PAGE.write_text(with_part(text, "families", families()), encoding="utf-8")


def _fresh_table() -> None:
    from vitkd_cli.vit import zoo as room

    room._table.cache_clear()


if __name__ == "__main__":
    assert sys.argv[1:] == ["--write"], __doc__
    write()
