"""Long columns of a split, each as one array.

A worker is a copy of the process that shares its memory until one of them writes, and Python writes a
reference count into whatever it reads: lists of texts and numbers are copied bit by bit, arrays never.
"""

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class Names(Sequence[str]):
    """Texts, as their bytes in one array and where each begins and ends."""

    def __init__(self, names: Iterable[str]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in names:
            text += name.encode("utf-8", "surrogatepass")  # a file's name may be any bytes
            ends.append(len(text))
        self._text = np.array(text, np.uint8)
        self._places = np.stack([ends[:-1], ends[1:]], 1)  # [N, 2]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        start, end = self._places[index]
        return self._text[start:end].tobytes().decode("utf-8", "surrogatepass")

    def taken(self, indices: np.ndarray[Any, Any]) -> "Names":
        """Some of them, with the same bytes behind."""
        part = object.__new__(Names)
        part._text, part._places = self._text, self._places[indices]
        return part


def column_of(values: Iterable[Any]) -> Sequence[Any]:
    """Texts or whole numbers as an array that is read like a list; a range as it is; all else as a list."""
    if isinstance(values, range):
        return values
    listed = list(values)
    kinds = set(map(type, listed))
    if kinds == {str}:
        return Names(listed)
    return array("q", listed) if kinds == {int} else listed


def whole_numbers(column: Sequence[int]) -> np.ndarray[Any, Any]:
    """A column of them as int64; numpy alone would walk through a range."""
    if isinstance(column, range):
        return np.arange(column.start, column.stop, column.step)
    return np.asarray(column, np.int64)


def some_of(column: Sequence[Any], indices: np.ndarray[Any, Any]) -> Sequence[Any]:
    """Some values of a packed column.

    Args:
        indices: int64.
    """
    if isinstance(column, Names):
        return column.taken(indices)
    if isinstance(column, (range, array)):
        return array("q", whole_numbers(column)[indices].tobytes())
    return column_of(column[index] for index in indices)
