"""Who waits for which instance to end."""

from __future__ import annotations

import asyncio
from weakref import WeakValueDictionary

from romancy.errors import ResultTimeoutError
from romancy.model import Status
from romancy.retry import Seconds, as_seconds
from romancy.storage.rows import StateRow

SUSPENDED = Status.SUSPENDED.value


class Outcome:
    """How one instance ends: known, or waited for. Shared by the handles of that instance."""

    __slots__ = ("__weakref__", "_waiters", "instance_id", "state")

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.state: StateRow | None = None
        self._waiters: list[asyncio.Future[StateRow]] = []

    @property
    def is_awaited(self) -> bool:
        """Whether anybody waits now."""
        return bool(self._waiters)

    async def wait(self) -> StateRow:
        """The state in which the instance ended, or was suspended."""
        if self.state is not None:
            return self.state
        waiter: asyncio.Future[StateRow] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            return await waiter
        finally:
            self._waiters.remove(waiter)

    async def wait_within(self, timeout: Seconds) -> StateRow:
        """The same, but not for longer than that.

        Raises:
            ResultTimeoutError: the time ran out.
        """
        timeout_s = as_seconds(timeout, "timeout")
        try:
            async with asyncio.timeout(timeout_s):
                return await self.wait()
        except TimeoutError:
            raise ResultTimeoutError(
                f"instance {self.instance_id} has not ended within {timeout_s} s; it goes on. Wait longer, or ask for "
                f"its status()"
            ) from None

    def settle(self, state: StateRow) -> None:
        """Tell those who wait; a suspended instance may still go on, so that is not kept."""
        if state.status != SUSPENDED:
            self.state = state
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(state)

    def fail(self, error: BaseException) -> None:
        """Tell those who wait that nobody will know."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_exception(error)


class Outcomes:
    """The outcomes that somebody holds on to."""

    def __init__(self) -> None:
        self._by_id: WeakValueDictionary[str, Outcome] = WeakValueDictionary()

    def of(self, instance_id: str) -> Outcome:
        """The shared outcome of this instance."""
        outcome = self._by_id.get(instance_id)
        if outcome is None:
            outcome = Outcome(instance_id)
            self._by_id[instance_id] = outcome
        return outcome

    def settle(self, state: StateRow) -> None:
        """An instance has ended or was suspended."""
        outcome = self._by_id.get(state.instance_id)
        if outcome is not None:
            outcome.settle(state)

    def forget(self, instance_id: str) -> None:
        """An instance that had ended goes on: later handles wait for its next end."""
        self._by_id.pop(instance_id, None)

    def awaited(self) -> list[str]:
        """The instances that somebody waits for now."""
        return [outcome.instance_id for outcome in list(self._by_id.values()) if outcome.is_awaited]

    def fail_all(self, error: BaseException) -> None:
        """Nobody will hear of these any more."""
        for outcome in list(self._by_id.values()):
            outcome.fail(error)
