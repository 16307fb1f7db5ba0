"""The threads that hold connections: when they make a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from romancy.storage.threads import ConnectionThread, Link


class FakeLink:
    def __init__(self) -> None:
        self.is_stale = False
        self.is_closed = False

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Any:
        assert not self.is_closed

    def close(self) -> None:
        self.is_closed = True


def is_stale(link: Link) -> bool:
    assert isinstance(link, FakeLink)
    return link.is_stale


def test_stale_connection_is_closed_and_made_anew_before_the_next_job() -> None:
    made: list[FakeLink] = []

    def connect() -> FakeLink:
        made.append(FakeLink())
        return made[-1]

    thread = ConnectionThread("test", connect, lambda _: False, is_stale)
    thread.open().result()
    assert thread.submit(lambda link: link).result() is made[0]
    made[0].is_stale = True
    assert thread.submit(lambda link: link).result() is made[1]
    assert made[0].is_closed
    thread.end()
    assert thread.has_ended(5)
    assert len(made) == 2
    assert made[1].is_closed


class FaultyLoan:
    """Can't be finished, for a fault of ours."""

    def finish(self) -> None:
        raise ValueError("a fault")


def test_thread_outlives_a_loan_that_can_not_be_finished(caplog: pytest.LogCaptureFixture) -> None:
    made: list[FakeLink] = []

    def connect() -> FakeLink:
        made.append(FakeLink())
        return made[-1]

    thread = ConnectionThread("test", connect, lambda _: False)
    thread.open().result()
    assert thread.borrow(FaultyLoan()) is made[0]
    assert thread.borrow(FaultyLoan()) is None
    assert thread.submit(lambda link: link).result(5) is made[1]
    assert made[0].is_closed
    assert "could not be finished" in caplog.text
    assert thread.borrow(FaultyLoan()) is made[1]
    thread.give_back()
    thread.end()
    assert thread.borrow(FaultyLoan()) is None
    assert thread.has_ended(5)
