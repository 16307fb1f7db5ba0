"""What a terminal, a pipe or a file can show: how wide, in which characters, in colour or not."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from typing import TextIO

UNBROKEN = sys.maxsize
"""The width of a pipe or a file: each row keeps to its line, so that other programs can pick lines."""
USUAL_WIDTH = 80

CODES = {
    "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Screen:
    """Where text goes.

    Attributes:
        width: cells a line, or ``UNBROKEN``.
    """

    width: int
    encoding: str = "utf-8"
    has_color: bool = False

    @classmethod
    def of(cls, stream: TextIO) -> Screen:
        """Of a stream as it is now. ``COLUMNS``, ``NO_COLOR`` and ``FORCE_COLOR`` of the environment overrule it."""
        return cls(_width(stream), stream.encoding or "utf-8", _has_color(stream))

    @property
    def ellipsis(self) -> str:
        """One character, or three dots where it is not known."""
        return self.show("…")

    def show(self, text: str) -> str:
        """The text with escapes for all that the encoding lacks. Done before measuring, so that columns line up."""
        if _can_encode(text, self.encoding):
            return text
        if not _can_encode("…", self.encoding):
            text = text.replace("…", "...")
        return text.encode(self.encoding, "backslashreplace").decode(self.encoding)

    def paint(self, text: str, style: str) -> str:
        """The text in a style such as ``bold red``. It must be one line."""
        if not (self.has_color and style and text):
            return text
        codes = ";".join(CODES[word] for word in style.split())
        return f"\x1b[{codes}m{text}\x1b[0m"


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def _width(stream: TextIO) -> int:
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    if not stream.isatty():
        return UNBROKEN
    try:
        return os.get_terminal_size(stream.fileno()).columns or USUAL_WIDTH
    except OSError:
        return USUAL_WIDTH


def _has_color(stream: TextIO) -> bool:
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") not in {"dumb", "unknown"}
