"""The composition root: ``App`` puts the parts together, and is what users call."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from romancy.client.reading import Reading
from romancy.client.requests import Requests
from romancy.client.sending import Sending
from romancy.client.starts import Starts
from romancy.clock import Clock
from romancy.context.activity import check_no_open_transaction
from romancy.definitions import Catalogue, Workflow
from romancy.handle import WorkflowHandle
from romancy.lifecycle import Lifecycle
from romancy.model import HistoryEvent, Instance, InstancePage, Status
from romancy.outcomes import Outcome
from romancy.retry import RetryPolicy, Seconds, as_seconds
from romancy.settings import (
    DEFAULT_PAYLOAD_BYTES,
    Default,
    Settings,
    chosen_address,
    long_enough_lease_s,
    pool_options,
    positive,
    usual_name,
)
from romancy.storage.address import Address, parse_address
from romancy.storage.filters import JsonScalar
from romancy.storage.given import GivenEngines
from romancy.storage.rows import StateRow

R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")


class App:
    """Romancy in one process: a database, and a worker that runs workflows on the current event loop.

    Args:
        database: a path, ``":memory:"`` (gone with the app), ``sqlite:///path``, or a URL of a server:
            ``postgresql://user:password@host/database`` (``pip install romancy[postgresql]``) or
            ``mysql://user:password@host/database`` for MySQL and MariaDB (``romancy[mysql]``). Options of the URL go
            to the driver. TLS: ``?sslmode=verify-full&sslrootcert=ca.pem`` for PostgreSQL (libpq's options), and
            ``?ssl_ca=ca.pem`` for MySQL and MariaDB, which checks the certificate and the host in it
            (``ssl_verify_cert``, ``ssl_verify_identity``; ``ssl_cert`` and ``ssl_key`` are the client's own).
            By default where the engines lead, or ``romancy.db``.
        engine: an ``AsyncEngine`` of the application's own on the same database, for the sessions of ``async def``
            activities: they come from its pool, and its events and options hold for them. Romancy adds no listener to
            it and never disposes it. Its driver is psycopg, asyncmy or aiosqlite. Whatever it is set to, a transaction
            of an activity is READ COMMITTED (on SQLite durable, under the write lock); its connections go back as
            they came. By default Romancy makes an engine.
        sync_engine: the same for plain ``def`` activities: an ``Engine`` with psycopg, PyMySQL or sqlite3.
        pool_size: how many connections for the sessions of activities are kept open, in each of Romancy's two engines
            (one for ``async def``, one for plain ``def``); by default 10, on SQLite, which has one writer, 5. What
            else Romancy has open is fixed: two connections that write and read, one that listens, up to ten for
            queries.
        max_overflow: how many more may be opened while those are all in use; by default 20, on SQLite 10. They are
            closed when nobody has needed them for some seconds. With 0, an attempt that finds none free within 30 s is
            made again, and does not count.
        worker_id: a name for this worker in messages and tables; by default host and process id. Ownership does
            not depend on it: each start of an app is a worker of its own.
        workflows: what this app can run; by default all of the default catalogue.
        default_retry: the retry policy of activities that have none of their own.
        worker: whether to run workflows here; without, the app only starts and reads.
        auto_migrate: whether to bring the tables up to date at start; without, an outdated database is an error.
        max_payload_bytes: the most bytes that one stored input or result may take.
        lease_ttl: how long other machines wait for a silent worker before they take over its instances, in
            seconds or as a ``timedelta``. On the same host a dead process is noticed at once.
        shutdown_grace: how long :meth:`shutdown` lets running activities go on.
        max_instances: how many instances may run at a time; more wait in the database.
        max_hot_instances: how many waiting instances are kept in memory; more are replayed when they wake.
        max_activities: how many activities may run at a time.
        activity_threads: how many plain ``def`` activities may run at a time.
        stall_warning: after how many seconds a blocked event loop is reported.
        listen_on: only with PostgreSQL behind a pooler in transaction mode, through which ``LISTEN`` can't work: an
            address that leads to the same database directly. Without, other processes' work is found within 5 s.
        event_retention: how long an event with a key, or to one instance, is kept for somebody who waits for it; in
            seconds or as a ``timedelta``.
        clock: for tests; see ``romancy.testing``.

    Raises:
        ConfigurationError: an option can't work.
        DatabaseURLError: the address can't be understood.

    Example:
        >>> async def main():
        ...     async with App("orders.db") as app:
        ...         handle = await app.start_workflow(process_order, Order("A-17"))
        ...         print(await handle.result())
    """

    def __init__(
        self,
        database: str | os.PathLike[str] | Default = Default.DATABASE,
        *,
        engine: AsyncEngine | None = None,
        sync_engine: Engine | None = None,
        pool_size: int | None = None,
        max_overflow: int | None = None,
        worker_id: str | None = None,
        workflows: Iterable[Workflow[..., Any]] | None = None,
        default_retry: RetryPolicy | None = None,
        worker: bool = True,
        auto_migrate: bool = True,
        max_payload_bytes: int = DEFAULT_PAYLOAD_BYTES,
        lease_ttl: Seconds = 10.0,
        shutdown_grace: Seconds = 10.0,
        max_instances: int = 10_000,
        max_hot_instances: int = 10_000,
        max_activities: int = 1_000,
        activity_threads: int = 32,
        stall_warning: Seconds = 1.0,
        event_retention: Seconds = 24 * 3600.0,
        listen_on: str | None = None,
        clock: Clock | None = None,
    ) -> None:
        given = GivenEngines(engine, sync_engine)
        self._settings = Settings(
            given=given,
            address=chosen_address(database, given),
            listen_on=None if listen_on is None else parse_address(listen_on),
            pool=pool_options(pool_size, max_overflow, given),
            name=worker_id or usual_name(),
            default_retry=default_retry or RetryPolicy.default(),
            max_payload_bytes=positive("max_payload_bytes", max_payload_bytes),
            lease_ttl_s=long_enough_lease_s(lease_ttl),
            shutdown_grace_s=as_seconds(shutdown_grace, "shutdown_grace"),
            max_instances=positive("max_instances", max_instances),
            max_hot_instances=positive("max_hot_instances", max_hot_instances),
            max_activities=positive("max_activities", max_activities),
            activity_threads=positive("activity_threads", activity_threads),
            stall_warning_s=as_seconds(stall_warning, "stall_warning"),
            event_retention_us=round(as_seconds(event_retention, "event_retention") * 1_000_000),
            workflows=None if workflows is None else Catalogue.of(workflows),
            has_worker=worker,
            auto_migrate=auto_migrate,
            clock=clock,
        )
        self._life = Lifecycle(self._settings)
        self._starts = Starts(self._life, self._settings)
        self._sending = Sending(self._life, self._settings)
        self._reading = Reading(self._life)
        self._requests = Requests(self._life, self._reading)

    @property
    def name(self) -> str:
        """This worker's name in messages and tables."""
        return self._settings.name

    @name.setter
    def name(self, name: str) -> None:
        self._settings.name = name

    @property
    def address(self) -> Address:
        """Where the database is."""
        return self._settings.address

    @property
    def shutdown_grace_s(self) -> float:
        """How long :meth:`shutdown` lets running activities go on."""
        return self._settings.shutdown_grace_s

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the database, bring its tables up to date, and begin to run workflows.

        Raises:
            DatabaseError: the database can't be opened, or is not fit for durable work.
            InstanceStateError: the app is running already.
            AppNotRunningError: it runs in the process that this one was forked from.
        """
        await self._life.start()

    async def shutdown(self) -> None:
        """Stop in good order: no new work, running activities may end, the rest goes back for others at once.

        Raises:
            AppNotRunningError: it runs in the process that this one was forked from, and is left alone.
        """
        await self._life.shutdown()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    # -- starting ----------------------------------------------------------------------------------

    @overload
    async def start_workflow(
        self, workflow: Workflow[[], R], /, *, id: str | None = None, session: AsyncSession | None = None
    ) -> WorkflowHandle[R]: ...
    @overload
    async def start_workflow(
        self, workflow: Workflow[[A], R], input: A, /, *, id: str | None = None, session: AsyncSession | None = None
    ) -> WorkflowHandle[R]: ...
    @overload
    async def start_workflow(
        self,
        workflow: Workflow[[A, B], R],
        first: A,
        second: B,
        /,
        *,
        id: str | None = None,
        session: AsyncSession | None = None,
    ) -> WorkflowHandle[R]: ...
    @overload
    async def start_workflow(
        self,
        workflow: Workflow[..., R],
        /,
        *args: Any,
        id: str | None = None,
        session: AsyncSession | None = None,
        **kwargs: Any,
    ) -> WorkflowHandle[R]: ...
    @overload
    async def start_workflow(
        self, workflow: str, /, *args: Any, id: str | None = None, session: AsyncSession | None = None, **kwargs: Any
    ) -> WorkflowHandle[Any]: ...
    async def start_workflow(
        self,
        workflow: Workflow[..., Any] | str,
        /,
        *args: Any,
        id: str | None = None,
        session: AsyncSession | None = None,
        **kwargs: Any,
    ) -> WorkflowHandle[Any]:
        """Start an instance. It is durable when this returns; or, with a session, once its transaction is committed.

        Args:
            workflow: the definition, or its name.
            args: its input.
            id: the instance id, up to 200 characters; by default a UUID of version 7. Starting the same workflow
                with the same input and id again returns a handle of the existing instance.
            session: a session on the same database, whose transaction the start becomes part of: the instance begins
                after its commit, and does not exist after its rollback. In an activity, ``current_activity().session``.
            kwargs: its input, by parameter name.

        Raises:
            InstanceConflictError: the id belongs to another workflow, or to one with another input.
            UnknownWorkflowError: this app does not have the workflow.
            SerializationError: the input can't be stored, or is too large (``PayloadTooLargeError``).
            DatabaseError: the database can't take it now; nothing was stored.
        """
        instance_id, definition = await self._starts.start(workflow, args, kwargs, id, session)
        return WorkflowHandle(self, self._life.outcomes.of(instance_id), definition)

    # -- reading -----------------------------------------------------------------------------------

    @overload
    async def get_handle(self, instance_id: str, workflow: Workflow[..., R]) -> WorkflowHandle[R]: ...
    @overload
    async def get_handle(self, instance_id: str) -> WorkflowHandle[Any]: ...
    async def get_handle(self, instance_id: str, workflow: Workflow[..., Any] | None = None) -> WorkflowHandle[Any]:
        """A handle of an instance that was started before, here or elsewhere.

        Args:
            instance_id: which one.
            workflow: its definition, so that ``result()`` is typed; by default the one of its name in this app.

        Raises:
            InstanceNotFoundError: there is no such instance.
        """
        instance = await self._reading.get(instance_id)
        definition = workflow or self._life.known.get(instance.workflow_name)
        return WorkflowHandle(self, self._life.outcomes.of(instance_id), definition)

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance as the database holds it now, or ``None``."""
        return await self._reading.find(instance_id)

    async def list_instances(
        self,
        *,
        workflow_name: str | None = None,
        status: Status | str | None = None,
        instance_id: str | None = None,
        started_after: datetime | None = None,
        started_before: datetime | None = None,
        limit: int = 50,
        page_token: str | None = None,
    ) -> InstancePage:
        """A page of instances, newest first.

        Args:
            workflow_name: a part of the name, ASCII case ignored; ``%`` and ``_`` are just characters.
            status: exactly this status.
            instance_id: a part of the id, likewise.
            started_after: only instances whose start was stored after this time (aware).
            started_before: only instances whose start was stored before this time (aware).
            limit: instances a page, from 1 to 1,000.
            page_token: ``next_page_token`` of the page before, with the same filters.

        Raises:
            InvalidFilterError: a filter or the limit can't be used.
            InvalidPageTokenError: the token is none, or belongs to other filters.
        """
        return await self._reading.pages.list_instances(
            workflow_name=workflow_name,
            status=status,
            instance_id=instance_id,
            started_after=started_after,
            started_before=started_before,
            limit=limit,
            page_token=page_token,
        )

    async def find_instances(
        self,
        filters: Mapping[str, JsonScalar],
        *,
        workflow_name: str | None = None,
        status: Status | str | None = None,
        limit: int = 50,
        page_token: str | None = None,
    ) -> InstancePage:
        """A page of the instances whose input holds all these values, newest first.

        Args:
            filters: values by dotted path, such as ``{"order.status": "pending", "items.0.sku": "A1"}``. Strings
                match exactly, numbers by value (1 is 1.0), ``True`` and ``False`` booleans only, ``None`` an explicit
                null only, never a missing key. A part of digits is a list index, or a key.
            workflow_name: as for :meth:`list_instances`.
            status: as for :meth:`list_instances`.
            limit: as for :meth:`list_instances`.
            page_token: as for :meth:`list_instances`.

        Raises:
            InvalidFilterError: a path or a value can't be used; also a ``ValueError``.
        """
        return await self._reading.pages.list_instances(
            input_filters=filters,
            workflow_name=workflow_name,
            status=status,
            limit=limit,
            page_token=page_token,
        )

    async def iter_instances(
        self,
        *,
        workflow_name: str | None = None,
        status: Status | str | None = None,
        instance_id: str | None = None,
        started_after: datetime | None = None,
        started_before: datetime | None = None,
        filters: Mapping[str, JsonScalar] | None = None,
        page_size: int = 200,
    ) -> AsyncIterator[Instance]:
        """All instances that match, newest first, read page by page; see :meth:`list_instances`."""
        pages = self._reading.pages
        token: str | None = None
        while True:
            page = await pages.list_instances(
                workflow_name=workflow_name,
                status=status,
                instance_id=instance_id,
                started_after=started_after,
                started_before=started_before,
                input_filters=filters,
                limit=page_size,
                page_token=token,
            )
            for instance in page.instances:
                yield instance
            token = page.next_page_token
            if token is None:
                return

    async def get_history(self, instance_id: str, run: int | None = None) -> list[HistoryEvent]:
        """What is recorded of a run (by default the latest), in the order in which the workflow saw it.

        Raises:
            InstanceNotFoundError: there is no such instance.
        """
        return await self._reading.history(instance_id, run)

    # -- sending -----------------------------------------------------------------------------------

    async def send_event(
        self,
        event_type: str,
        data: Any = None,
        *,
        key: str | None = None,
        instance_id: str | None = None,
        source: str = "romancy",
        id: str | None = None,
        time: datetime | None = None,
        extensions: Mapping[str, Any] | None = None,
    ) -> bool:
        """Send an event to the workflows that wait for it. It is durable when this returns.

        An event with a key, or to one instance, is kept until somebody waits for it, for 24 hours; one without reaches
        those who wait now.

        Args:
            event_type: what happened, for example ``"payment.completed"``.
            data: anything that Romancy can store.
            key: the event's key: CloudEvents' ``subject``.
            instance_id: the one instance that it is for.
            source: who says so; with ``id`` it names the event.
            id: unique within its source; by default a new one.
            time: when it happened, aware; by default now.
            extensions: further attributes.

        Returns:
            ``False`` for an event whose source and id were known already: it counts once.

        Raises:
            SerializationError: the data can't be stored, or are too large (``PayloadTooLargeError``).
            DatabaseError: the database can't take it now; nothing was stored.

        Example:
            ``await app.send_event("payment.completed", {"amount": 17}, key="order-5")``
        """
        return await self._sending.event(event_type, data, key, instance_id, source, id, time, extensions)

    async def publish(self, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Publish a message on a channel, from outside of workflows. It is durable when this returns.

        Raises:
            ChannelModeConflictError: the channel is ``direct``; use :meth:`send_to`.
            SerializationError: the data can't be stored.
            DatabaseError: the database can't take it now; nothing was stored.
        """
        await self._sending.to_channel(channel, data, metadata)

    async def send_to(
        self, instance_id: str, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Send a message to one instance's mailbox, where it waits until it is received.

        Raises:
            ChannelModeConflictError: the channel has a mode other than ``direct``.
            SerializationError: the data can't be stored.
            DatabaseError: the database can't take it now; nothing was stored.
        """
        await self._sending.to_mailbox(instance_id, channel, data, metadata)

    # -- what is asked of instances ---------------------------------------------------------------

    async def resume(self, instance_id: str) -> None:
        """Let a suspended instance go on, from its history, with the code as it is now.

        One is enough, however often the instance was asked to rest before.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it is not suspended.
        """
        await self._requests.resume(instance_id)

    async def retry(self, instance_id: str) -> WorkflowHandle[Any]:
        """Let a failed instance go on from what made it fail: the activity is attempted anew, its retries included.

        What was recorded before stays recorded, and is not done again. Failures that the code had coped with stay as
        they are; where the code itself raised the error, it goes on from its last outcome with the code as it is now.
        A child whose failure made it fail is retried, too. Its history keeps what was taken back as ``Superseded``.

        What the instance had subscribed to, it is subscribed to again; messages that waited in its mailbox are gone,
        for it had ended. A handle that has given its outcome keeps it: take the one that this returns.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it has not failed, or its activities have been compensated.
            DatabaseError: the database can't take it now; nothing was stored, unless the error says that it is unsure.

        Example:
            ``result = await (await app.retry("order-5")).result()``
        """
        await self._requests.retry(instance_id)
        return await self.get_handle(instance_id)

    async def fork(self, instance_id: str, *, from_activity: str, id: str | None = None) -> WorkflowHandle[Any]:
        """Start a new instance with the history of another up to an activity, which it does anew, and all after it.

        The other may have ended or not, and is left as it is. The new one has the same workflow, input, random numbers
        and recorded outcomes, but an id, and so idempotency keys, of its own.

        Args:
            instance_id: the other.
            from_activity: the first call whose outcome is not taken over, such as ``"charge:1"``; see
                :meth:`get_history`. It may also be another recorded operation, such as ``"event:1"``.
            id: the id of the new instance; by default a new UUID. The same call again returns the same instance.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: its latest run has not recorded this activity; or it had started a child that still
                runs, whose end it alone will hear of.
            InstanceConflictError: the id belongs to another instance.
            DatabaseError: the database can't take it now; nothing was stored, unless the error says that it is unsure.

        Example:
            ``handle = await app.fork("order-5", from_activity="charge:1")``
        """
        return await self.get_handle(await self._requests.fork(instance_id, from_activity, id))

    async def cancel(self, instance_id: str, reason: str | None = None) -> bool:
        """Ask an instance to end; the request is durable when this returns, and the first one counts.

        What the workflow awaits raises ``asyncio.CancelledError``, so ``finally`` blocks may run activities; then what
        it has done is compensated, and its status is ``cancelled``. A running ``async def`` activity is cancelled,
        too; a plain ``def`` is left to finish. Never waits for the worker that owns the instance.

        Args:
            instance_id: which one.
            reason: why, for people; it ends up in the history and in the error of ``result()``.

        Returns:
            ``False``: it had ended already.

        Raises:
            InstanceNotFoundError: there is no such instance.
            DatabaseError: the database can't take it now; nothing was stored.
        """
        return await self._requests.cancel(instance_id, reason)

    async def suspend(self, instance_id: str) -> None:
        """Set an instance aside until :meth:`resume`, or :meth:`cancel`; what it waits for is kept for it.

        The request is durable when this returns; the worker that has the instance sees to it.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it has ended.
        """
        await self._requests.suspend(instance_id)

    async def wait_for(self, outcome: Outcome, timeout: Seconds | None) -> StateRow:
        """See :class:`romancy.handle.HandleHost`."""
        self._life.check_running()
        check_no_open_transaction("wait for a result")
        self._life.poller.look_for(outcome.instance_id)
        return await (outcome.wait() if timeout is None else outcome.wait_within(timeout))
