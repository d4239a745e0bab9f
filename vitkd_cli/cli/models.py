"""``vitkd models``: the timm vision transformers that can teach or learn."""

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Any

from vitkd_cli.cli.flags import AsJson, command_of
from vitkd_cli.errors import UserError
from vitkd_cli.options import Option, Request

_COLUMNS = (
    *("name", "px", "blocks", "width", "grid", "heads", "prefix", "classes", "M", "weights, top-1"),
    *("MHA-out", "maps", "qkv", "ONNX"),
)
# Columns that a narrow terminal drops first; the page about one model has them.
_SPARE = ("ONNX", "prefix", "qkv", "maps", "MHA-out", "heads", "grid", "classes", "blocks", "weights, top-1")


@dataclass(frozen=True)
class ModelsRequest(Request):
    """Which models to list."""

    # fmt: off
    pattern: Annotated[str | None, Option("Part of a name, or a pattern such as 'vit_small*'. Unset: all.", argument=True)] = None
    pretrained: Annotated[bool, Option("Only those that have pretrained weights.")] = False
    # fmt: on


def _models(request: ModelsRequest, shown: AsJson) -> None:
    """List timm's vision transformers, and what can be read of each.

    - `vitkd models deit3`

    - `vitkd models "vit_small*" --pretrained`

    - `vitkd models swin_tiny_patch4_window7_224`: everything about one, its pretrained tags included

    Widths, grids (patches along a side) and heads change from stage to stage in hierarchical models.
    """
    from vitkd_cli.terminal import Terminal
    from vitkd_cli.vit.names import PUBLISHED_TOP1
    from vitkd_cli.vit.zoo import installed_timm, matching, onnx_of, timm_version

    if installed_timm() != timm_version():
        said = f"the table was read off timm {timm_version()}, and {installed_timm()} is installed"
        print(f"note: {said}: models that came since are not listed; their names are taken", file=sys.stderr)
    rows = matching(request.pattern)
    if request.pretrained:
        rows = {
            name: facts for name, facts in rows.items() if any(t is not None for t in facts["tags"].values())
        }
    if not rows:
        raise UserError(
            f"no model matches {request.pattern!r} and has pretrained weights", "leave out --pretrained"
        )
    listed = [
        {"name": name, **facts, "onnx": onnx_of(facts["family"]), "top1": PUBLISHED_TOP1.get(name, {})}
        for name, facts in rows.items()
    ]
    if shown.as_json:
        print(json.dumps(listed if len(listed) > 1 else listed[0]))
        return
    console = Terminal()
    if len(listed) == 1:
        _print_one(console, listed[0])
    else:
        _print_all(console, listed)


def _print_all(console: Any, listed: list[dict[str, Any]]) -> None:
    from vitkd_cli.terminal import Fitted

    rows = []
    for facts in listed:
        tags = [tag for tag, classes in facts["tags"].items() if classes is not None]
        best = f", best {max(facts['top1'].values()):.2f}" if facts["top1"] else ""
        row = (
            facts["name"],
            _size(facts["input_size"]),
            str(facts["depth"]),
            _range(facts["widths"]),
            _range([_size(grid) for grid in facts["grids"]]),
            _range(facts["heads"]),
            str(facts["prefix_tokens"]),
            str(facts["num_classes"] or "–"),
            f"{facts['parameters'] / 1e6:.1f}",
            f"{len(tags)}{best}" if tags else "–",
            *_what_works(facts),
        )
        rows.append(row)
    console.print(Fitted(_COLUMNS, rows, spare=_SPARE))
    console.say(
        "Block outputs can be read of every model; MHA-out (attention outputs), maps and qkv as the columns say. "
        "All about one: vitkd models NAME",
    )


def _print_one(console: Any, facts: dict[str, Any]) -> None:
    mha, maps, qkv, onnx = _what_works(facts)
    prefix = "with a class token" if facts["class_token"] else ""
    rows = {
        "name": facts["name"],
        "family": f"{facts['family']} ({facts['class']})",
        "images": f"{_size(facts['input_size'])} pixels",
        "blocks": facts["depth"],
        "widths": ", ".join(map(str, facts["widths"])),
        "grids": ", ".join(map(_size, facts["grids"])),
        "heads": ", ".join(map(str, facts["heads"])),
        "prefix tokens": f"{facts['prefix_tokens']} {prefix}".strip(),
        "classes": facts["num_classes"] or "none: its output is an embedding, or it has no head",
        "embedding": f"{facts['embed_dim']} wide" if facts["embed_dim"] else "none",
        "parameters": f"{facts['parameters'] / 1e6:.2f} M",
        "distillation head": "yes" if facts["distilled"] else "no",
        "block outputs": "yes",
        "attention outputs": mha,
        "after the norm": "yes" if facts["final"] else "no single sequence of patch tokens",
        "attention maps": maps,
        "q, k, v": qkv,
        "ONNX": {"yes": "yes", "unfused": "with fused attention off", "untried": "not tried"}[onnx],
    }
    console.facts(rows)
    if not facts["tags"]:
        console.print("no pretrained weights in timm")
        return
    tags = []
    for tag, classes in facts["tags"].items():
        shown = {None: "no weights", 0: "none"}.get(classes, str(classes))
        top1 = facts["top1"].get(tag)
        tags.append((tag or "(no tag)", shown, "" if top1 is None else f"{top1:.2f}"))
    console.table(("tag", "classes", "ImageNet-1k top-1"), tags, "pretrained")


def _what_works(facts: dict[str, Any]) -> tuple[str, str, str, str]:
    def part(count: int) -> str:
        return "yes" if count == facts["depth"] else f"{count} blocks" if count else "no"

    kinds = facts["maps"]
    maps = next(iter(kinds)) if len(kinds) == 1 else ", ".join(f"{n} {kind}" for kind, n in kinds.items())
    return part(facts["attention_outputs"]), maps, part(facts["qkv"]), facts["onnx"]


def _size(sides: list[int]) -> str:
    return str(sides[0]) if len(set(sides)) == 1 else "×".join(map(str, sides))


def _range(values: list[Any]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]}…{values[-1]}"


command = command_of("models", _models, ModelsRequest, AsJson)
