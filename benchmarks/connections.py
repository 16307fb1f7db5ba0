"""Watches the SQLite connections that a measured program opens, without a change to the program.

Call :func:`watch` before the program connects. What it learns is what the program's own connections answer,
not what its source says.
"""

import sqlite3
import time
from collections.abc import Callable
from typing import Any

from peers.common import Result, durability


class Watch:
    """All connections of this process, and what they are asked.

    Attributes:
        statements: how many statements have been run, since :meth:`trace` was switched on.
    """

    def __init__(self, is_traced: bool) -> None:
        self.connections: list[sqlite3.Connection] = []
        self.statements = 0
        self.first_seen: dict[str, float] = {}
        self._is_traced = is_traced
        self._wanted: tuple[str, ...] = ()

    def connect(self, genuine: Callable[..., sqlite3.Connection]) -> Callable[..., sqlite3.Connection]:
        """A ``sqlite3.connect`` that also notes the connection."""

        def connect(*args: Any, **kwargs: Any) -> sqlite3.Connection:
            kwargs["check_same_thread"] = False  # they are asked for their settings from the main thread
            connection = genuine(*args, **kwargs)
            self.connections.append(connection)
            if self._is_traced:
                connection.set_trace_callback(self._on_statement)
            return connection

        return connect

    def note_first(self, *prefixes: str) -> None:
        """Note in ``first_seen`` when the first statement with this beginning ran (``perf_counter``)."""
        self._wanted = prefixes

    def _on_statement(self, statement: str) -> None:
        self.statements += 1
        for prefix in self._wanted:
            if prefix not in self.first_seen and statement.startswith(prefix):
                self.first_seen[prefix] = time.perf_counter()

    def durability(self) -> Result:
        """What every open connection says of its durability; an error unless it is WAL and FULL.

        To be called while nothing is written.
        """
        answers = set()
        for connection in self.connections:
            try:
                journal_mode = connection.execute("PRAGMA journal_mode").fetchone()[0]
                synchronous = connection.execute("PRAGMA synchronous").fetchone()[0]
            except sqlite3.ProgrammingError:
                continue  # closed meanwhile
            answers.add((journal_mode, synchronous))
        if not answers:
            raise RuntimeError("no connection was open: nothing is known of durability")
        for answer in answers:
            result = durability(*answer)
        return result


def watch(*, is_traced: bool = False) -> Watch:
    """Watch every SQLite connection that this process opens from now on."""
    watching = Watch(is_traced)
    sqlite3.connect = sqlite3.dbapi2.connect = watching.connect(sqlite3.connect)  # type: ignore[attr-defined]
    return watching
