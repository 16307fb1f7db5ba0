"""Reading instances page by page, on connections of their own: such a query may have to look at a whole table."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Row, Select, and_, or_, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from romancy.errors import InvalidFilterError, InvalidPageTokenError
from romancy.model import HistoryEvent, Instance, InstancePage, Status, to_micros
from romancy.storage.failures import database_error
from romancy.storage.filters import JsonScalar, contains, input_matches
from romancy.storage.lookups import get_history, get_instance, instance_of
from romancy.storage.mail_desk import Execute, on_connection
from romancy.storage.rows import InstanceRow
from romancy.storage.schema import instances

T = TypeVar("T")

MAX_LIMIT = 1_000

_INSTANCE = [instances.c[name] for name in InstanceRow._fields]


class Queries:
    """The read side of one database; opens connections as they are needed.

    Args:
        make_engine: makes what reads, when it is first needed.
        name: how messages call the database.
        dialect: how SQLAlchemy calls its SQL.
    """

    def __init__(self, make_engine: Callable[[], AsyncEngine], name: str, dialect: str) -> None:
        self._make_engine = make_engine
        self._engine: AsyncEngine | None = None
        self._name = name
        self._dialect = dialect

    async def dispose(self) -> None:
        """Close all connections."""
        if self._engine is not None:
            await self._engine.dispose()

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance, or ``None``."""
        return await self._look_up(lambda execute: get_instance(execute, instance_id))

    async def get_history(self, instance_id: str, run: int) -> list[HistoryEvent]:
        """The recorded events of a run, in order."""
        return await self._look_up(lambda execute: get_history(execute, instance_id, run))

    async def _look_up(self, ask: Callable[[Execute], T]) -> T:
        async with self._connect() as connection:
            return await connection.run_sync(lambda inner: ask(on_connection(inner)))

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
        page = tuple(instance_of(InstanceRow._make(row)) for row in rows[:limit])
        token = _token(rows[limit - 1], query) if has_more else None
        return InstancePage(page, has_more, token)

    async def _fetch(self, statement: Select[Any]) -> list[Row[Any]]:
        async with self._connect() as connection:
            return list((await connection.execute(statement)).fetchall())

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[AsyncConnection]:
        if self._engine is None:
            self._engine = self._make_engine()
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
