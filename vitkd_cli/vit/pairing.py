"""Which block of the teacher is compared with which block of the student.

Depths differ, and hierarchical models change their grid on the way. Counted from the front, a block pairs
with the same one; counted from the back, with the same one from the back; a share of the depth with the
same share. Where a model is hierarchical, a block pairs with one of the teacher's stage whose stride is
nearest, at the same place in that stage.
"""

import math
import re
from typing import Annotated

from vitkd_cli.errors import UserError
from vitkd_cli.vit.spec import ViTSpec

Blocks = Annotated[
    tuple[int, ...] | str,
    'Blocks to compare: (0, 1), -1, "all", shares of the depth such as "0.5, 1.0", or pairs by hand such as '
    '"0:0, 5:11" (student:teacher).',
]


def pair_blocks(
    blocks: Blocks | int, student: ViTSpec, teacher: ViTSpec, method: str
) -> list[tuple[int, int]]:
    """Pairs ``(student's block, teacher's block)``, both counted from 0, in the order asked for.

    Args:
        blocks: as a formula writes it.
        method: the term that asks, for messages.
    """
    if isinstance(blocks, int):
        blocks = (blocks,)
    if not isinstance(blocks, str):
        pairs = [_pair(block, student, teacher, method) for block in blocks]
    elif blocks.strip() == "all":
        pairs = [(block, _evenly(block, student, teacher)) for block in range(student.depth)]
    else:
        pairs = [_read_pair(pair, blocks, student, teacher, method) for pair in blocks.split(",")]
    pairs = list(dict.fromkeys(pairs))
    if not pairs:
        raise UserError(f"{method}: blocks is empty", "blocks=(0, 1) are the first two")
    return pairs


def _read_pair(text: str, blocks: str, student: ViTSpec, teacher: ViTSpec, method: str) -> tuple[int, int]:
    """A pair of blocks by hand, ``5:11``, or a share of both depths, ``0.5``."""
    if pair := re.fullmatch(r"\s*(-?\d+)\s*:\s*(-?\d+)\s*", text):
        return block_index(int(pair[1]), student, method), block_index(int(pair[2]), teacher, method)
    if not re.fullmatch(r"\s*(0?\.\d+|[01]|[01]\.\d*)\s*", text):
        raise UserError(
            f"{method}: cannot read blocks {blocks!r}",
            '(0, 1) are the first two blocks, (-2, -1) the last two; or "all", shares "0.5, 1.0", or pairs '
            '"0:0, 5:11"',
        )
    if not 0 <= (share := float(text)) <= 1:
        raise UserError(f"{method}: {share:g} is no share of the depth", "shares lie in [0, 1]")
    return round(share * (student.depth - 1)), round(share * (teacher.depth - 1))


def _pair(block: int, student: ViTSpec, teacher: ViTSpec, method: str) -> tuple[int, int]:
    ours = block_index(block, student, method)
    if not (student.hierarchical or teacher.hierarchical):
        return ours, block_index(block, teacher, method)
    stage, paired = _stages_of(ours, student, teacher)
    if block >= 0:
        return ours, paired[min(stage.index(ours), len(paired) - 1)]
    return ours, paired[max(stage.index(ours) - len(stage), -len(paired))]


def block_index(block: int, vit: ViTSpec, method: str) -> int:
    """A block counted from 0 or, if negative, from the end → counted from 0."""
    if not -vit.depth <= block < vit.depth:
        raise UserError(
            f"{method}: {vit.name} has no block {block}, its depth is {vit.depth}",
            f"blocks are 0 to {vit.depth - 1}, or -1 to {-vit.depth} from the end",
        )
    return block % vit.depth


def _evenly(block: int, student: ViTSpec, teacher: ViTSpec) -> int:
    """The teacher's block for one of "all": first to first, last to last, evenly between."""
    stage, paired = _stages_of(block, student, teacher)
    if len(stage) == 1:
        return paired[-1]
    return paired[round(stage.index(block) * (len(paired) - 1) / (len(stage) - 1))]


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
