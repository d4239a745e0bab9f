"""What ``vitkd methods`` says of the usual pair, counted beforehand: loading every term takes seconds.

``python tests/cli/test_methods.py --write`` writes ``methods.json``, and the test holds the terms to it.
"""

import json
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

TEACHER, STUDENT = "deit3_small", "deit_tiny_distilled"  # every term fits these two
TABLE = Path(__file__).with_name("methods.json")
_PACKAGE = TABLE.parents[1]


def shipped_methods() -> dict[str, Any] | None:
    """The table: ``timm``, its version; ``rows`` by word; ``schedules``, each ``[form, what it is]``.

    None where installed packages bring words of their own.
    """
    if entry_points(group="vitkd.terms"):
        return None
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    for row in table["rows"].values():
        row["file"] = str(_PACKAGE / row["file"])
    return table


def ship_methods(table: dict[str, Any]) -> None:
    """Write the table as it is shipped, with the files' places in the package."""
    rows = {
        name: row | {"file": Path(row["file"]).relative_to(_PACKAGE).as_posix()}
        for name, row in table["rows"].items()
    }
    text = json.dumps(table | {"rows": rows}, indent=1, ensure_ascii=False)
    TABLE.write_text(f"{text}\n", encoding="utf-8")
