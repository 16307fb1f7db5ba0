"""Reading instances and histories, page by page."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Row, Select, and_, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from romancy.errors import InvalidFilterError, InvalidPageTokenError
from romancy.failures import decode_info
from romancy.model import (
    HistoryEvent,
    HistoryKind,
    Instance,
    InstancePage,
    PendingActivity,
    Status,
    from_micros,
    to_micros,
)
from romancy.serde import load_json
from romancy.storage.failures import database_error
from romancy.storage.filters import JsonScalar, contains, input_matches
from romancy.storage.mail import NEVER_US
from romancy.storage.rows import StateRow
from romancy.storage.schema import history, instances

MAX_LIMIT = 1_000
IDS_PER_QUERY = 500

_TOLD = (HistoryKind.ACTIVITY_RETRY_SCHEDULED.value, HistoryKind.ACTIVITY_HEARTBEAT.value)
"""What history has of an activity before its outcome."""

_INSTANCE = [
    instances.c[name]
    for name in (
        "instance_id",
        "run",
        "workflow_name",
        "status",
        "owner",
        "ready_at",
        "claims",
        "created_at",
        "started_at",
        "updated_at",
        "completed_at",
        "source_hash",
        "input",
        "result",
        "error",
    )
]


class Queries:
    """The read side of one database; opens connections as they are needed.

    Args:
        engine: reads; its connections open as they are needed.
        name: how messages call the database.
    """

    def __init__(self, engine: AsyncEngine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._dialect = engine.dialect.name

    async def dispose(self) -> None:
        """Close all connections."""
        await self._engine.dispose()

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance, or ``None``."""
        async with self._connect() as connection:
            row = (await connection.execute(select(*_INSTANCE).where(instances.c.instance_id == instance_id))).first()
            if row is None:
                return None
            instance = _instance(row)
            if not instance.status.is_terminal:
                instance = replace(instance, pending=await self._pending(connection, instance_id, instance.run))
        return instance

    async def _pending(self, connection: AsyncConnection, instance_id: str, run: int) -> tuple[PendingActivity, ...]:
        """Activities with failed attempts or heartbeats, and no outcome."""
        of_run = and_(history.c.instance_id == instance_id, history.c.run == run)
        told = select(*history.c).where(of_run, history.c.kind.in_(_TOLD)).order_by(history.c.seq)
        found: dict[str, list[Row[Any]]] = {}
        for row in await connection.execute(told):
            found.setdefault(row.operation_id, []).append(row)
        last = {activity_id: rows[-1].seq for activity_id, rows in found.items()}
        ids = list(last)
        for start in range(0, len(ids), IDS_PER_QUERY):
            of_these = history.c.operation_id.in_(ids[start : start + IDS_PER_QUERY])
            ended = select(history.c.operation_id, history.c.seq).where(of_run, of_these, history.c.kind.not_in(_TOLD))
            for row in await connection.execute(ended):
                if row.seq > last[row.operation_id]:
                    found.pop(row.operation_id, None)
        return tuple(_pending_activity(rows) for rows in found.values())

    async def get_outcomes(self, instance_ids: Iterable[str]) -> list[StateRow]:
        """The state of those of these instances that have ended or are suspended."""
        ids = list(instance_ids)
        ended = or_(instances.c.completed_at.is_not(None), instances.c.status == Status.SUSPENDED.value)
        columns = [instances.c[name] for name in StateRow._fields]
        found: list[StateRow] = []
        async with self._connect() as connection:
            for start in range(0, len(ids), IDS_PER_QUERY):
                part = ids[start : start + IDS_PER_QUERY]
                rows = await connection.execute(select(*columns).where(instances.c.instance_id.in_(part), ended))
                found += [StateRow._make(row) for row in rows]
        return found

    async def list_instances(
        self,
        *,
        workflow_name: str | None = None,
        status: Status | str | None = None,
        instance_id: str | None = None,
        started_after: datetime | None = None,
        started_before: datetime | None = None,
        input_filters: Mapping[str, JsonScalar] | None = None,
        limit: int = 50,
        page_token: str | None = None,
    ) -> InstancePage:
        """A page of instances, newest first; see :meth:`romancy.App.list_instances`."""
        if isinstance(limit, bool) or not isinstance(limit, int) or not 1 <= limit <= MAX_LIMIT:
            raise InvalidFilterError(f"limit={limit!r}: give a whole number from 1 to {MAX_LIMIT}")
        conditions: list[ColumnElement[bool]] = []
        if workflow_name is not None:
            conditions.append(contains(instances.c.workflow_name, workflow_name, self._dialect))
        if instance_id is not None:
            conditions.append(contains(instances.c.instance_id, instance_id, self._dialect))
        if status is not None:
            conditions.append(instances.c.status == _status(status).value)
        if started_after is not None:
            conditions.append(instances.c.created_at > _time("started_after", started_after))
        if started_before is not None:
            conditions.append(instances.c.created_at < _time("started_before", started_before))
        if input_filters is not None:
            conditions.append(input_matches(input_filters, self._dialect))
        # Equal queries, however they are written, share their page tokens.
        query = _query_digest(
            workflow_name,
            None if status is None else _status(status).value,
            instance_id,
            None if started_after is None else to_micros(started_after),
            None if started_before is None else to_micros(started_before),
            None if input_filters is None else sorted(input_filters.items()),
        )
        if page_token is not None:
            conditions.append(_after(page_token, query))
        statement = (
            select(*_INSTANCE)
            .where(and_(True, *conditions))
            .order_by(instances.c.created_at.desc(), instances.c.instance_id.desc())
            .limit(limit + 1)
        )
        rows = await self._fetch(statement)
        has_more = len(rows) > limit
        page = tuple(_instance(row) for row in rows[:limit])
        token = _token(rows[limit - 1], query) if has_more else None
        return InstancePage(page, has_more, token)

    async def get_history(self, instance_id: str, run: int | None = None) -> list[HistoryEvent]:
        """The recorded events of a run (by default the latest), in order."""
        if run is None:
            instance = await self.get_instance(instance_id)
            if instance is None:
                return []
            run = instance.run
        statement = (
            select(*history.c).where(history.c.instance_id == instance_id, history.c.run == run).order_by(history.c.seq)
        )
        return [_event(row) for row in await self._fetch(statement)]

    async def _fetch(self, statement: Select[Any]) -> list[Row[Any]]:
        async with self._connect() as connection:
            return list((await connection.execute(statement)).fetchall())

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncConnection]:
        try:
            async with self._engine.connect() as connection:
                yield connection
        except SQLAlchemyError as error:
            raise database_error(error, self._name) from error


