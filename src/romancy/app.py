"""The composition root: ``App`` opens the database, runs a worker, and is what users call."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator, Iterable, Mapping
from datetime import datetime
from enum import Enum
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar, overload

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from romancy.clock import Clock, SystemClock
from romancy.context import CURRENT_ACTIVITY
from romancy.definitions import DEFAULT_CATALOGUE, Catalogue, Workflow
from romancy.engine.messaging import mode_conflict
from romancy.engine.worker import LONGEST_FAREWELL_S, Worker
from romancy.envelopes import EventHead, checked_name, checked_time, encode_data, message_body
from romancy.errors import (
    AppNotRunningError,
    ConfigurationError,
    DatabaseError,
    FencedError,
    InstanceConflictError,
    InstanceStateError,
    ResultTimeoutError,
    SessionError,
    UnknownWorkflowError,
)
from romancy.handle import WorkflowHandle, not_found
from romancy.ids import IdSource
from romancy.model import HistoryEvent, Instance, InstancePage, Status
from romancy.outcomes import Outcome, Outcomes
from romancy.retry import RetryPolicy, Seconds, as_seconds
from romancy.serde import check_size, dump_plain
from romancy.starting import check_same, checked_id, pending_row
from romancy.storage.address import parse_address
from romancy.storage.again import Fork
from romancy.storage.filters import JsonScalar
from romancy.storage.given import GivenEngines
from romancy.storage.joining import after_commit, insert_start
from romancy.storage.mail import CANCEL, SUSPEND, Post
from romancy.storage.posting import event_mail, message_mail, request_mail
from romancy.storage.queries import Queries
from romancy.storage.rows import StartRow, StateRow
from romancy.storage.sessions import SessionEngines
from romancy.storage.store import Store
from romancy.storage.stores import make_queries, make_store
from romancy.storage.writer import Writer

logger = logging.getLogger("romancy.app")

R = TypeVar("R")
A = TypeVar("A")
B = TypeVar("B")

DEFAULT_PAYLOAD_BYTES = 2 * 1024 * 1024
OUTCOME_POLL_S = 1.0
SHORTEST_POLL_S = 0.02


class Default(Enum):
    """What stands for an option that was not given."""

    DATABASE = "romancy.db"


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
        max_overflow: how many more may be opened while those are all in use; by default 20, on SQLite 10. With 0, an
            attempt that finds none free within 30 s is made again, and does not count.
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
        self._given = GivenEngines(engine, sync_engine)
        if not isinstance(database, Default):
            self.address = parse_address(database)
        else:
            self.address = self._given.address() if self._given else parse_address(database.value)
        self._given.check(self.address)
        self._listen_on = None if listen_on is None else parse_address(listen_on)
        self._pool = _pool_options(pool_size, max_overflow, self._given)
        self.name = worker_id or f"{socket.gethostname()}-{os.getpid()}"
        self.default_retry = default_retry or RetryPolicy.default()
        self.max_payload_bytes = _positive("max_payload_bytes", max_payload_bytes)
        self.lease_ttl_s = as_seconds(lease_ttl, "lease_ttl")
        if self.lease_ttl_s < 0.1:
            raise ConfigurationError(f"lease_ttl={lease_ttl!r} is too short: give at least 0.1 s")
        self.shutdown_grace_s = as_seconds(shutdown_grace, "shutdown_grace")
        self.max_instances = _positive("max_instances", max_instances)
        self.max_hot_instances = _positive("max_hot_instances", max_hot_instances)
        self.max_activities = _positive("max_activities", max_activities)
        self.activity_threads = _positive("activity_threads", activity_threads)
        self.stall_warning_s = as_seconds(stall_warning, "stall_warning")
        self.event_retention_us = round(as_seconds(event_retention, "event_retention") * 1_000_000)
        self._workflows = None if workflows is None else Catalogue.of(workflows)
        self._has_worker = worker
        self._auto_migrate = auto_migrate
        self._given_clock = clock
        self._clock: Clock = clock or SystemClock()
        self._ids = IdSource()
        self._outcomes = Outcomes()
        self._process_id: int | None = None
        self._broken: DatabaseError | None = None
        self._known: dict[str, Workflow[..., Any]] = {}
        self._worker: Worker | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._poller: asyncio.Task[None] | None = None
        self._poller_rests = True
        self._store: Store
        self._engines: SessionEngines
        self._queries: Queries
        self._writer: Writer
        self._catalogue: Catalogue
        self._poll_wanted: asyncio.Event

    # -- life --------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open the database, bring its tables up to date, and begin to run workflows.

        Raises:
            DatabaseError: the database can't be opened, or is not fit for durable work.
            InstanceStateError: the app is running already.
            AppNotRunningError: it runs in the process that this one was forked from.
        """
        self._check_not_forked()
        if self._process_id is not None:
            raise InstanceStateError("this app is running already: start it once, or make another App")
        self._catalogue = self._workflows or DEFAULT_CATALOGUE
        self._known = self._catalogue.workflows
        self._store = make_store(self.address, list(self._known), self._listen_on, self.lease_ttl_s)
        await asyncio.to_thread(self._store.open, self._auto_migrate)
        self._clock = self._store.workflow_clock = self._given_clock or self._store.clock
        self._process_id = os.getpid()
        self._broken = None
        self._poll_wanted = asyncio.Event()
        self._engines = SessionEngines(self._store, self._given, self._pool)
        self._queries = make_queries(self._store)
        try:
            await self._engines.check_given()
            if self._has_worker:
                await self._begin_worker()
            else:
                self._writer = Writer(self._store, None, self._on_client_stopped, self._on_post)
        except BaseException:
            await self._close()
            raise
        self._poller = asyncio.get_running_loop().create_task(self._poll_outcomes(), name="romancy-outcomes")

    async def shutdown(self) -> None:
        """Stop in good order: no new work, running activities may end, the rest goes back for others at once.

        Raises:
            AppNotRunningError: it runs in the process that this one was forked from, and is left alone.
        """
        self._check_not_forked()
        if self._process_id is None:
            return
        try:
            if self._worker is not None:
                await self._worker.stop(self.shutdown_grace_s)
            else:
                async with asyncio.timeout(LONGEST_FAREWELL_S):
                    await self._writer.drained()
        except TimeoutError:
            logger.warning("nothing could be written within %.0f s; what waited is given up", LONGEST_FAREWELL_S)
            self._store.give_up()
        finally:
            await self._close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.shutdown()

    async def _begin_worker(self) -> None:
        worker = Worker(self, self._store, self._engines, self._catalogue, self._clock, self._store.clock, self)
        await worker.start()
        self._worker, self._writer = worker, worker.writer

    async def _close(self) -> None:
        self._process_id = None
        stopped = AppNotRunningError("the app has shut down; the instance goes on when an app starts again")
        if self._writer_or_none() is not None:
            self._writer.stop(DatabaseError("the app has shut down"))
        self._worker = None
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if self._poller is not None:
            # Not cancelled: a query cut off in the middle would leave its connection's thread behind.
            self._poll_wanted.set()
            tasks.append(self._poller)
        if tasks:
            _, stuck = await asyncio.wait(tasks, timeout=LONGEST_FAREWELL_S)
            if stuck:
                self._store.cut_all()
                await asyncio.wait(stuck, timeout=LONGEST_FAREWELL_S)
        self._poller = None
        self._outcomes.fail_all(stopped)
        await self._queries.dispose()
        await self._engines.dispose()
        await asyncio.to_thread(self._store.close)

    def _writer_or_none(self) -> Writer | None:
        return getattr(self, "_writer", None)

    def _spawn(self, body: Any) -> None:
        task = asyncio.get_running_loop().create_task(body)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)

    def _on_task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("a background task of the app failed in an unforeseen way", exc_info=task.exception())

    # -- what the worker tells ---------------------------------------------------------------------

    def on_ended(self, state: StateRow) -> None:
        """See :class:`romancy.engine.worker.WorkerListener`."""
        self._outcomes.settle(state)

    def on_foreign_change(self) -> None:
        """See :class:`romancy.engine.worker.WorkerListener`."""
        self._poll_wanted.set()

    def on_worker_lost(self, error: DatabaseError) -> None:
        """See :class:`romancy.engine.worker.WorkerListener`."""
        if self._process_id is None:
            return
        if isinstance(error, FencedError):
            self._spawn(self._replace_worker())
        else:
            self._break(error)

    def _on_client_stopped(self, error: DatabaseError) -> None:
        if self._process_id is not None:
            self._break(error)

    def _break(self, error: DatabaseError) -> None:
        self._broken = error
        self._outcomes.fail_all(error)
        if self._worker is not None:
            self._spawn(self._let_go(self._worker))

    async def _let_go(self, worker: Worker) -> None:
        """Others may take over at once what this worker can no longer record."""
        await worker.abandon()
        try:
            await asyncio.wrap_future(self._store.leave(worker.worker_id, self._clock.now_us()))
        except DatabaseError as error:
            logger.info("the instances could not be handed back, and wait for the end of the lease: %s", error)

    async def _replace_worker(self) -> None:
        """A lost lease ends a worker, not the app: begin another life under a fresh id."""
        lost, self._worker = self._worker, None
        if lost is not None:
            await lost.abandon()
        while self._process_id is not None:
            try:
                await self._begin_worker()
            except DatabaseError as error:
                logger.warning("no new worker can begin: %s", error)
                await asyncio.sleep(0.5)
            else:
                return

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
        self._check_running()
        definition = self._definition(workflow)
        given = definition.signature.encode_input(args, kwargs)
        text = given.text
        check_size(f"the input of workflow {definition.name!r}", [text], self.max_payload_bytes)
        instance_id = self._ids.new_id() if id is None else checked_id(id)
        now = self._clock.now_us()
        if session is not None:
            await self._start_in(session, definition, instance_id, text, now)
            return WorkflowHandle(self, self._outcomes.of(instance_id), definition)
        _check_no_open_transaction("start a workflow")
        worker = self._worker
        if worker is not None and worker.reserve_room():
            row = StartRow(
                instance_id, 1, definition.name, Status.RUNNING.value, worker.worker_id, None, 0, now, now, now,
                definition.source_hash, text,
            )  # fmt: skip
            is_new = await worker.writer.start(row, id is not None, partial(worker.on_start_settled, row, given))
        else:
            row = pending_row(instance_id, definition, text, now)
            is_new = await self._writer.start(row, id is not None, self._on_pending_settled)
        if not is_new:
            await self._check_same_start(instance_id, definition, text)
        return WorkflowHandle(self, self._outcomes.of(instance_id), definition)

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
        self._hint_worker()
        self._store.tell_others()

    def _on_pending_settled(self, is_new: bool) -> None:
        if is_new:
            self._hint_worker()

    def _hint_worker(self) -> None:
        if self._worker is not None:
            self._worker.hint()

    def _definition(self, workflow: Workflow[..., Any] | str) -> Workflow[..., Any]:
        name = workflow if isinstance(workflow, str) else getattr(workflow, "name", None)
        known = self._known.get(name) if isinstance(name, str) else None
        if known is None:
            if name in self._catalogue.workflows:
                raise UnknownWorkflowError(
                    f"workflow {name!r} was defined after the app started: define workflows (import their modules) "
                    f"before app.start()"
                )
            names = ", ".join(sorted(self._known)) or "none"
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
        found = await asyncio.wrap_future(self._store.read_start(instance_id))
        if found is None:
            raise InstanceConflictError(f"instance {instance_id!r} was there a moment ago and is gone; start it again")
        check_same(instance_id, definition, text, found)

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
        instance = await self.get_instance(instance_id)
        if instance is None:
            raise not_found(instance_id)
        definition = workflow or self._known.get(instance.workflow_name)
        return WorkflowHandle(self, self._outcomes.of(instance_id), definition)

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance as the database holds it now, or ``None``."""
        self._check_running()
        return await asyncio.wrap_future(self._store.get_instance(instance_id))

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
        self._check_running()
        return await self._queries.list_instances(
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
        self._check_running()
        return await self._queries.list_instances(
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
        self._check_running()
        token: str | None = None
        while True:
            page = await self._queries.list_instances(
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
        self._check_running()
        events = await asyncio.wrap_future(self._store.get_history(instance_id, run))
        if not events and await self.get_instance(instance_id) is None:
            raise not_found(instance_id)
        return events

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
        self._check_running()
        _check_no_open_transaction("send an event")
        text = encode_data("the data of an event", data)
        check_size("the data of an event", [text], self.max_payload_bytes)
        now_us, mail_id = self._clock.now_us(), self._ids.new_id()
        head = EventHead(
            checked_name("event_type", event_type), source, id or mail_id,
            checked_name("key", key, may_be_empty=True), checked_time(time, now_us), extensions or {},
        )  # fmt: skip
        to_id = checked_name("instance_id", instance_id, may_be_empty=True)
        expires_at = now_us + self.event_retention_us
        return await self._writer.post(event_mail(head, text, mail_id, to_id, expires_at, is_from_outside=True))

    async def publish(self, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Publish a message on a channel, from outside of workflows. It is durable when this returns.

        Raises:
            ChannelModeConflictError: the channel is ``direct``; use :meth:`send_to`.
            SerializationError: the data can't be stored.
            DatabaseError: the database can't take it now; nothing was stored.
        """
        await self._send_on(checked_name("channel", channel), None, "", data, metadata)

    async def send_to(
        self, instance_id: str, channel: str, data: Any = None, *, metadata: Mapping[str, Any] | None = None
    ) -> None:
        """Send a message to one instance's mailbox, where it waits until it is received.

        Raises:
            ChannelModeConflictError: the channel has a mode other than ``direct``.
            SerializationError: the data can't be stored.
            DatabaseError: the database can't take it now; nothing was stored.
        """
        to_id = checked_name("instance_id", instance_id)
        await self._send_on(checked_name("channel", channel), "direct", to_id, data, metadata)

    async def _send_on(
        self, channel: str, mode: str | None, to_id: str, data: Any, metadata: Mapping[str, Any] | None
    ) -> None:
        self._check_running()
        _check_no_open_transaction("send a message")
        text = encode_data("the data of a message", data)
        check_size("the data of a message", [text], self.max_payload_bytes)
        found = await asyncio.wrap_future(self._store.open_channel(None, channel, mode, None))
        if found != mode and not (mode is None and found != "direct"):
            raise mode_conflict(channel, found, mode)
        now_us, mail_id = self._clock.now_us(), self._ids.new_id()
        body = message_body(mail_id, channel, text, metadata, None, now_us)
        await self._writer.post(message_mail(mail_id, channel, to_id, body, now_us, is_from_outside=True))

    def new_id(self) -> str:
        """See :class:`romancy.engine.worker.WorkerSettings`."""
        return self._ids.new_id()

    def _on_post(self, post: Post) -> None:
        if post.deliveries:
            self._store.tell_others()

    # -- changing ----------------------------------------------------------------------------------

    async def resume(self, instance_id: str) -> None:
        """Let a suspended instance go on, from its history, with the code as it is now.

        One is enough, however often the instance was asked to rest before.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it is not suspended.
        """
        self._check_running()
        _check_no_open_transaction("resume an instance")
        if not await asyncio.wrap_future(self._store.resume(instance_id, self._clock.now_us())):
            instance = await self.get_instance(instance_id)
            if instance is None:
                raise not_found(instance_id)
            raise InstanceStateError(f"instance {instance_id!r} is {instance.status}, not suspended: nothing to resume")
        self._hint_worker()

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
        self._check_running()
        _check_no_open_transaction("retry an instance")
        try:
            await asyncio.wrap_future(self._store.retry(checked_id(instance_id), self._clock.now_us()))
        finally:
            self._outcomes.forget(instance_id)  # also where the answer was lost: it may go on
        self._hint_worker()
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
        self._check_running()
        _check_no_open_transaction("fork an instance")
        new_id = self._ids.new_id() if id is None else checked_id(id)
        mail_ids = iter(self._ids.new_id, None)
        asked = Fork(checked_id(instance_id), from_activity, new_id, mail_ids, self._clock.now_us())
        await asyncio.wrap_future(self._store.fork(asked))
        self._hint_worker()
        return await self.get_handle(new_id)

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
        instance = await self._ask(instance_id, CANCEL, {"reason": reason})
        if instance.status is Status.SUSPENDED:
            # It can only end by running its code; should that still not fit, it is parked again.
            await asyncio.wrap_future(self._store.resume(instance_id, self._clock.now_us()))
            self._hint_worker()
        return not instance.status.is_terminal

    async def suspend(self, instance_id: str) -> None:
        """Set an instance aside until :meth:`resume`, or :meth:`cancel`; what it waits for is kept for it.

        The request is durable when this returns; the worker that has the instance sees to it.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it has ended.
        """
        instance = await self._ask(instance_id, SUSPEND, {})
        if instance.status.is_terminal:
            raise InstanceStateError(f"instance {instance_id!r} is {instance.status}: there is nothing to suspend")

    async def _ask(self, instance_id: str, what: str, details: dict[str, Any]) -> Instance:
        self._check_running()
        _check_no_open_transaction(f"{what} an instance")
        instance = await self.get_instance(instance_id)
        if instance is None:
            raise not_found(instance_id)
        if not instance.status.is_terminal:
            await self._writer.post(request_mail(self._ids.new_id(), instance_id, what, dump_plain(details)))
        return instance

    # -- waiting for results -----------------------------------------------------------------------

    async def wait_for(self, outcome: Outcome, timeout: Seconds | None) -> StateRow:
        """See :class:`romancy.handle.HandleHost`."""
        self._check_running()
        _check_no_open_transaction("wait for a result")
        # What is live here may yet end elsewhere: after its eviction, or the loss of the lease.
        if self._poller_rests or self._worker is None or not self._worker.is_live(outcome.instance_id):
            self._poll_wanted.set()
        if timeout is None:
            return await outcome.wait()
        timeout_s = as_seconds(timeout, "timeout")
        try:
            async with asyncio.timeout(timeout_s):
                return await outcome.wait()
        except TimeoutError:
            raise ResultTimeoutError(
                f"instance {outcome.instance_id} has not ended within {timeout_s} s; it goes on. Wait longer, or ask "
                f"for its status()"
            ) from None

    async def _poll_outcomes(self) -> None:
        """Look for the ends of instances that run elsewhere, or ended before somebody asked."""
        wait_s = OUTCOME_POLL_S
        while self._process_id is not None:
            self._poller_rests = not self._outcomes.awaited()
            try:
                async with asyncio.timeout(None if self._poller_rests else wait_s):
                    await self._poll_wanted.wait()
            except TimeoutError:
                # What has just begun may soon end; what takes long is asked for rarely.
                wait_s = min(2 * wait_s, OUTCOME_POLL_S)
            else:
                wait_s = SHORTEST_POLL_S
            self._poll_wanted.clear()
            self._poller_rests = False
            worker = self._worker
            ids = [key for key in self._outcomes.awaited() if worker is None or not worker.is_live(key)]
            if not ids or self._process_id is None:
                continue
            try:
                states = await asyncio.wrap_future(self._store.get_outcomes(ids))
            except DatabaseError as error:
                logger.warning("results can't be read now: %s", error)
            else:
                for state in states:
                    self._outcomes.settle(state)

    def _check_not_forked(self) -> None:
        if self._process_id is not None and self._process_id != os.getpid():
            raise AppNotRunningError(
                "the app was started before this process forked, and its threads and connections are the other "
                "process's: make an App of its own here"
            )

    def _check_running(self) -> None:
        if self._process_id is None:
            raise AppNotRunningError("the app is not running: use `async with App(…) as app`, or await app.start()")
        self._check_not_forked()
        if self._broken is not None:
            raise AppNotRunningError(f"the app has stopped, for {self._broken}") from self._broken


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number of at least 1")
    return value


def _pool_options(pool_size: int | None, max_overflow: int | None, given: GivenEngines) -> dict[str, int]:
    options: dict[str, int] = {}
    if pool_size is not None:
        options["pool_size"] = _positive("pool_size", pool_size)
    if max_overflow is not None:
        if isinstance(max_overflow, bool) or not isinstance(max_overflow, int) or max_overflow < 0:
            raise ConfigurationError(f"max_overflow={max_overflow!r}: give a whole number of at least 0")
        options["max_overflow"] = max_overflow
    if options and given.for_async is not None and given.for_sync is not None:
        names = " and ".join(options)
        raise ConfigurationError(
            f"{names} would change nothing, for engine= and sync_engine= bring their own pools: set it where those are "
            f"made, or leave one of them to Romancy"
        )
    return options


def _check_no_open_transaction(what: str) -> None:
    """On SQLite an open session holds the one write lock; waiting for another write would never end."""
    current = CURRENT_ACTIVITY.get(None)
    if current is not None and current.holds_everybody_up:
        raise SessionError(
            f"activity {current.activity_id} can't {what} while its session is open, for the session holds the "
            f"database's write lock: do it before the session's first use, or in an activity of its own"
        )
