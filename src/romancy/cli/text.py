"""Words and figures for a terminal: safe to print, short, and folded where a reader would break them."""

from __future__ import annotations

import re
import shlex
from datetime import datetime, timedelta
from functools import lru_cache
from unicodedata import category, east_asian_width

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: what terminals obey
    "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # unseen, or turns the text round
    "\u2028\u2029\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAK_AFTER = re.compile(r"[-_.:/](?=.)|(?<=[a-z])(?=[A-Z])")
_WORD = re.compile(" *[^ ]+")


def printable(text: str) -> str:
    """The text on one line, with escapes such as ``\\x1b`` for all that a terminal would obey or hide."""
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def printable_lines(text: str) -> str:
    """As :func:`printable`, but the lines stay lines, and tabs become spaces."""
    return "\n".join(printable(line.expandtabs(4)) for line in text.split("\n"))


def duration(span: timedelta) -> str:
    """How long, in at most six characters: ``350ms``, ``4.2s``, ``3m05s``, ``2h07m``, ``12d04h``, ``400d``."""
    # A clock that was set back may make spans negative.
    milliseconds = max(span // timedelta(milliseconds=1), 0)
    if milliseconds < 1_000:
        return f"{milliseconds}ms"
    if milliseconds < 60_000:
        return f"{milliseconds // 100 / 10:.1f}s"
    minutes, seconds = divmod(milliseconds // 1_000, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days >= 100:
        return f"{days}d"
    if days:
        return f"{days}d{hours:02}h"
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{seconds:02}s"


def full_time(time: datetime) -> str:
    """The local time to the second."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def exact_time(time: datetime) -> str:
    """The local time to the millisecond."""
    return time.astimezone().isoformat(" ", "milliseconds")[:23]


def short_time(time: datetime, now: datetime) -> str:
    """The local time in at most eleven characters: of the day, of the year, or the date."""
    time, now = time.astimezone(), now.astimezone()
    if time.date() == now.date():
        return time.strftime("%H:%M:%S")
    return time.strftime("%m-%d %H:%M" if time.year == now.year else "%Y-%m-%d")


def day_or_time(time: datetime, now: datetime) -> str:
    """The local time in at most eight characters: ``14:05:12`` today, else ``Nov 19``, else ``Nov 2025``."""
    time, now = time.astimezone(), now.astimezone()
    if time.date() == now.date():
        return time.strftime("%H:%M:%S")
    return time.strftime("%b %d" if time.year == now.year else "%b %Y")


def cell_len(text: str) -> int:
    """How many cells of a terminal the text takes, once it is printable: wide characters two, accents none."""
    return len(text) if text.isascii() else sum(map(_cells, text))


def fold(text: str, width: int) -> list[str]:
    """The text on lines of at most this many cells, broken between its parts where that wastes little."""
    lines: list[str] = []
    start = 0
    while (end := _fitting(text, start, width)) < len(text):
        # One character more, for a part never ends at the text's own end.
        breaks = [start + found.end() for found in _BREAK_AFTER.finditer(text[start : end + 1])]
        good = [place for place in breaks if (end - start) / 3 < place - start <= end - start]
        lines.append(text[start : good[-1] if good else end])
        start += len(lines[-1])
    return [*lines, text[start:]]


def wrap(text: str, width: int) -> list[str]:
    """The text on lines of at most this many cells, broken between words; words that are too long are folded."""
    if cell_len(text) <= width:
        return [text]
    lines: list[str] = []
    line = ""
    for word in _WORD.findall(text):
        if cell_len(line) + cell_len(word) <= width:
            line += word
            continue
        if line:
            lines.append(line)
        *full, line = fold(word.lstrip(" ") if lines else word, width)
        lines += full
    return [*lines, line]


def crop(text: str, cells: int, end: str = "…") -> str:
    """The text, cut off with an ellipsis where it is wider than this."""
    if cell_len(text) <= cells:
        return text
    room = cells - cell_len(end)
    return (text[: _fitting(text, 0, room)] if room > 0 else "") + end


def _fitting(text: str, start: int, width: int) -> int:
    """Where the line ends that begins at ``start``; it holds one character at least."""
    if text.isascii():
        return min(start + max(width, 1), len(text))
    room = width
    for place in range(start, len(text)):
        room -= _cells(text[place])
        if room < 0 and place > start:
            return place
    return len(text)


@lru_cache(4096)
def _cells(char: str) -> int:
    # The vowels and finals of Hangul join the consonant before them.
    if category(char) in {"Mn", "Me", "Cf"} or "\u1160" <= char <= "\u11ff":
        return 0
    return 2 if east_asian_width(char) in {"W", "F"} else 1


def command(*words: str) -> str:
    """A command of this program, quoted for a shell."""
    return shlex.join(["romancy", *words])
