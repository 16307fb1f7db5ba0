"""Tables line up, at 80 columns and at 120."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table

from romancy import ErrorInfo, HistoryEvent, HistoryKind, Instance, Status
from romancy.cli.tables import history_table, instance_table

NOW = datetime(2026, 11, 20, 14, 5, 12, tzinfo=UTC)
UUIDS = [f"01a1f963-d918-7000-817f-81d0151c630{n}" for n in range(9)]

pytestmark = pytest.mark.usefixtures("_utc")


def an_instance(instance_id: str, name: str, status: Status, age: timedelta, took: timedelta | None) -> Instance:
    created = NOW - age
    return Instance(
        instance_id=instance_id,
        run=1,
        workflow_name=name,
        status=status,
        input=None,
        result=None,
        error=None,
        worker_id=None,
        created_at=created,
        started_at=created,
        updated_at=created,
        completed_at=None if took is None else created + took,
        next_wake_at=None,
        claims=0,
        source_hash=None,
    )


def an_event(seq: int, kind: HistoryKind, activity_id: str | None, **more: Any) -> HistoryEvent:
    values: dict[str, Any] = {"attempt": 1, "input": None, "result": None, "error": None, "next_attempt_at": None}
    at = NOW - timedelta(minutes=5) + timedelta(milliseconds=120 * seq)
    return HistoryEvent(
        instance_id="x", run=1, seq=seq, kind=kind, activity_id=activity_id, name=None, at=at, **values | more
    )


INSTANCES = [
    an_instance(UUIDS[0], "process_order", Status.RUNNING, timedelta(seconds=4.2), None),
    an_instance("order-17", "process_order", Status.COMPLETED, timedelta(minutes=3), timedelta(milliseconds=350)),
    an_instance(UUIDS[1], "user_registration", Status.WAITING_FOR_TIMER, timedelta(hours=3, minutes=7), None),
    an_instance("東京-" + "7" * 50, "bill", Status.FAILED, timedelta(days=1), timedelta(minutes=61)),
    an_instance(UUIDS[2], "sync", Status.SUSPENDED, timedelta(days=400), None),
]
EVENTS = [
    an_event(1, HistoryKind.ACTIVITY_COMPLETED, "reserve_stock:1", result={"sku": "A1", "left": 3}),
    an_event(
        2,
        HistoryKind.ACTIVITY_RETRY_SCHEDULED,
        "charge_credit_card:1",
        error=ErrorInfo("shop.CardDeclinedError", "the bank says: insufficient funds\nask again"),
        next_attempt_at=NOW,
    ),
    an_event(3, HistoryKind.TIMER_EXPIRED, "sleep:1", attempt=0),
    an_event(4, HistoryKind.ACTIVITY_COMPLETED, "notify:1", attempt=3),
    an_event(5, HistoryKind.WORKFLOW_FAILED, None, attempt=0, error=ErrorInfo("builtins.ValueError", "")),
]

INSTANCES_AT_80 = """\
id                                   workflow       status       started    took
01a1f963-d918-7000-817f-81d0151c6300 process_order  running      14:05:07  4.2s…
order-17                             process_order  completed    14:02:12  350ms
01a1f963-d918-7000-817f-81d0151c6301 user_          waiting_for_ 10:58:12 3h07m…
                                     registration   timer
東京-7777777777777777777777777777777 bill           failed       Nov 19    1h01m
7777777777777777777
01a1f963-d918-7000-817f-81d0151c6302 sync           suspended    Oct 2025  400d…
"""
INSTANCES_AT_120 = """\
id                                                     workflow           status             started                took
01a1f963-d918-7000-817f-81d0151c6300                   process_order      running            2026-11-20 14:05:07   4.2s…
order-17                                               process_order      completed          2026-11-20 14:02:12   350ms
01a1f963-d918-7000-817f-81d0151c6301                   user_registration  waiting_for_timer  2026-11-20 10:58:12  3h07m…
東京-777777777777777777777777777777777777777777777777  bill               failed             2026-11-19 14:05:12   1h01m
77
01a1f963-d918-7000-817f-81d0151c6302                   sync               suspended          2025-10-16 14:05:12   400d…
"""
HISTORY_AT_80 = """\
seq kind              activity         try at       outcome
  1 ActivityCompleted reserve_stock:1    1 14:00:12 {"sku": "A1", "left": 3}
  2 ActivityRetry     charge_credit_     1 14:00:12 again at 14:05:12 after
    Scheduled         card:1                        CardDeclinedError: the bank
                                                    says: insufficient …
  3 TimerExpired      sleep:1              14:00:12
  4 ActivityCompleted notify:1           3 14:00:12 null
  5 WorkflowFailed                         14:00:12 ValueError
"""
HISTORY_AT_120 = """\
seq  kind                    activity              try  at                       outcome
  1  ActivityCompleted       reserve_stock:1         1  2026-11-20 14:00:12.120  {"sku": "A1", "left": 3}
  2  ActivityRetryScheduled  charge_credit_card:1    1  2026-11-20 14:00:12.240  again at 14:05:12 after
                                                                                 CardDeclinedError: the bank says:
                                                                                 insufficient funds\\nask again
  3  TimerExpired            sleep:1                    2026-11-20 14:00:12.360
  4  ActivityCompleted       notify:1                3  2026-11-20 14:00:12.480  null
  5  WorkflowFailed                                     2026-11-20 14:00:12.600  ValueError
"""


def rendered(table: Table, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(cell_len(line) <= width for line in text.splitlines())
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


@pytest.mark.parametrize(("width", "expected"), [(80, INSTANCES_AT_80), (120, INSTANCES_AT_120)])
def test_instances_line_up(width: int, expected: str) -> None:
    assert rendered(instance_table(INSTANCES, width, NOW), width) == expected


@pytest.mark.parametrize(("width", "expected"), [(80, HISTORY_AT_80), (120, HISTORY_AT_120)])
def test_history_lines_up(width: int, expected: str) -> None:
    assert rendered(history_table(EVENTS, width, NOW), width) == expected


@pytest.mark.parametrize("width", [60, 80, 109, 110, 120, 200])
def test_the_longest_names_keep_to_the_width(width: int) -> None:
    longest = an_instance("i" * 200, "w" * 200, Status.WAITING_FOR_MESSAGE, timedelta(days=40), None)
    rendered(instance_table([longest, *INSTANCES], width, NOW), width)
    event = an_event(1_000_000, HistoryKind.ACTIVITY_RETRY_SCHEDULED, "a" * 400, attempt=1_000, result="r" * 10_000)
    text = rendered(history_table([event, *EVENTS], width, NOW), width)
    assert "r" * 400 not in text.replace("\n", "")


def test_payloads_reach_no_terminal_raw_and_are_no_markup() -> None:
    nasty = "\x1b[31m [red]x[/red] :smile: \u202e"
    instance = an_instance(nasty, nasty, Status.RUNNING, timedelta(), None)
    event = an_event(1, HistoryKind.ACTIVITY_FAILED, nasty, error=ErrorInfo("m.E", nasty))
    for text in (
        rendered(instance_table([instance], 120, NOW), 120),
        rendered(history_table([event], 200, NOW), 200),
    ):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b[31m [red]x[/red] :smile: \\u202e" in text
