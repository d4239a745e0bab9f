"""Which block answers to which, in all the ways of saying it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vitkd_cli.errors import UserError
from vitkd_cli.vit.pairing import pair_blocks
from vitkd_cli.vit.spec import BlockSpec, ViTSpec


def vit(*grids: tuple[int, int]) -> ViTSpec:
    """A model of stages ``(depth, rows)``."""
    blocks = tuple(BlockSpec(f"b{rows}.{i}", 8, (rows, rows)) for depth, rows in grids for i in range(depth))
    return ViTSpec("vit", blocks, 0, (224, 224), (0.5,) * 3, (0.5,) * 3, 10)


FLAT12, FLAT24, SHALLOW = vit((12, 14)), vit((24, 16)), vit((3, 14))
SWIN_T, SWIN_S = vit((2, 56), (2, 28), (6, 14), (2, 7)), vit((2, 56), (2, 28), (18, 14), (2, 7))


@pytest.mark.parametrize(
    ("blocks", "student", "teacher", "pairs"),
    [
        ((0, 1), FLAT12, FLAT24, [(0, 0), (1, 1)]),
        (-1, FLAT12, FLAT24, [(11, 23)]),
        ((0, 1, -2, -1), FLAT12, FLAT24, [(0, 0), (1, 1), (10, 22), (11, 23)]),
        ((-2, -1), FLAT12, FLAT24, [(10, 22), (11, 23)]),
        ("1:3", FLAT12, FLAT24, [(1, 3)]),
        ("all", SHALLOW, FLAT24, [(0, 0), (1, 12), (2, 23)]),
        ("all", FLAT24, SHALLOW, [(i, round(i * 2 / 23)) for i in range(24)]),
        ("all", vit((1, 14)), FLAT12, [(0, 11)]),
        ("0.5, 1.0", FLAT12, FLAT24, [(6, 12), (11, 23)]),
        ("0:0, 5:11,-1:-1", FLAT12, FLAT24, [(0, 0), (5, 11), (11, 23)]),
        ((0, 0, -12), FLAT12, FLAT12, [(0, 0)]),  # said twice, compared once
        ((0, 1, -1), SWIN_T, SWIN_S, [(0, 0), (1, 1), (11, 23)]),
        ((4, 5, -3), SWIN_T, SWIN_S, [(4, 4), (5, 5), (9, 21)]),  # the third stage from both its ends
        ((0, -1), FLAT12, SWIN_S, [(0, 4), (11, 21)]),  # of the stage whose stride is the student's
        ((0, 1, 2, -1), SWIN_T, FLAT12, [(0, 0), (1, 1), (2, 0), (11, 11)]),
    ],
)
def test_pairs(blocks, student, teacher, pairs):
    assert pair_blocks(blocks, student, teacher, "mimic") == pairs


def test_all_of_a_hierarchical_pair_stays_within_stages():
    pairs = pair_blocks("all", SWIN_T, SWIN_S, "mimic")
    assert [ours for ours, _ in pairs] == list(range(12))
    assert all(SWIN_T.blocks[ours].grid == SWIN_S.blocks[theirs].grid for ours, theirs in pairs)
    assert pairs[4] == (4, 4) and pairs[9] == (9, 21)


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ((12,), "has no block 12, its depth is 12"),
        ((-13,), "has no block -13"),
        ("0:24", "has no block 24, its depth is 24"),
        ((), "blocks is empty"),
        ("5:3,", "cannot read blocks"),
        ("1.5", "1.5 is no share of the depth"),
        ("every other", "cannot read blocks 'every other'"),
        ("", "cannot read blocks"),
        ("first2", "cannot read blocks 'first2'"),
        ("last2", "cannot read blocks 'last2'"),
        ("-2:", "cannot read blocks '-2:'"),
    ],
)
def test_what_is_not_there_or_cannot_be_read(blocks, message):
    with pytest.raises(UserError, match=message) as refused:
        pair_blocks(blocks, FLAT12, replace(FLAT24, name="large"), "mimic")
    assert "cannot read" not in message or "(-2, -1) the last two" in refused.value.hint
