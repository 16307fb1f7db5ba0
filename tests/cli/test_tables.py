"""Tables line up, at 80 columns and at 120."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from romancy import ErrorInfo, HistoryEvent, HistoryKind, Instance, Status
from romancy.cli.screen import UNBROKEN, Screen
from romancy.cli.tables import history_table, instance_table
from romancy.cli.text import cell_len

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


def lines_of(table: str, width: int) -> list[str]:
    """The table's lines, which keep to the width and end in no blank."""
    lines = table.split("\n")
    assert max(cell_len(line) for line in lines) <= width
    assert lines == [line.rstrip() for line in lines]
    return lines


def of_instances(instances: list[Instance], width: int, **screen: Any) -> list[str]:
    return lines_of(instance_table(instances, Screen(width, **screen), NOW), width)


def of_events(events: list[HistoryEvent], width: int, **screen: Any) -> list[str]:
    return lines_of(history_table(events, Screen(width, **screen), NOW), width)


@pytest.mark.parametrize(("width", "expected"), [(80, INSTANCES_AT_80), (120, INSTANCES_AT_120)])
def test_instances_line_up(width: int, expected: str) -> None:
    assert of_instances(INSTANCES, width) == expected.splitlines()


@pytest.mark.parametrize(("width", "expected"), [(80, HISTORY_AT_80), (120, HISTORY_AT_120)])
def test_history_lines_up(width: int, expected: str) -> None:
    assert of_events(EVENTS, width) == expected.splitlines()


@pytest.mark.parametrize("width", [20, 40, 60, 80, 109, 110, 120, 200])
def test_the_longest_names_keep_to_the_width(width: int) -> None:
    longest = an_instance("i" * 200, "w" * 200, Status.WAITING_FOR_MESSAGE, timedelta(days=40), None)
    of_instances([longest, *INSTANCES], width)
    event = an_event(1_000_000, HistoryKind.ACTIVITY_RETRY_SCHEDULED, "a" * 400, attempt=1_000, result="r" * 10_000)
    lines = of_events([event, *EVENTS], width)
    assert "r" * 400 not in "".join(lines)


def test_a_pipe_has_a_line_a_row_with_nothing_cut_off() -> None:
    event = an_event(1, HistoryKind.ACTIVITY_COMPLETED, "a" * 400, result="r" * 10_000)
    header, line = of_events([event], UNBROKEN)
    assert line.endswith("r" * 10_000 + '"')
    assert header.index("outcome") == line.index('"r')


def test_columns_line_up_where_only_ascii_is_known() -> None:
    header, first, *more = of_instances(INSTANCES, 120, encoding="ascii")
    assert all(line.isascii() for line in [first, *more])
    assert first.endswith(" 4.2s...")
    (wide,) = [line for line in more if line.startswith("\\u6771\\u4eac-")]
    assert wide.index("bill") == header.index("workflow")


def test_payloads_reach_no_terminal_raw() -> None:
    nasty = "\x1b[31m [red]x[/red] :smile: \u202e"
    instance = an_instance(nasty, nasty, Status.RUNNING, timedelta(), None)
    event = an_event(1, HistoryKind.ACTIVITY_FAILED, nasty, error=ErrorInfo("m.E", nasty))
    for lines in (of_instances([instance], 120), of_events([event], 200)):
        text = "\n".join(lines)
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "\\x1b[31m [red]x[/red] :smile: \\u202e" in text
