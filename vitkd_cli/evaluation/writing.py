"""Tables of what models say of images, as CSV or Parquet, row after row."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from vitkd_cli.errors import UserError, require, writable
from vitkd_cli.files import whole_file
from vitkd_cli.text import csv_cell

_ROWS = 10_000  # of a row group


def check_table(path: str, flag: str, endings: tuple[str, ...], example: str) -> None:
    """Refuse a place or an ending that cannot be, before any work is done for it."""
    if Path(path).suffix not in endings:
        raise UserError(f"{flag} {path} is no {' or '.join(endings)}", f"{flag} {example}")
    if path.endswith(".parquet"):
        require("parquet", "pyarrow", purpose=f"{flag} with .parquet")
    writable(path, flag)


def write_table(path: Path, columns: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole ``.parquet`` or ``.csv``.

    Args:
        columns: name → type: ``str``, ``int``, ``float``, ``bool``, or ``list[float]`` of float32.
        rows: by column; None is an empty cell.
    """
    with whole_file(path) as beside:
        if path.suffix == ".parquet":
            _write_parquet(beside, columns, rows)
        else:
            with beside.open("w", newline="", encoding="utf-8") as file:
                print_csv(file, columns, rows)


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV, with every column that one of them has."""
    text = io.StringIO()
    print_csv(text, dict.fromkeys(key for row in rows for key in row), rows)
    return text.getvalue()


def print_csv(file: TextIO, columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """The same, row after row into an open file."""
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: csv_cell(value) for key, value in row.items()})


def _write_parquet(path: Path, columns: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    kinds = {
        str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_(),
        list[float]: pyarrow.list_(pyarrow.float32()),
    }  # fmt: skip
    schema = pyarrow.schema([(name, kinds[kind]) for name, kind in columns.items()])
    with parquet.ParquetWriter(path, schema) as writer:
        left = iter(rows)
        while some := [*islice(left, _ROWS)]:
            writer.write_table(pyarrow.Table.from_pylist(some, schema=schema))
