"""A process that is stopped past its lease and then goes on writes nothing any more."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from contextlib import suppress
from pathlib import Path

from romancy import App
from tests.crash.fork import as_zombie
from tests.crash.zombie import LEASE_S, define
from tests.databases import Database, rows
from tests.ledger import create_ledger
from tests.support import RESULT_TIMEOUT_S

FRESH = multiprocessing.get_context("forkserver")


async def test_zombie_does_not_double_what_its_successor_has_done(database: Database, tmp_path: Path) -> None:
    create_ledger(database)
    receiver, sender = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=as_zombie, args=(database, tmp_path, sender))
    process.start()
    assert process.pid is not None
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        while not (tmp_path / "reached").exists():
            await asyncio.sleep(0.01)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        (tmp_path / "go").touch()
        async with App(database, workflows=[define(tmp_path)], lease_ttl=LEASE_S) as app:
            mine = f"process {os.getpid()}"
            assert await (await app.get_handle("it")).result(RESULT_TIMEOUT_S) == mine
            os.kill(process.pid, signal.SIGCONT)
            assert await asyncio.to_thread(receiver.recv) == mine
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)
        await asyncio.to_thread(process.join, RESULT_TIMEOUT_S)
        process.kill()
    assert process.exitcode == 0
    assert rows(database, "SELECT token FROM ledger") == [(mine,)]
    assert rows(database, "SELECT kind, attempt FROM romancy_history") == [("ActivityCompleted", 1)]
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("completed", None)]
