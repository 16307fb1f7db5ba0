"""What is asked of an instance that was started: to end, to rest, to go on, to go on from a failure, to be forked."""

from __future__ import annotations

import asyncio
from typing import Any

from romancy.client.reading import Reading
from romancy.context.activity import check_no_open_transaction
from romancy.errors import InstanceStateError
from romancy.lifecycle import Lifecycle
from romancy.model import Instance, Status
from romancy.names import checked_name
from romancy.serde import dump_plain
from romancy.storage.again import Fork
from romancy.storage.mail import CANCEL, SUSPEND
from romancy.storage.posting import request_mail


class Requests:
    """See the module.

    Args:
        life: what is open.
        reading: finds the instances.
    """

    def __init__(self, life: Lifecycle, reading: Reading) -> None:
        self._life = life
        self._reading = reading

    async def cancel(self, instance_id: str, reason: str | None) -> bool:
        """See :meth:`romancy.App.cancel`."""
        instance = await self._ask(instance_id, CANCEL, {"reason": reason})
        if instance.status is Status.SUSPENDED:
            # It can only end by running its code; should that still not fit, it is parked again.
            await self._wake(instance_id)
            self._life.hint_worker()
        return not instance.status.is_terminal

    async def suspend(self, instance_id: str) -> None:
        """See :meth:`romancy.App.suspend`."""
        instance = await self._ask(instance_id, SUSPEND, {})
        if instance.status.is_terminal:
            raise InstanceStateError(f"instance {instance_id!r} is {instance.status}: there is nothing to suspend")

    async def resume(self, instance_id: str) -> None:
        """See :meth:`romancy.App.resume`."""
        self._check("resume an instance")
        if not await self._wake(instance_id):
            instance = await self._reading.get(instance_id)
            raise InstanceStateError(f"instance {instance_id!r} is {instance.status}, not suspended: nothing to resume")
        self._life.hint_worker()

    async def retry(self, instance_id: str) -> None:
        """See :meth:`romancy.App.retry`."""
        self._check("retry an instance")
        life = self._life
        try:
            await asyncio.wrap_future(life.store.retry(checked_name("id", instance_id), life.clock.now_us()))
        finally:
            life.outcomes.forget(instance_id)  # also where the answer was lost: it may go on
        life.hint_worker()

    async def fork(self, instance_id: str, from_activity: str, id: str | None) -> str:
        """Returns the id of the new instance; see :meth:`romancy.App.fork`."""
        self._check("fork an instance")
        life = self._life
        new_id = life.ids.new_id() if id is None else checked_name("id", id)
        mail_ids = iter(life.ids.new_id, None)
        asked = Fork(checked_name("id", instance_id), from_activity, new_id, mail_ids, life.clock.now_us())
        await asyncio.wrap_future(life.store.fork(asked))
        life.hint_worker()
        return new_id

    async def _ask(self, instance_id: str, what: str, details: dict[str, Any]) -> Instance:
        """Send a request to the instance, unless it has ended; its worker sees to it."""
        self._check(f"{what} an instance")
        instance = await self._reading.get(instance_id)
        if not instance.status.is_terminal:
            life = self._life
            await life.writer.post(request_mail(life.ids.new_id(), instance.instance_id, what, dump_plain(details)))
        return instance

    async def _wake(self, instance_id: str) -> bool:
        return await asyncio.wrap_future(self._life.store.resume(instance_id, self._life.clock.now_us()))

    def _check(self, what: str) -> None:
        self._life.check_running()
        check_no_open_transaction(what)
