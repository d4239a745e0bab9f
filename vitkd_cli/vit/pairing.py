"""Which block of the teacher answers to which block of the student.

Depths differ, and hierarchical models change their grid on the way. Counted from the front, a block
answers to the same one; counted from the back, to the same one from the back; a share of the depth to
the same share. Where a model is hierarchical, a block answers to one of the teacher's stage whose
stride is nearest, at the same place in that stage.
"""

from __future__ import annotations

import math
import re

from vitkd_cli.errors import UserError
from vitkd_cli.vit.spec import ViTSpec

Blocks = tuple[int, ...] | str
BLOCKS_HELP = (
    'Blocks to compare: (0, 1), -1, "all", "first2", "last6", "-6:", shares of the depth such as "0.5, 1.0", '
    'or pairs by hand such as "0:0, 5:11" (student:teacher).'
)


def pair_blocks(
    blocks: Blocks | int, student: ViTSpec, teacher: ViTSpec, method: str
) -> list[tuple[int, int]]:
    """Pairs ``(student's block, teacher's block)``, both counted from 0, in the order asked for.

    Args:
        blocks: as a formula says it; :data:`BLOCKS_HELP` lists the forms.
        method: the term that asks, for messages.

    Raises:
        UserError: a block that a model does not have, nothing at all, or words that cannot be read.
    """
    if isinstance(blocks, int):
        blocks = (blocks,)
    if not isinstance(blocks, str):
        pairs = [_pair(block, student, teacher, method) for block in blocks]
    elif re.fullmatch(r"\s*-?\d+\s*:\s*-?\d+\s*(,\s*-?\d+\s*:\s*-?\d+\s*)*", blocks):
        pairs = []
        for pair in blocks.split(","):
            ours, theirs = (int(side) for side in pair.split(":"))
            pairs.append((block_index(ours, student, method), block_index(theirs, teacher, method)))
    else:
        pairs = _in_words(blocks.strip(), student, teacher, method)
    pairs = list(dict.fromkeys(pairs))
    if not pairs:
        raise UserError(f"{method}: blocks is empty", "blocks=(0, 1) are the first two")
    return pairs


def _in_words(words: str, student: ViTSpec, teacher: ViTSpec, method: str) -> list[tuple[int, int]]:
    def one(block: int) -> tuple[int, int]:
        return _pair(block, student, teacher, method)

    if words == "all":
        return [(block, _spread(block, student, teacher)) for block in range(student.depth)]
    if found := re.fullmatch(r"first(\d+)", words):
        return [one(block) for block in range(int(found[1]))]
    if found := re.fullmatch(r"last(\d+)", words):
        return [one(block) for block in range(-int(found[1]), 0)]
    if found := re.fullmatch(r"(-?\d+)?:(-?\d+)?", words):  # a slice, as Python has it
        start, stop = (None if side is None else int(side) for side in found.groups())
        from_the_end = (start or 0) < 0 or (start is None and (stop or 0) < 0)
        chosen = range(student.depth)[start:stop]
        return [one(block - student.depth if from_the_end else block) for block in chosen]
    shares = [share.strip() for share in words.split(",") if share.strip()]
    if shares and all(re.fullmatch(r"0?\.\d+|[01]|[01]\.\d*", share) for share in shares):
        pairs = []
        for share in map(float, shares):
            if not 0 <= share <= 1:
                raise UserError(f"{method}: {share:g} is no share of the depth", "shares lie in [0, 1]")
            ours, theirs = (round(share * (vit.depth - 1)) for vit in (student, teacher))
            pairs.append((ours, theirs))
        return pairs
    raise UserError(
        f"{method}: cannot read blocks {words!r}",
        'such as (0, 1), "all", "last6", "-6:", "0.5, 1.0", or pairs "0:0, 5:11"',
    )


def _pair(block: int, student: ViTSpec, teacher: ViTSpec, method: str) -> tuple[int, int]:
    ours = block_index(block, student, method)
    if not (student.hierarchical or teacher.hierarchical):
        return ours, block_index(block, teacher, method)
    stage, answering = _stages_of(ours, student, teacher)
    if block >= 0:
        return ours, answering[min(stage.index(ours), len(answering) - 1)]
    return ours, answering[max(stage.index(ours) - len(stage), -len(answering))]


def block_index(block: int, vit: ViTSpec, method: str) -> int:
    """A block counted from 0 or, if negative, from the end → counted from 0.

    Raises:
        UserError: the model has no such block.
    """
    if not -vit.depth <= block < vit.depth:
        raise UserError(
            f"{method}: {vit.name} has no block {block}, its depth is {vit.depth}",
            f"blocks are 0 to {vit.depth - 1}, or -1 to {-vit.depth} from the end",
        )
    return block % vit.depth


def _spread(block: int, student: ViTSpec, teacher: ViTSpec) -> int:
    """The teacher's block for one of "all": first to first, last to last, evenly between."""
    stage, answering = _stages_of(block, student, teacher)
    if len(stage) == 1:
        return answering[-1]
    return answering[round(stage.index(block) * (len(answering) - 1) / (len(stage) - 1))]


def _stages_of(block: int, student: ViTSpec, teacher: ViTSpec) -> tuple[list[int], list[int]]:
    """The student's blocks with this one's grid, and those of the teacher's whose grid is nearest to it.

    Of two that are equally near, the finer one. A flat model is one stage.
    """
    grid = student.blocks[block].grid
    if not (student.hierarchical or teacher.hierarchical):
        return list(range(student.depth)), list(range(teacher.depth))
    grids = sorted({other.grid for other in teacher.blocks}, reverse=True)
    nearest = min(grids, key=lambda other: abs(math.log(other[0] / grid[0])))
    return _with_grid(student, grid), _with_grid(teacher, nearest)


def _with_grid(vit: ViTSpec, grid: tuple[int, int]) -> list[int]:
    return [index for index, block in enumerate(vit.blocks) if block.grid == grid]
