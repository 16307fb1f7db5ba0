"""The threads that hold connections: when they make a new one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
