"""A TCP proxy that breaks connections, or lets their bytes vanish, when it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal

When = Literal["before", "after"]


class Proxy:
    """Stands between a client and a server; runs on threads of its own.

    Attributes:
        address: where it listens, as ``host:port``.
        cuts: how many connections it has broken.
        stalls: how many connections it has stalled by :meth:`stall_at`.
        requests: how many it has seen.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        self.stalls = 0
        self.requests = 0
        self.connections = 0
        self._lock = threading.Lock()
        self._left: int | None = None
        self._when: When = "before"
        self._containing = b""
        self._is_away = False
        self._stalls_next = False
        self._stalls_all = threading.Event()
        self._silent: set[socket.socket] = set()
        self._open: set[socket.socket] = set()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, request: int, when: When, containing: bytes = b"") -> None:
        """Break the connection of the N-th request from now.

        Args:
            request: counted over all connections.
            when: before the server gets the request, or after it has answered, unheard.
            containing: only requests with these bytes count, such as ``b"COMMIT"``.
        """
        with self._lock:
            self._left, self._when, self._containing, self._stalls_next = request, when, containing, False

    def stall_at(self, request: int, when: When) -> None:
        """Let all bytes of one connection vanish from its N-th request from now on; it stays open, and silent.

        Args:
            request: counted over all connections.
            when: the request vanishes, too; or only its answer, and all that follows.
        """
        with self._lock:
            self._left, self._when, self._containing, self._stalls_next = request, when, b"", True

    def stall_all(self) -> None:
        """Let all bytes vanish, of new connections as well; what is connected by then stays silent for ever."""
        self._stalls_all.set()

    def pass_on(self) -> None:
        """Serve new connections again."""
        self._stalls_all.clear()

    def spare(self) -> None:
        """Break nothing more."""
        with self._lock:
            self._left = None

    def go_away(self) -> None:
        """Break everything, and refuse whoever comes, until :meth:`come_back`."""
        self._is_away = True
        self._break_all()

    def come_back(self) -> None:
        """Let connections through again."""
        self._is_away = False

    def stall(self) -> None:
        """Let all bytes vanish that come over the connections of now, which stay open."""
        self._silent |= self._open

    def close(self) -> None:
        """Break everything and listen no more."""
        self._listener.close()
        self._break_all()

    def _break_all(self) -> None:
        for end in list(self._open):
            _close(end)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                server = self._reach_server()
                if server is None:
                    _close(client)
                    continue
                self._is_silent(client)
                self._open |= {client, server}
                threading.Thread(target=self._to_server, args=(client, server), daemon=True).start()
                threading.Thread(target=self._to_client, args=(client, server), daemon=True).start()

    def _reach_server(self) -> socket.socket | None:
        try:
            return None if self._is_away else socket.create_connection(self._target)
        except OSError:
            return None

    def _to_server(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := client.recv(1 << 20):
                if self._is_silent(client):
                    continue
                verdict = self._verdict(data)
                if verdict == "stall before":
                    self._silent.add(client)
                    continue
                if verdict == "stall after":
                    self._silent.add(client)
                if verdict == "before":
                    break
                if verdict == "after":
                    # Whoever reads the answers must not pass this one on.
                    _close(client)
                    server.sendall(data)
                    server.shutdown(socket.SHUT_WR)
                    return
                server.sendall(data)
        if self._is_silent(client):
            return  # nor does the server hear that its client has gone
        _close(client)
        _close(server)

    def _to_client(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(1 << 20):
                if self._is_silent(client):
                    continue
                with contextlib.suppress(OSError):
                    client.sendall(data)
        if self._is_silent(client):
            return
        _close(client)
        _close(server)

    def _is_silent(self, client: socket.socket) -> bool:
        if self._stalls_all.is_set():
            self._silent.add(client)
        return client in self._silent

    def _verdict(self, data: bytes) -> str | None:
        with self._lock:
            self.requests += 1
            if self._left is None or self._containing not in data:
                return None
            self._left -= 1
            if self._left > 0:
                return None
            self._left = None
            if self._stalls_next:
                self.stalls += 1
                return f"stall {self._when}"
            self.cuts += 1
            return self._when


def _close(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
