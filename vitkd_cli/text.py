"""Foreign text (class names, file names, licences) made harmless, once per format.

HTML has :func:`html.escape`, JSON and TOML their own writers; Rich is always told ``markup=False``, or given
:func:`rich.markup.escape`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>#|!~])")


def plain(text: Any) -> str:
    """One line for a terminal: line breaks, ESC and other control characters are written as escapes."""
    return "".join(
        char
        if char == " " or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def markdown(text: Any) -> str:
    """One line of Markdown that shows the text as it is, in a paragraph or a table's cell."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def yaml(text: Any) -> str:
    """A YAML scalar: JSON's strings are YAML's."""
    return json.dumps(str(text))


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet takes for a formula: a leading ``'``, as OWASP has it."""
    if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")):
        return f"'{value}"
    return value


def nfc(name: Any) -> str:
    """A name as it is compared: Macs spell ``é`` as two characters in file names, other systems as one."""
    return unicodedata.normalize("NFC", str(name))


def listed(names: Sequence[str]) -> str:
    """At most eight names, and how many more."""
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more
