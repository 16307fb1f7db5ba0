"""Words and figures for a terminal: safe to print, short, and folded where a reader would break them."""

from __future__ import annotations

import re
import shlex
from datetime import datetime, timedelta

from rich.cells import cell_len, chop_cells

_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # C0, DEL and C1: what terminals obey
    "\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"  # unseen, or turns the text round
    "\u2028\u2029\ud800-\udfff\U000e0000-\U000e007f]"
)
_BREAK_AFTER = re.compile(r"[-_.:/](?=.)|(?<=[a-z])(?=[A-Z])")


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


def fold(text: str, width: int) -> str:
    """The text on lines of at most this many cells, broken between its parts where that wastes little."""
    lines: list[str] = []
    while cell_len(text) > width:
        fitting = chop_cells(text, width)[0] or text[0]
        ends = [found.end() for found in _BREAK_AFTER.finditer(text) if len(fitting) / 3 < found.end() <= len(fitting)]
        end = ends[-1] if ends else len(fitting)
        lines.append(text[:end])
        text = text[end:]
    return "\n".join([*lines, text])


def crop(text: str, cells: int) -> str:
    """The text, cut off with an ellipsis where it is wider than this."""
    return text if cell_len(text) <= cells else chop_cells(text, cells - 1)[0] + "…"


def command(*words: str) -> str:
    """A command of this program, quoted for a shell."""
    return shlex.join(["romancy", *words])
