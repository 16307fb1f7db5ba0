"""A process that runs the workflows until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import signal
import sys
from typing import Any

from tests.databases import Database

from romancy import App, DatabaseUnavailableError, RetryPolicy, RomancyError
from torture import flows
from torture.audit import watched
from torture.folder import Folder

LEASE_S = 2.0
LOOK_INTERVAL_S = 0.5
DEFAULT_RETRY = RetryPolicy.fixed(20, 0.05)


def main(database: Database, folder: Folder, name: str) -> None:
    """Run until SIGTERM, or until the app has given up."""
    prepare(folder, name)
    flows.set_up(folder, has_change=has_change(name))
    _lose_hints(folder)
    asyncio.run(_run(watched(database), name))


def has_change(name: str) -> bool:
    """Whether a process has the newer code: the first worker always, the last one never, others once in a while."""
    match name:
        case "worker-1":
            return True
        case "worker-3":
            return False
        case _:
            return random.random() < 0.5


def prepare(folder: Folder, name: str) -> None:
    """Log into the folder."""
    logging.basicConfig(
        filename=folder.log(name),
        level=logging.INFO,
        format="%(asctime)s %(process)d %(levelname)s %(name)s %(message)s",
    )


async def _run(database: Database, name: str) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    app = App(database, worker_id=name, lease_ttl=LEASE_S, default_retry=DEFAULT_RETRY, auto_migrate=False)
    await start(app)
    try:
        while not stop.is_set():
            if app._life.broken is not None:
                raise RomancyError(f"the app has given up: {app._life.broken}")
            try:
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await stop.wait()
            except TimeoutError:
                continue
    finally:
        await app.shutdown()


async def start(app: App) -> None:
    """Start the app, or end this process, where the database can't be reached now."""
    try:
        await app.start()
    except DatabaseUnavailableError as error:
        logging.info("come again: %s", error)
        sys.exit(os.EX_TEMPFAIL)


def _lose_hints(folder: Folder) -> None:
    """Let hints from other processes get lost while the folder says so."""
    from romancy.storage.listener import Listener

    init = Listener.__init__

    def with_losses(self: Listener, connect: Any, wait: Any, abort: Any, on_hint: Any, *others: Any) -> None:
        def heard() -> None:
            if not folder.deaf.exists():
                on_hint()

        init(self, connect, wait, abort, heard, *others)

    Listener.__init__ = with_losses  # type: ignore[method-assign]
