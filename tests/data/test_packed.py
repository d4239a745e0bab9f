"""Long columns of a split: read like lists, kept as arrays."""

from __future__ import annotations

from array import array

import numpy as np
import pytest

from vitkd_cli.data.images import Images
from vitkd_cli.data.packed import Names, column_of, some_of
from vitkd_cli.data.walk import in_order

ODD = ["a.jpg", "", "学生/é.png", "bytes that are no text \udcff", "lone \ud800"]


def test_names_are_read_like_a_list():
    names = Names(ODD)
    assert list(names) == ODD and names[-1] == ODD[-1] and names.index("a.jpg") == 0
    with pytest.raises(IndexError):
        names[len(ODD)]
    assert list(some_of(names, [3, 0, 0])) == [ODD[3], ODD[0], ODD[0]]
    assert list(Names([])) == list(names.taken([])) == []


@pytest.mark.parametrize("values", [ODD, [3, 1, 2], [(0, "a"), (1, "b")], range(4), []])
def test_a_packed_column_holds_what_it_was_given(values):
    column = column_of(values)
    assert list(column) == list(values) and [type(v) for v in column] == [type(v) for v in values]
    assert list(some_of(column, [0] if values else [])) == list(values)[:1]


def test_an_image_takes_few_bytes_and_no_object():
    """What a worker touches are arrays, which reading does not write to."""
    count = 1000
    images = Images(
        (f"/data/imagenet/train/n01440764/n01440764_{i}.JPEG" for i in range(count)), range(count)
    )
    names, labels = images.refs, images._labels
    assert isinstance(names, Names) and labels.dtype == np.int32
    parts = [*vars(names).values(), labels]
    assert all(isinstance(part, np.ndarray) for part in parts) and sum(p.nbytes for p in parts) < 100 * count
    assert isinstance(images.subset(range(3)).refs, Names)
    assert isinstance(Images([*range(count)], [0] * count).refs, array)
    assert isinstance(Images(range(count), [0] * count).refs, range)


def test_the_order_of_names_is_that_of_their_numbers():
    names = [
        "a10",
        "a9",
        "a",
        "a-1",
        "a1b",
        "a01",
        "b",
        "A2",
        "a1",
        "a٣",
        "a99999999999999999999",
        "10",
        "9x",
    ]

    def parts(name):
        import re

        found = re.split(r"(\d+)", name.lower())
        found[1::2] = map(int, found[1::2])
        return found

    assert in_order(names) == sorted(sorted(names), key=parts)
