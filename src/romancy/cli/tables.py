"""Instances and histories as tables that line up, whatever the terminal's width."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import zip_longest

from romancy.cli.screen import Screen
from romancy.cli.text import (
    cell_len,
    crop,
    day_or_time,
    duration,
    exact_time,
    fold,
    full_time,
    printable,
    short_time,
    wrap,
)
from romancy.model import ErrorInfo, HistoryEvent, HistoryKind, Instance, Status

WIDE = 110
"""From this width on, times are shown in full, and two blanks part the columns instead of one."""
OUTCOME_LINES = 3
NARROWEST = 8
"""Cells that a text gets at least, however narrow the screen is."""

STATUS_STYLES = {
    Status.RUNNING: "cyan",
    Status.COMPENSATING: "yellow",
    Status.SUSPENDED: "bold yellow",
    Status.COMPLETED: "green",
    Status.FAILED: "bold red",
    Status.CANCELLED: "magenta",
}
KIND_STYLES = {
    HistoryKind.ACTIVITY_COMPLETED: "green",
    HistoryKind.ACTIVITY_RETRY_SCHEDULED: "yellow",
    HistoryKind.ACTIVITY_FAILED: "red",
    HistoryKind.WORKFLOW_FAILED: "bold red",
    HistoryKind.WORKFLOW_CANCELLED: "magenta",
}


@dataclass(frozen=True, slots=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: already printable.
    """

    text: str
    style: str = ""


def instance_table(instances: Sequence[Instance], screen: Screen, now: datetime) -> str:
    """One row each: id, workflow, status, start, and how long it took or has taken so far (``…``)."""
    rows = [
        (
            Cell(printable(instance.instance_id)),
            Cell(printable(instance.workflow_name)),
            Cell(instance.status, STATUS_STYLES.get(instance.status, "")),
            Cell(
                full_time(instance.created_at) if screen.width >= WIDE else day_or_time(instance.created_at, now), "dim"
            ),
            Cell(took(instance, now)),
        )
        for instance in instances
    ]
    # A UUID is 36 cells wide and should stay whole, for it is what people copy.
    concessions = [(0, 36), (2, 12), (1, 10), (0, 18), (1, 6)]
    return _table(("id", "workflow", "status", "started", "took"), rows, screen, concessions, right=(4,))


def history_table(events: Sequence[HistoryEvent], screen: Screen, now: datetime) -> str:
    """One row each: position, kind, activity id, attempt, time, and the result or the error in brief."""
    rows = [
        (
            Cell(str(event.seq), "dim"),
            Cell(event.kind, KIND_STYLES.get(event.kind, "")),
            Cell(printable(event.activity_id or "")),
            Cell(str(event.attempt or "")),
            Cell(exact_time(event.at) if screen.width >= WIDE else short_time(event.at, now), "dim"),
            Cell(_outcome(event, now)),
        )
        for event in events
    ]
    concessions = [(5, 28), (2, 16), (1, 13), (5, 16), (2, 8)]
    names = ("seq", "kind", "activity", "try", "at", "outcome")
    return _table(names, rows, screen, concessions, right=(0, 3), loose=5)


def took(instance: Instance, now: datetime) -> str:
    """How long from start to end, or, with ``…``, until now."""
    if instance.completed_at is not None:
        return duration(instance.completed_at - instance.created_at)
    return duration(now - instance.created_at) + "…"


def brief_error(error: ErrorInfo) -> str:
    """The error's class, without its module, and message, on one line."""
    kind = error.type.rpartition(".")[2]
    return printable(f"{kind}: {error.message}" if error.message else kind)


def _outcome(event: HistoryEvent, now: datetime) -> str:
    if event.error is not None:
        again = "" if event.next_attempt_at is None else f"again at {short_time(event.next_attempt_at, now)} after "
        return again + brief_error(event.error)
    if event.result is None and event.kind is not HistoryKind.ACTIVITY_COMPLETED:
        return ""
    return printable(json.dumps(event.result, ensure_ascii=False))


def _table(
    names: Sequence[str],
    rows: Sequence[Sequence[Cell]],
    screen: Screen,
    concessions: Sequence[tuple[int, int]],
    *,
    right: Sequence[int],
    loose: int | None = None,
) -> str:
    """A table no wider than the screen; where even its narrowest form is too wide, a block for each row.

    Args:
        concessions: which column gives way first, and down to which width.
        right: the columns whose figures end in line.
        loose: the column with prose: broken between words, cut off after about ``OUTCOME_LINES`` lines.
    """
    table = [[Cell(name, "bold") for name in names]]
    table += [[Cell(screen.show(cell.text), cell.style) for cell in row] for row in rows]
    gap = 2 if screen.width >= WIDE else 1
    room = screen.width - gap * (len(names) - 1)
    natural = [max(cell_len(row[n].text) for row in table) for n in range(len(names))]
    widths = _fit(natural, concessions, room)
    if sum(widths) > room:
        return _blocks(table, screen, loose)
    starts = [sum(widths[:n]) + gap * n for n in range(len(names))]
    lines: list[str] = []
    for row in table:
        parts = [_fold_cell(cell.text, widths[n], screen, is_loose=n == loose) for n, cell in enumerate(row)]
        for texts in zip_longest(*parts, fillvalue=""):
            ends = {n: widths[n] - cell_len(texts[n]) for n in right}
            pieces = [(starts[n] + ends.get(n, 0), text, row[n].style) for n, text in enumerate(texts)]
            lines.append(_line(pieces, screen))
    return "\n".join(lines)


def _blocks(table: Sequence[Sequence[Cell]], screen: Screen, loose: int | None) -> str:
    """For narrow screens: a line for each cell, with its column's name; what is empty is left out."""
    names, *rows = table
    start = max(cell_len(cell.text) for cell in names) + 2
    width = max(screen.width - start, NARROWEST)
    blocks: list[str] = []
    for row in rows:
        lines: list[str] = []
        for n, (name, cell) in enumerate(zip(names, row, strict=True)):
            if cell.text:
                first, *more = _fold_cell(cell.text, width, screen, is_loose=n == loose)
                lines.append(_line([(0, name.text, "dim"), (start, first, cell.style)], screen))
                lines += [_line([(start, text, cell.style)], screen) for text in more]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _fold_cell(text: str, width: int, screen: Screen, *, is_loose: bool) -> list[str]:
    if is_loose:
        return wrap(crop(text, OUTCOME_LINES * max(width - 4, 1), screen.ellipsis), width)
    return fold(text, width)


def _line(pieces: Iterable[tuple[int, str, str]], screen: Screen) -> str:
    """Texts at their places, with their styles, and no blank at the end."""
    line, at = "", 0
    for start, text, style in pieces:
        if text:
            line += " " * (start - at) + screen.paint(text, style)
            at = start + cell_len(text)
    return line


def _fit(natural: Sequence[int], concessions: Sequence[tuple[int, int]], room: int) -> list[int]:
    widths = list(natural)
    for column, least in concessions:
        excess = sum(widths) - room
        if excess > 0:
            widths[column] = min(widths[column], max(least, widths[column] - excess))
    return widths
