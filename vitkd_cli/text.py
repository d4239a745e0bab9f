"""Escape foreign text (class names, file names, licences), once per format.

HTML has :func:`html.escape`; JSON, TOML and YAML their own writers; Rich is always told ``markup=False``,
or given :func:`rich.markup.escape`.
"""

import hashlib
import html
import re
import shlex
import unicodedata
from collections.abc import Sequence
from pathlib import PureWindowsPath
from typing import Any

_PLACE = re.compile(
    r"""(?<![\w.:/\\)\]])(?:local-dir:|file:)?(?:~|[A-Za-z]:)?[\\/](?=\S)(?:[^"'`,;<>|\n]*[\\/])?([^"'`,;<>|\s\\/)]+)/?"""
)
_MARKDOWN = re.compile(r"([\\`*{}\[\]<>#|!~&]|(?<![^\W_])_|_(?![^\W_]))")  # vit_tiny is no emphasis


def plain(text: Any) -> str:
    """One line for a terminal: line breaks, ESC and other control characters are written as escapes."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(
        char
        if char == " " or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
        else char.encode("unicode_escape").decode()
        for char in text
    )


def markdown(text: Any) -> str:
    """One line of Markdown that shows the text as it is, in a paragraph or a table's cell."""
    return _MARKDOWN.sub(r"\\\1", plain(text))


def folder_name(text: str, longest: int = 60) -> str:
    """A short name for a folder that stands for a text.

    Where more is lost than spaces, and ``, `` or ``; `` between parts, it ends in the text's digest.
    """
    whole = re.sub("[,;] ", "_", text).replace(" ", "")
    short = re.sub(r"[^\w.+=-]+", "_", whole).strip("_.")
    if not short or (short == whole and len(short) <= longest):
        return short
    return f"{short[: longest - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def folder_in(name: str | None) -> tuple[str, str]:
    """A model's or dataset's name → ``local-dir:`` or ``wds:``, if it begins so, and the rest."""
    found = re.match(r"(?:local[-_]dir:|wds:)?", name or "", re.IGNORECASE)
    source = found[0] if found else ""
    return source, (name or "").removeprefix(source)


def last_name(place: str) -> str:
    """A file or folder without the folders above it, which tell on their owner; any other name whole."""
    path = PureWindowsPath(folder_in(place)[1])  # which splits at either slash
    local = path.root or place.startswith("~") or path.parts[:1] == ("..",)
    return path.name or place if local else place


def without_places(text: Any) -> str:
    """A text with each absolute path in it cut to its last name."""
    return _PLACE.sub(r"\1", str(text))


def code(text: Any) -> str:
    """A code span of Markdown, in a paragraph or a table's cell."""
    shown = plain(text).replace("|", r"\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    space = " " if "`" in shown else ""
    return f"{fence}{space}{shown}{space}{fence}"


def csv_cell(value: Any) -> Any:
    """One line that no spreadsheet takes for a formula: a leading ``'``, as OWASP has it."""
    if not isinstance(value, str):
        return value
    shown = plain(value)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown


def html_table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a notebook."""
    cells = "".join(f"<th>{html.escape(plain(title))}</th>" for title in titles)
    lines = ("".join(f"<td>{html.escape(plain(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def nfc(name: Any) -> str:
    """A name as it is compared: Macs spell ``é`` as two characters in file names, other systems as one."""
    return unicodedata.normalize("NFC", str(name))


def resuming(run: Any, flags: str = "") -> str:
    """The command that goes on with a run, as it is typed."""
    return f"vitkd distill --resume {shlex.quote(str(run))} {flags}".rstrip()


def in_bytes(count: float) -> str:
    """Such as ``3.2 GiB``."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:,.1f} GiB"


def listed(names: Sequence[str], most: int = 8) -> str:
    """Some names, and how many more."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
