"""What is done to the processes and to the database, at random, from one seed; each fault ends by itself."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from random import Random

from tests.databases import Database, connect, kind_of, rows
from tests.proxy import Proxy
from tests.servers import Server

from torture.crew import CLIENT, WORKERS, Crew
from torture.folder import Folder

logger = logging.getLogger("torture")

ALWAYS = {"kill": 6, "stop": 3, "leave": 2, "kill-client": 1}
ON_SERVERS = {"backend": 5, "cut": 5, "deaf": 2}
ON_OWN_SERVERS = {"server": 1}
OPTIONAL = {"stall": 2}
"""Kinds of faults, and how often each comes in proportion; the optional ones only where they are asked for."""

UNTIL_BURIAL = 0.6
"""The part of stopped workers that wake at once when they are buried."""
BURIAL_LOOK_S = 0.002
LONGEST_STOP_LEASES = 3

SHORTEST_GAP_S, LONGEST_GAP_S = 0.3, 1.8


@dataclass(slots=True)
class Target:
    """What the faults are done to."""

    database: Database
    crew: Crew
    folder: Folder
    lease_s: float
    proxy: Proxy | None = None
    server: Server | None = None


def kinds_for(target: Target, wanted: frozenset[str] | None) -> dict[str, int]:
    """The faults that this target can suffer; those that are wanted, if any are named."""
    able = dict(ALWAYS)
    if kind_of(target.database) != "sqlite":
        able |= ON_SERVERS
        if target.server is not None:
            able |= ON_OWN_SERVERS
        if wanted is not None:
            able |= OPTIONAL
    return {kind: weight for kind, weight in able.items() if wanted is None or kind in wanted}


class Faults:
    """Lets one fault after another happen, until it is told to stop.

    Attributes:
        count: how many of each kind there were.
    """

    def __init__(self, target: Target, random: Random, wanted: frozenset[str] | None) -> None:
        self._target = target
        self._random = random
        self._kinds = kinds_for(target, wanted)
        self._next_at = time.monotonic() + 1.0
        self._ends: list[tuple[float, Callable[[], None]]] = []
        self._background: list[threading.Thread] = []
        self._is_over = threading.Event()
        self.count: Counter[str] = Counter()

    def step(self) -> None:
        """End what is due to end, and begin what is due to begin."""
        now = time.monotonic()
        for at, end in [entry for entry in self._ends if entry[0] <= now]:
            self._ends.remove((at, end))
            end()
        if now >= self._next_at and self._kinds:
            self._next_at = now + self._random.uniform(SHORTEST_GAP_S, LONGEST_GAP_S)
            (kind,) = self._random.choices(list(self._kinds), list(self._kinds.values()))
            self._do(kind)

    def stop(self) -> None:
        """End all faults now."""
        for _, end in self._ends:
            end()
        self._ends.clear()
        self._is_over.set()
        for thread in self._background:
            thread.join()
        if self._target.proxy is not None:
            self._target.proxy.spare()

    def _do(self, kind: str) -> None:
        random, target = self._random, self._target
        logger.info("fault: %s", kind)
        self.count[kind] += 1
        match kind:
            case "kill":
                target.crew.signal(random.choice(WORKERS), signal.SIGKILL)
            case "kill-client":
                target.crew.signal(CLIENT, signal.SIGKILL)
            case "leave":
                target.crew.signal(random.choice(WORKERS), signal.SIGTERM)
            case "stop":
                self._stop_a_worker()
            case "deaf":
                target.folder.deaf.touch()
                self._later(random.uniform(0.5, 3), lambda: target.folder.deaf.unlink(missing_ok=True))
            case "backend":
                for _ in range(random.randrange(1, 4)):
                    self._end_a_connection()
            case "cut":
                self._cut()
            case "stall":
                self._stall()
            case "server":
                self._kill_the_server()

    def _later(self, wait_s: float, end: Callable[[], None]) -> None:
        self._ends.append((time.monotonic() + wait_s, end))

    def _stop_a_worker(self) -> None:
        """Past its lease, so that it wakes as a zombie: at any time, or the moment the others have buried it."""
        name = self._random.choice(WORKERS)
        wait_s = self._target.lease_s * self._random.uniform(0.8, 2.2)
        is_until_burial = self._random.random() < UNTIL_BURIAL
        pid = self._target.crew.pid_of(name)
        if pid is None or not self._target.crew.signal(name, signal.SIGSTOP):
            return
        if is_until_burial:
            thread = threading.Thread(target=self._wake_when_buried, args=(name, pid), name="torture-burial")
            self._background.append(thread)
            thread.start()
        else:
            self._later(wait_s, lambda: self._wake(name))

    def _wake_when_buried(self, name: str, pid: int) -> None:
        """Its successors have just taken its instances over, and have not come far with them."""
        deadline = time.monotonic() + LONGEST_STOP_LEASES * self._target.lease_s
        while time.monotonic() < deadline and not self._is_over.is_set():
            with contextlib.suppress(Exception):  # the database may be away
                if not rows(
                    self._target.database, "SELECT 1 FROM romancy_workers WHERE pid = ? AND state = 'alive'", pid
                ):
                    break
            time.sleep(BURIAL_LOOK_S)
        self._wake(name)

    def _wake(self, name: str) -> None:
        self._target.crew.signal(name, signal.SIGCONT)

    def _end_a_connection(self) -> None:
        """From the server's side, whatever it is doing."""
        database = self._target.database
        with closing(connect(database)) as connection:
            cursor = connection.cursor()
            if kind_of(database) == "postgresql":
                cursor.execute(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid() AND backend_type = 'client backend' ORDER BY pid"
                )
                end = "SELECT pg_terminate_backend({})"
            else:
                cursor.execute(
                    "SELECT id FROM information_schema.processlist WHERE db = DATABASE() "
                    "AND id <> CONNECTION_ID() ORDER BY id"
                )
                end = "KILL CONNECTION {}"
            ids = [row[0] for row in cursor.fetchall()]
            if ids:
                try:
                    cursor.execute(end.format(self._random.choice(ids)))
                except Exception as error:
                    logger.info("that connection had gone: %s", error)

    def _cut(self) -> None:
        """Break the connection that sends one of the next requests or commits, before it or after it, unheard."""
        proxy = self._target.proxy
        assert proxy is not None
        request, when = self._random.randrange(1, 12), self._random.choice(("before", "after", "after"))
        proxy.cut_at(request, when, containing=self._random.choice((b"", b"COMMIT")))

    def _stall(self) -> None:
        """Let all connections of the proxy fall silent, for ever: what comes later goes through new ones."""
        proxy = self._target.proxy
        assert proxy is not None
        proxy.stall()

    def _kill_the_server(self) -> None:
        server = self._target.server
        assert server is not None
        server.kill()
        wait_s = self._random.uniform(0, 2)

        def start() -> None:
            time.sleep(wait_s)
            server.start()

        thread = threading.Thread(target=start, name="torture-server")
        thread.start()
        thread.join()  # nothing else can be done to a database that is away


def until_ended(database: Database, deadline: float, look: Callable[[], bool]) -> dict[str, float | None]:
    """Wait for the end of all instances; returns those that were late, and by how much, if they ended at all.

    Args:
        database: of the run.
        deadline: on the monotonic clock.
        look: called again and again; says whether the client has done all its work.
    """
    late: dict[str, float | None] = {}
    while True:
        is_done = look()
        ids = [row[0] for row in rows(database, "SELECT instance_id FROM romancy_instances WHERE completed_at IS NULL")]
        now = time.monotonic()
        if now > deadline:
            late.update((instance_id, None) for instance_id in ids if instance_id not in late)
            for instance_id in late:
                if instance_id not in ids and late[instance_id] is None:
                    late[instance_id] = now - deadline
        if (is_done and not ids) or now > deadline + PATIENCE_S:
            return late
        time.sleep(0.1)


PATIENCE_S = 20.0
"""How long what is late is waited for, to tell whether it ends at all."""
