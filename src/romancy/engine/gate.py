"""The gate of an instance: while an outcome commits in a transaction of its own, no other one may pass."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable


class Gate:
    """Keeps the order of history: whatever comes while it is shut waits, in order.

    Attributes:
        is_shut: an outcome is on its way to the database.
    """

    __slots__ = ("_actions", "_waiters", "is_shut")

    def __init__(self) -> None:
        self.is_shut = False
        self._actions: deque[Callable[[], None]] = deque()
        self._waiters: list[asyncio.Future[None]] = []

    async def shut(self) -> None:
        """Shut it, once nobody else has."""
        while self.is_shut:
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            await waiter
        self.is_shut = True

    def open(self) -> None:
        """Open it, and let pass what waits, until that shuts it again."""
        self.is_shut = False

    def after(self, action: Callable[[], None]) -> None:
        """Do this once the gate is open."""
        self._actions.append(action)

    def let_pass(self) -> None:
        """Do what waited."""
        while not self.is_shut and self._actions:
            self._actions.popleft()()
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)
