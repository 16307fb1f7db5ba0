"""The processes of one run: three workers and a client, started again whenever they have ended."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

from tests.databases import Database

from torture.folder import Folder

WORKERS = ("worker-1", "worker-2", "worker-3")
CLIENT = "client"
RESTART_WAIT_S = 0.3
LONGEST_STOP_S = 30.0

# Each process is forked from one that has imported everything, and done nothing else.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(
    ["torture.worker", "torture.client", "aiosqlite", "sqlalchemy.dialects.postgresql.psycopg",
     "sqlalchemy.dialects.mysql.asyncmy", "sqlalchemy.dialects.mysql.pymysql"]
)  # fmt: skip


class Crew:
    """Keeps the processes running; ends, stops and wakes single ones.

    Args:
        address_of: the database as a process of this name reaches it.
        folder: of the run.
        seed: of the client's jobs.

    Attributes:
        exits: how processes have ended that nobody had killed, by name and exit code.
    """

    def __init__(self, address_of: Callable[[str], Database], folder: Folder, seed: int) -> None:
        self._address_of = address_of
        self._folder = folder
        self._seed = seed
        self._processes: dict[str, ForkServerProcess] = {}
        self._due: dict[str, float] = {}
        self._ended_by_us: set[int] = set()
        self.exits: list[tuple[str, int]] = []

    def start(self) -> None:
        """Start all of them."""
        for name in (*WORKERS, CLIENT):
            self._start(name)

    def look_after(self) -> None:
        """Start again what has ended, after a little while; but a client that has done its work."""
        for name, process in list(self._processes.items()):
            if process.is_alive():
                continue
            if process.pid not in self._ended_by_us and process.exitcode not in (0, os.EX_TEMPFAIL):
                self.exits.append((name, process.exitcode or 0))
            if name == CLIENT and process.exitcode == 0:
                continue
            del self._processes[name]
            self._due[name] = time.monotonic() + RESTART_WAIT_S
        for name, due in list(self._due.items()):
            if time.monotonic() >= due:
                del self._due[name]
                self._start(name)

    @property
    def is_client_done(self) -> bool:
        """Whether the client has ended by itself, all its jobs done."""
        client = self._processes.get(CLIENT)
        return client is not None and client.exitcode == 0

    def pid_of(self, name: str) -> int | None:
        """The process id, unless the process is not there now."""
        process = self._processes.get(name)
        return None if process is None or not process.is_alive() else process.pid

    def signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal; ``False`` when the process is not there now."""
        process = self._processes.get(name)
        if process is None or process.pid is None or not process.is_alive():
            return False
        if number in (signal.SIGKILL, signal.SIGTERM):
            self._ended_by_us.add(process.pid)
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)
        return True

    def stop(self) -> list[str]:
        """Ask all to end; returns the names of those that had to be killed."""
        killed = []
        for name in self._processes:
            self.signal(name, signal.SIGCONT)
            self.signal(name, signal.SIGTERM)
        for name, process in self._processes.items():
            process.join(LONGEST_STOP_S)
            if process.is_alive():
                killed.append(name)
                process.kill()
                process.join()
        return killed

    def _start(self, name: str) -> None:
        from torture.entry import client, worker

        database = self._address_of(name)
        if name == CLIENT:
            process = FRESH.Process(target=client, args=(database, self._folder, self._seed), name=name)
        else:
            process = FRESH.Process(target=worker, args=(database, self._folder, name), name=name)
        process.start()
        self._processes[name] = process
