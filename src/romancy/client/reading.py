"""Reads instances and their history as the database holds them now."""

from __future__ import annotations

import asyncio

from romancy.handle import not_found
from romancy.lifecycle import Lifecycle
from romancy.model import HistoryEvent, Instance
from romancy.storage.queries import Queries


class Reading:
    """See the module.

    Args:
        life: what is open.
    """

    def __init__(self, life: Lifecycle) -> None:
        self._life = life

    async def find(self, instance_id: str) -> Instance | None:
        """One instance, or ``None``."""
        self._life.check_running()
        return await asyncio.wrap_future(self._life.store.get_instance(instance_id))

    async def get(self, instance_id: str) -> Instance:
        """One instance.

        Raises:
            InstanceNotFoundError: there is no such instance.
        """
        instance = await self.find(instance_id)
        if instance is None:
            raise not_found(instance_id)
        return instance

    async def history(self, instance_id: str, run: int | None) -> list[HistoryEvent]:
        """What is recorded of a run; ``None``: of the latest.

        Raises:
            InstanceNotFoundError: there is no such instance.
        """
        self._life.check_running()
        events = await asyncio.wrap_future(self._life.store.get_history(instance_id, run))
        if not events:
            await self.get(instance_id)
        return events

    @property
    def pages(self) -> Queries:
        """Asks for pages of instances."""
        self._life.check_running()
        return self._life.queries
