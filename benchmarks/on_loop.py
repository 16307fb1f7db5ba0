"""The floor's group commit on PostgreSQL without a thread: the event loop itself sends, and hears.

As Romancy does it there. The driver's own way is a call that blocks a thread; this is what its low level allows.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg
from group_commit import PostgresqlGroup, all_together
from peers.common import Result
from psycopg.pq import ConnStatus, ExecStatus

Write = tuple[str, tuple[Any, ...]]


class LoopWriter:
    """A group commit on the loop; every statement is prepared when it is first sent."""

    def __init__(self, group: PostgresqlGroup) -> None:
        self._group = group
        self._pgconn = group.connection.pgconn
        self._loop = asyncio.get_running_loop()
        self._names: dict[str, bytes] = {}
        self._waiting: list[tuple[Sequence[Write], asyncio.Future[None]]] = []
        self._in_flight: list[asyncio.Future[None]] = []
        self.commits = 0
        self._loop.add_reader(self._pgconn.socket, self._read)

    def write(self, *rows: Write) -> asyncio.Future[None]:
        """Write these rows; done once they are durable."""
        durable = self._loop.create_future()
        if not self._waiting:
            self._loop.call_soon(self._send)
        self._waiting.append((rows, durable))
        return durable

    def durability(self) -> Result:
        return self._group.durability()

    def _send(self) -> None:
        if self._in_flight or not self._waiting:
            return
        batch, self._waiting = self._waiting, []
        by_kind: dict[str, list[tuple[Any, ...]]] = {"start": [], "event": [], "end": []}
        for rows, _ in batch:
            for kind, values in rows:
                by_kind[kind].append(values)
        self._in_flight = [durable for _, durable in batch]
        sql, texts = all_together(by_kind["start"], by_kind["event"], by_kind["end"])
        values = [None if text is None else text.encode() for text in texts]
        self._pgconn.send_query_prepared(self._prepared(sql), values)
        while self._pgconn.flush():
            pass  # what no socket takes at once is not measured here

    def _prepared(self, sql: str) -> bytes:
        if sql not in self._names:
            first, *rest = sql.split("%s")
            numbered = "".join([first, *(f"${number}{part}" for number, part in enumerate(rest, 1))])
            name = f"floor_{len(self._names)}"
            self._group.connection.execute(f"PREPARE {name} AS {numbered}")
            self._names[sql] = name.encode()
        return self._names[sql]

    def _read(self) -> None:
        self._pgconn.consume_input()
        while not self._pgconn.is_busy():
            result = self._pgconn.get_result()
            if result is None:
                break
            if result.status != ExecStatus.COMMAND_OK or self._pgconn.status != ConnStatus.OK:
                raise psycopg.OperationalError(result.error_message)
        else:
            return
        if not self._in_flight:
            return
        landed, self._in_flight = self._in_flight, []
        self.commits += 1
        if self._waiting:
            self._send()
        for durable in landed:
            durable.set_result(None)
