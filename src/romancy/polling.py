"""Looks for the ends of instances that run elsewhere, or ended before somebody asked."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from romancy.errors import DatabaseError
from romancy.outcomes import Outcomes
from romancy.storage.store import Store

logger = logging.getLogger("romancy.app")

OUTCOME_POLL_S = 1.0
SHORTEST_POLL_S = 0.02


class OutcomePoller:
    """Asks the database how instances ended, as long as somebody waits for one that is not live here.

    Args:
        outcomes: who waits for what.
        store: the database.
        is_live: whether an instance is in this process's memory, so that its end is heard of without asking.
    """

    def __init__(self, outcomes: Outcomes, store: Store, is_live: Callable[[str], bool]) -> None:
        self._outcomes = outcomes
        self._store = store
        self._is_live = is_live
        self._wanted = asyncio.Event()
        self._rests = True
        self._is_stopped = False
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to look."""
        self._task = asyncio.get_running_loop().create_task(self._poll(), name="romancy-outcomes")

    def stop(self) -> list[asyncio.Task[None]]:
        """Look no more; returns what has yet to end.

        Not cancelled: a query cut off in the middle would leave its connection's thread behind.
        """
        self._is_stopped = True
        self._wanted.set()
        return [] if self._task is None else [self._task]

    def look(self) -> None:
        """Something may have ended elsewhere: look now."""
        self._wanted.set()

    def look_for(self, instance_id: str) -> None:
        """Somebody is about to wait for the end of this instance."""
        # What is live here may yet end elsewhere: after its eviction, or the loss of the lease.
        if self._rests or not self._is_live(instance_id):
            self._wanted.set()

    async def _poll(self) -> None:
        wait_s = OUTCOME_POLL_S
        while not self._is_stopped:
            self._rests = not self._outcomes.awaited()
            try:
                async with asyncio.timeout(None if self._rests else wait_s):
                    await self._wanted.wait()
            except TimeoutError:
                # What has just begun may soon end; what takes long is asked for rarely.
                wait_s = min(2 * wait_s, OUTCOME_POLL_S)
            else:
                wait_s = SHORTEST_POLL_S
            self._wanted.clear()
            self._rests = False
            ids = [key for key in self._outcomes.awaited() if not self._is_live(key)]
            if not ids or self._is_stopped:
                continue
            try:
                states = await asyncio.wrap_future(self._store.get_outcomes(ids))
            except DatabaseError as error:
                logger.warning("results can't be read now: %s", error)
            else:
                for state in states:
                    self._outcomes.settle(state)
