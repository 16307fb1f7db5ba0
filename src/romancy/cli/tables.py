"""Instances and histories as tables that line up, whatever the terminal's width."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from romancy.cli.text import crop, day_or_time, duration, exact_time, fold, full_time, printable, short_time
from romancy.model import ErrorInfo, HistoryEvent, HistoryKind, Instance, Status

WIDE = 110
"""From this width on, times are shown in full, and two blanks part the columns instead of one."""
OUTCOME_LINES = 3

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


def instance_table(instances: Sequence[Instance], width: int, now: datetime) -> Table:
    """One row each: id, workflow, status, start, and how long it took or has taken so far (``…``)."""
    rows = [
        (
            Cell(printable(instance.instance_id)),
            Cell(printable(instance.workflow_name)),
            Cell(instance.status, STATUS_STYLES.get(instance.status, "")),
            Cell(full_time(instance.created_at) if width >= WIDE else day_or_time(instance.created_at, now), "dim"),
            Cell(took(instance, now)),
        )
        for instance in instances
    ]
    # A UUID is 36 cells wide and should stay whole, for it is what people copy.
    concessions = [(0, 36), (2, 12), (1, 10), (0, 18), (1, 6)]
    return _table(("id", "workflow", "status", "started", "took"), rows, width, concessions, right=(4,))


def history_table(events: Sequence[HistoryEvent], width: int, now: datetime) -> Table:
    """One row each: position, kind, activity id, attempt, time, and the result or the error in brief."""
    rows = [
        (
            Cell(str(event.seq), "dim"),
            Cell(event.kind, KIND_STYLES.get(event.kind, "")),
            Cell(printable(event.activity_id or "")),
            Cell(str(event.attempt or "")),
            Cell(exact_time(event.at) if width >= WIDE else short_time(event.at, now), "dim"),
            Cell(_outcome(event, now)),
        )
        for event in events
    ]
    concessions = [(5, 28), (2, 16), (1, 13), (5, 16), (2, 8)]
    names = ("seq", "kind", "activity", "try", "at", "outcome")
    return _table(names, rows, width, concessions, right=(0, 3), loose=5)


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
    width: int,
    concessions: Sequence[tuple[int, int]],
    *,
    right: Sequence[int],
    loose: int | None = None,
) -> Table:
    """A table no wider than ``width``.

    Args:
        concessions: which column gives way first, and down to which width.
        right: the columns whose figures end in line.
        loose: the column with prose: broken between words, cut off after about ``OUTCOME_LINES`` lines.
    """
    natural = [max(cell_len(text) for text in [name, *[row[n].text for row in rows]]) for n, name in enumerate(names)]
    gap = 2 if width >= WIDE else 1
    widths = _fit(natural, concessions, width - gap * (len(names) - 1))
    table = Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="bold")
    for n, (name, cells) in enumerate(zip(names, widths, strict=True)):
        table.add_column(name, width=cells, justify="right" if n in right else "left", overflow="fold")
    for row in rows:
        texts = [
            crop(cell.text, OUTCOME_LINES * (widths[n] - 4)) if n == loose else fold(cell.text, widths[n])
            for n, cell in enumerate(row)
        ]
        table.add_row(*[Text(text, style=cell.style) for text, cell in zip(texts, row, strict=True)])
    return table


def _fit(natural: Sequence[int], concessions: Sequence[tuple[int, int]], room: int) -> list[int]:
    widths = list(natural)
    for column, least in concessions:
        excess = sum(widths) - room
        if excess > 0:
            widths[column] = min(widths[column], max(least, widths[column] - excess))
    return widths
