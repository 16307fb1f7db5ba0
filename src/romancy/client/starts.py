"""Starts instances: as this worker's own, for any worker, or as part of a transaction of the user's."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from romancy.context.activity import check_no_open_transaction
from romancy.definitions import Workflow
from romancy.errors import ConfigurationError, InstanceConflictError, UnknownWorkflowError
from romancy.lifecycle import Lifecycle
from romancy.model import Status
from romancy.names import checked_name
from romancy.serde import check_size
from romancy.settings import Settings
from romancy.starting import check_same, pending_row
from romancy.storage.joining import after_commit, insert_start
from romancy.storage.rows import StartRow

RUNNING = Status.RUNNING.value


class Starts:
    """See the module.

    Args:
        life: what is open.
        settings: the app's options.
    """

    def __init__(self, life: Lifecycle, settings: Settings) -> None:
        self._life = life
        self._settings = settings

    async def start(
        self,
        workflow: Workflow[..., Any] | str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        id: str | None,
        session: AsyncSession | None,
    ) -> tuple[str, Workflow[..., Any]]:
        """Start an instance, or find the one that was started alike; see :meth:`romancy.App.start_workflow`.

        Returns:
            Its id, and the definition of its workflow.
        """
        life = self._life
        life.check_running()
        definition = self._definition(workflow)
        given = definition.signature.encode_input(args, kwargs)
        text = given.text
        if len(text) * 4 > self._settings.max_payload_bytes:
            check_size(f"the input of workflow {definition.name!r}", [text], self._settings.max_payload_bytes)
        instance_id = life.ids.new_id() if id is None else checked_name("id", id)
        now = life.clock.now_us()
        if session is not None:
            await self._start_in(session, definition, instance_id, text, now)
            return instance_id, definition
        check_no_open_transaction("start a workflow")
        worker = life.worker
        if worker is not None and worker.reserve_room():
            row = StartRow(
                instance_id, 1, definition.name, RUNNING, worker.worker_id, None, 0, now, now, now,
                definition.source_hash, text,
            )  # fmt: skip
            is_new = await worker.writer.start(row, id is not None, partial(worker.on_start_settled, row, given))
        else:
            row = pending_row(instance_id, definition, text, now)
            is_new = await life.writer.start(row, id is not None, self._on_pending_settled)
        if not is_new:
            await self._check_same_start(instance_id, definition, text)
        return instance_id, definition

    async def _start_in(
        self, session: AsyncSession, definition: Workflow[..., Any], instance_id: str, text: str, now: int
    ) -> None:
        if not isinstance(session, AsyncSession):
            raise ConfigurationError(f"session={session!r}: give an AsyncSession of SQLAlchemy on the app's database")
        found = await insert_start(session, pending_row(instance_id, definition, text, now))
        if found is not None:
            check_same(instance_id, definition, text, found)
        after_commit(session, self._on_joined_start)

    def _on_joined_start(self) -> None:
        self._life.hint_worker()
        self._life.store.tell_others()

    def _on_pending_settled(self, is_new: bool) -> None:
        if is_new:
            self._life.hint_worker()

    def _definition(self, workflow: Workflow[..., Any] | str) -> Workflow[..., Any]:
        name = workflow if isinstance(workflow, str) else getattr(workflow, "name", None)
        known = self._life.known.get(name) if isinstance(name, str) else None
        if known is not None and known is workflow:
            return known
        if known is None:
            if name in self._life.catalogue.workflows:
                raise UnknownWorkflowError(
                    f"workflow {name!r} was defined after the app started: define workflows (import their modules) "
                    f"before app.start()"
                )
            names = ", ".join(sorted(self._life.known)) or "none"
            raise UnknownWorkflowError(
                f"this app has no workflow {name if name is not None else workflow!r}; it has: {names}. Import its "
                f"module before the app starts, or name it in App(workflows=[…])"
            )
        if not isinstance(workflow, str) and known is not workflow:
            raise UnknownWorkflowError(
                f"this app has another workflow named {name!r}, defined at {known.place}, "
                f"not the one of {workflow.place}"
            )
        return known

    async def _check_same_start(self, instance_id: str, definition: Workflow[..., Any], text: str) -> None:
        found = await asyncio.wrap_future(self._life.store.read_start(instance_id))
        if found is None:
            raise InstanceConflictError(f"instance {instance_id!r} was there a moment ago and is gone; start it again")
        check_same(instance_id, definition, text, found)
