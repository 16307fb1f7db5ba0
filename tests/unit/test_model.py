"""Times as the database holds them, and the records that callers read."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from romancy.model import TERMINAL, ErrorInfo, HistoryKind, Status, from_micros, to_micros

zones = st.sampled_from([UTC, timezone(timedelta(hours=-9, minutes=-30)), timezone(timedelta(hours=14))])


@given(st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=zones))
def test_aware_time_survives_the_way_to_microseconds_and_back(moment: datetime) -> None:
    back = from_micros(to_micros(moment))
    assert back == moment
    assert back.tzinfo is UTC
    assert back.microsecond == moment.microsecond


@given(st.integers(to_micros(datetime(1, 1, 2, tzinfo=UTC)), to_micros(datetime(9999, 12, 30, tzinfo=UTC))))
def test_microseconds_survive_the_way_to_a_time_and_back(micros: int) -> None:
    assert to_micros(from_micros(micros)) == micros


def test_naive_time_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="has no time zone: use an aware datetime"):
        to_micros(datetime(2024, 1, 1))


def test_status_names_are_those_of_the_documents() -> None:
    assert [str(status) for status in Status] == [
        "pending",
        "running",
        "waiting_for_event",
        "waiting_for_timer",
        "waiting_for_message",
        "waiting_for_child",
        "compensating",
        "suspended",
        "completed",
        "failed",
        "cancelled",
    ]
    assert {status for status in Status if status.is_terminal} == TERMINAL
    assert {str(status) for status in TERMINAL} == {"completed", "failed", "cancelled"}


def test_history_kinds_keep_their_names() -> None:
    assert {
        "ActivityCompleted",
        "ActivityFailed",
        "TimerExpired",
        "WorkflowFailed",
        "WorkflowCancelled",
    } <= {str(kind) for kind in HistoryKind}


def test_records_are_frozen() -> None:
    info = ErrorInfo("a.B", "m")
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.message = "other"  # type: ignore[misc]
