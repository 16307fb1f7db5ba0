"""One run on one database: prepare, let loose, wait for the end, judge."""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random

from sqlalchemy import make_url
from tests.databases import Database, rows, server_database
from tests.ledger import create_ledger
from tests.proxy import Proxy
from tests.servers import MissingError, Server, own_server

from romancy import App
from torture import report
from torture.audit import create_audit
from torture.checker import check
from torture.crew import CLIENT, WORKERS, Crew
from torture.evidence import gather
from torture.faults import Faults, Target, until_ended
from torture.folder import Folder

LEASE_S = 2.0
FINISH_S = 2 * LEASE_S + 5.0
STEP_S = 0.05
PROGRESS_S = 5.0
PORTS = {"postgresql": 5432, "mysql": 3306}
THROUGH_PROXY = {CLIENT, *WORKERS[:2]}
"""One worker speaks to the server directly."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a run is to do.

    Attributes:
        wanted: the kinds of faults; ``None``: all that do no harm to what is not there yet.
        slack_s: more time to finish, for machines that do other work.
    """

    seconds: float
    seed: int
    wanted: frozenset[str] | None = None
    slack_s: float = 0.0


def torture(kind: str, settings: Settings) -> report.Run:
    """Run on one kind of database; returns what came of it."""
    folder = Folder(Path(tempfile.mkdtemp(prefix=f"torture-{kind}-")))
    logging.basicConfig(
        filename=folder.log("torture"), level=logging.INFO, format="%(asctime)s %(message)s", force=True
    )
    notes: list[str] = []
    with ExitStack() as stack:
        database, server = stack.enter_context(_database(kind, folder, notes))
        proxy = stack.enter_context(_proxy(kind, database))
        asyncio.run(_prepare(database))
        address = _behind(proxy, database)
        crew = Crew(lambda name: address if name in THROUGH_PROXY else database, folder, settings.seed)
        target = Target(database, crew, folder, LEASE_S, proxy, server)
        faults = Faults(target, Random(settings.seed), settings.wanted)
        stack.callback(crew.stop)
        crew.start()
        _suffer(kind, target, faults, settings.seconds)
        stopped_at = time.monotonic()
        late = until_ended(database, stopped_at + FINISH_S + settings.slack_s, lambda: _is_done(crew))
        finish_s = time.monotonic() - stopped_at
        is_done = crew.is_client_done
        killed = crew.stop()
        evidence = gather(database, folder, late, [*WORKERS, CLIENT])
        evidence.complaints.extend(f"{name} had to be killed in the end" for name in killed)
        evidence.complaints.extend(f"{name} ended by itself with code {code}" for name, code in crew.exits)
        if not is_done:
            evidence.complaints.append("the client has not come to the end of its jobs")
        violations = check(evidence, settings.seed)
        place = f"folder {folder.path}" + (f", server: {server.hint}" if server else "")
        return report.Run(
            kind, settings.seed, settings.seconds, evidence, violations, faults.count, finish_s, place, notes
        )


def _suffer(kind: str, target: Target, faults: Faults, seconds: float) -> None:
    """Let the faults happen for so long, then let the client begin nothing new."""
    began = time.monotonic()
    next_line = began + PROGRESS_S
    while (now := time.monotonic()) < began + seconds:
        faults.step()
        target.crew.look_after()
        if now >= next_line:
            next_line = now + PROGRESS_S
            report.progress(kind, now - began, seconds, _counts(target.database), faults.count)
        time.sleep(STEP_S)
    faults.stop()
    target.folder.stop.touch()


def _is_done(crew: Crew) -> bool:
    crew.look_after()
    return crew.is_client_done


def _counts(database: Database) -> dict[str, int]:
    return dict(rows(database, "SELECT status, COUNT(*) FROM romancy_instances GROUP BY status"))


async def _prepare(database: Database) -> None:
    async with App(database, worker=False):
        pass
    create_ledger(database)
    create_audit(database)


@contextmanager
def _database(kind: str, folder: Folder, notes: list[str]) -> Iterator[tuple[Database, Server | None]]:
    if kind == "sqlite":
        yield folder.path / "torture.db", None
        return
    try:
        server = own_server(kind, folder.path)
    except MissingError as error:
        notes.append(f"NOT DONE: the server was never killed, for there is {error}")
        with server_database(kind) as url:
            yield url, None
        return
    try:
        yield server.url, server
    finally:
        server.stop()


@contextmanager
def _proxy(kind: str, database: Database) -> Iterator[Proxy | None]:
    if kind == "sqlite":
        yield None
        return
    url = make_url(str(database))
    proxy = Proxy(url.host or "127.0.0.1", url.port or PORTS[kind])
    try:
        yield proxy
    finally:
        proxy.close()


def _behind(proxy: Proxy | None, database: Database) -> Database:
    if proxy is None:
        return database
    return make_url(str(database)).set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
