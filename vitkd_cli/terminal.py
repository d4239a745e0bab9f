"""The one way to a terminal: foreign text as it is, sentences wrapped at words, paths never."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from rich.console import Console
from rich.text import Text

from vitkd_cli.text import plain


class Terminal(Console):
    """Rich's console, to which every string is text: no markup, no emoji codes, no control characters.

    A pipe is as wide as its longest line wants to be.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **options)
        if not self.is_terminal:
            self.width = max(self.width, 200)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(plain, text.split("\n"))), **options)

    def say(self, text: str, style: str | None = None) -> None:
        """Print a sentence or a line of facts; a word longer than the line, such as a path, stays whole."""
        text = plain(text)
        if self.is_terminal:
            label = re.match(r" *\w* {2,}", text)  # "student  …": what follows stays in its column
            text = textwrap.fill(
                text,
                self.width,
                subsequent_indent=" " * len(label[0] if label else ""),
                break_long_words=False,
                break_on_hyphens=False,
            )
        self.print(text, style=style, soft_wrap=True)