def _time(name: str, value: datetime) -> int:
    try:
        return to_micros(value)
    except (ValueError, AttributeError, TypeError) as error:
        raise InvalidFilterError(f"{name}={value!r}: give an aware datetime ({error})") from None


def _status(status: Status | str) -> Status:
    try:
        return Status(status)
    except ValueError:
        raise InvalidFilterError(f"status={status!r}: give one of {', '.join(Status)}") from None


def _query_digest(*parts: object) -> str:
    text = repr(parts)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:12]


def _token(row: Row[Any], query: str) -> str:
    text = json.dumps([row.created_at, row.instance_id, query])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _after(token: str, query: str) -> ColumnElement[bool]:
    """Everything that comes after the last row of the page before."""
    try:
        text = base64.urlsafe_b64decode(token.encode() + b"=" * (-len(token) % 4))
        created_at, instance_id, of_query = json.loads(text)
    except (ValueError, TypeError, AttributeError):
        created_at = instance_id = of_query = None
    if not isinstance(created_at, int) or not isinstance(instance_id, str):
        raise InvalidPageTokenError(f"page_token={token!r} is none: pass next_page_token of the page before")
    if of_query != query:
        raise InvalidPageTokenError(
            f"page_token={token!r} belongs to another query: repeat the filters of the first page, or begin anew"
        )
    return or_(
        instances.c.created_at < created_at,
        and_(instances.c.created_at == created_at, instances.c.instance_id < instance_id),
    )


def _instance(row: Row[Any]) -> Instance:
    return Instance(
        instance_id=row.instance_id,
        run=row.run,
        workflow_name=row.workflow_name,
        status=Status(row.status),
        input=load_json(row.input),
        result=None if row.result is None else load_json(row.result),
        error=None if row.error is None else decode_info(row.error),
        worker_id=row.owner,
        created_at=from_micros(row.created_at),
        started_at=None if row.started_at is None else from_micros(row.started_at),
        updated_at=from_micros(row.updated_at),
        completed_at=None if row.completed_at is None else from_micros(row.completed_at),
        next_wake_at=from_micros(row.ready_at) if row.ready_at and row.ready_at < NEVER_US else None,
        claims=row.claims,
        source_hash=row.source_hash,
    )


def _pending_activity(rows: list[Row[Any]]) -> PendingActivity:
    failed = next((row for row in reversed(rows) if row.kind == HistoryKind.ACTIVITY_RETRY_SCHEDULED), None)
    heartbeat = next((row for row in rows if row.kind == HistoryKind.ACTIVITY_HEARTBEAT), None)
    return PendingActivity(
        activity_id=rows[0].operation_id,
        name=rows[0].name,
        attempts=0 if failed is None else failed.attempt,
        last_error=None if failed is None else decode_info(failed.error),
        next_attempt_at=None if failed is None else from_micros(failed.due_at),
        heartbeat=None if heartbeat is None else load_json(heartbeat.result),
        heartbeat_at=None if heartbeat is None else from_micros(heartbeat.at),
    )


def _event(row: Row[Any]) -> HistoryEvent:
    kind = HistoryKind(row.kind)
    # A scheduled retry has a number there that is the engine's own.
    result: str | None = None if kind is HistoryKind.ACTIVITY_RETRY_SCHEDULED else row.result
    return HistoryEvent(
        instance_id=row.instance_id,
        run=row.run,
        seq=row.seq,
        kind=kind,
        activity_id=row.operation_id,
        name=row.name,
        attempt=row.attempt,
        input=None if row.input is None else load_json(row.input),
        result=None if result is None else load_json(result),
        error=None if row.error is None else decode_info(row.error),
        at=from_micros(row.at),
        next_attempt_at=None if row.due_at is None else from_micros(row.due_at),
    )
