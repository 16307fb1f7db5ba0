"""Watches the connections of a measured program, without a change to the program.

On SQLite call :func:`watch_sqlite` before the program connects. What is learned is what the program's own connections
answer, not what its source says.
"""

import contextlib
import socket
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from peers.common import Result, durability, server_settings
from sqlalchemy import make_url

from romancy import App


class Watch(Protocol):
    """All connections of this process to its database.

    Attributes:
        statements: how many statements have been sent, if they are traced.
    """

    statements: int

    def durability(self, app: App) -> Result:
        """What the app's connections say of their durability; an error if that is not given.

        To be called while nothing is written.
        """
        ...


class SqliteWatch:
    """Learns of every connection that this process opens."""

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

    def durability(self, app: App) -> Result:
        """Asks every connection that is open, whoever opened it."""
        del app
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


def watch_sqlite(*, is_traced: bool = False) -> SqliteWatch:
    """Watch every SQLite connection that this process opens from now on."""
    watching = SqliteWatch(is_traced)
    sqlite3.connect = sqlite3.dbapi2.connect = watching.connect(sqlite3.connect)  # type: ignore[attr-defined]
    return watching


class ServerWatch:
    """Asks the app's writing connection for its settings; when traced, stands between it and the server and counts.

    Args:
        url: the database.
        is_traced: whether to count statements.

    Attributes:
        address: what to give to ``App``.
    """

    def __init__(self, url: str, is_traced: bool) -> None:
        self.statements = 0
        self.address = url
        found = make_url(url)
        self._kind = "postgresql" if found.get_backend_name() == "postgresql" else "mysql"
        if is_traced:
            self._target = (found.host or "127.0.0.1", found.port or (5432 if self._kind == "postgresql" else 3306))
            self._listener = socket.create_server(("127.0.0.1", 0))
            through = found.set(host="127.0.0.1", port=self._listener.getsockname()[1])
            if self._kind == "postgresql":
                through = through.update_query_dict({"sslmode": "disable", "gssencmode": "disable"})
            self.address = through.render_as_string(hide_password=False)
            threading.Thread(target=self._accept, daemon=True).start()

    def durability(self, app: App) -> Result:
        """Asks the connection that the group commits go over."""
        thread = app._life.store._writer
        assert thread is not None
        return thread.submit(
            lambda link: server_settings(self._kind, lambda query: link.execute(query).fetchone())
        ).result()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            is_statement = PostgresqlRequests() if self._kind == "postgresql" else MysqlRequests()
            for source, target, requests in ((client, server, is_statement), (server, client, None)):
                threading.Thread(target=self._pass_on, args=(source, target, requests), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, requests: "Requests | None") -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if requests is not None:
                    self.statements += requests.count_statements(data)
                target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Requests:
    """Finds the statements in what a client sends."""

    def __init__(self) -> None:
        self._rest = b""

    def count_statements(self, data: bytes) -> int:
        """How many statements end in these bytes."""
        self._rest += data
        found = 0
        while (size := self.next_size()) is not None and len(self._rest) >= size:
            found += self.is_statement()
            self._rest = self._rest[size:]
        return found

    def next_size(self) -> int | None:
        """How long the next message is; ``None``: not known yet."""
        raise NotImplementedError

    def is_statement(self) -> bool:
        """Whether the next message is one."""
        raise NotImplementedError


class PostgresqlRequests(Requests):
    """Simple queries, and executions of the extended protocol."""

    def __init__(self) -> None:
        super().__init__()
        self._has_started = False

    def next_size(self) -> int | None:
        if not self._has_started:
            return int.from_bytes(self._rest[:4], "big") if len(self._rest) >= 4 else None
        return 1 + int.from_bytes(self._rest[1:5], "big") if len(self._rest) >= 5 else None

    def is_statement(self) -> bool:
        if not self._has_started:
            self._has_started = True
            return False
        return self._rest[:1] in (b"Q", b"E")


class MysqlRequests(Requests):
    """Queries, executions of prepared statements, and pings."""

    def next_size(self) -> int | None:
        return 4 + int.from_bytes(self._rest[:3], "little") if len(self._rest) >= 5 else None

    def is_statement(self) -> bool:
        begins_exchange = self._rest[3] == 0
        return begins_exchange and self._rest[4] in (0x03, 0x0E, 0x17)
