"""The engine's statements, written once in SQLAlchemy Core and compiled once for the driver."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, TypeVar

from sqlalchemy import (
    BindParameter,
    ColumnElement,
    Table,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    literal,
    null,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import ClauseElement

from romancy.model import WAITING, HistoryKind, Status
from romancy.storage.mail import CANCEL
from romancy.storage.rows import CLAIMED_COLUMNS, HistoryRow, StateRow, WorkerRow
from romancy.storage.schema import deliveries, history, instances, workers

CHUNKS = (256, 64, 16, 4, 1)
"""Rows a statement of several rows may carry: few sizes, so that few statements are prepared."""


MOST_ADDRESSEES = 50
"""Instances that are claimed for their mail at a time."""

VALUE_BYTES = 24
"""A number, or what stands around a text."""

ESCAPED = (b"'", b'"', b"\\", b"\0", b"\n", b"\r", b"\x1a")
"""Characters before which MySQL's drivers put a backslash."""

Row = TypeVar("Row", bound=Sequence[Any])

_given_at_first = (
    select(history.c.result)
    .where(
        history.c.instance_id == instances.c.instance_id,
        history.c.run == 1,
        history.c.kind == HistoryKind.WORKFLOW_RECURRED.value,
    )
    .scalar_subquery()
)
FIRST_INPUT: ColumnElement[str] = case(
    (instances.c.run == 1, instances.c.input), else_=func.coalesce(_given_at_first, instances.c.input)
)
"""What an instance was started with; ``input`` is the current run's. The end of the first run keeps it."""


class Prepared:
    """A statement for one dialect, compiled when it is first wanted; called with its parameters, it gives what the
    driver takes."""

    __slots__ = ("_compiled", "_dialect", "_statement")

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        self._statement = statement
        self._dialect = dialect
        self._compiled: tuple[str, tuple[str, ...], dict[str, Any]] | None = None

    def __call__(self, **parameters: Any) -> tuple[str, tuple[Any, ...]]:
        sql, order, defaults = self._compiled or self._compile()
        given = {**defaults, **parameters}
        return sql, tuple(given[name] for name in order)

    def _compile(self) -> tuple[str, tuple[str, ...], dict[str, Any]]:
        # Two threads may do it at once: they get the same.
        made: Any = self._statement.compile(dialect=self._dialect, compile_kwargs={"render_postcompile": True})
        defaults = {name: value for name, value in made.params.items() if value is not None}
        self._compiled = compiled = (str(made), tuple(made.positiontup or ()), defaults)
        return compiled


class ManyRows:
    """One statement for many rows: ``prefix VALUES (…), (…) suffix``, in a few prepared sizes.

    Args:
        prefix: what stands before ``VALUES``.
        width: values a row.
        suffix: what stands after the rows.
        mark: the driver's placeholder.
    """

    __slots__ = ("_by_size", "_width")

    def __init__(self, prefix: str, width: int, suffix: str = "", mark: str = "?") -> None:
        self._width = width
        row = "(" + ",".join([mark] * width) + ")"
        self._by_size = {size: f"{prefix} VALUES {','.join([row] * size)} {suffix}" for size in CHUNKS}

    def pieces(
        self, rows: Sequence[tuple[Any, ...]], most_bytes: int | None = None
    ) -> list[tuple[str, list[Any], int]]:
        """The statements for these rows: text, parameters and number of rows of each.

        Args:
            rows: what to write.
            most_bytes: what the server takes at once.
        """
        pieces: list[tuple[str, list[Any], int]] = []
        for group in fitting(rows, most_bytes):
            self._add_pieces(pieces, group)
        return pieces

    def _add_pieces(self, pieces: list[tuple[str, list[Any], int]], rows: Sequence[tuple[Any, ...]]) -> None:
        start, left = 0, len(rows)
        for size in CHUNKS:
            while left >= size:
                flat = [value for row in rows[start : start + size] for value in row]
                pieces.append((self._by_size[size], flat, size))
                start += size
                left -= size


def fitting(rows: Sequence[Row], most_bytes: int | None) -> Iterator[Sequence[Row]]:
    """These rows in groups, none of which takes more bytes as part of a statement; a row that does stands alone."""
    if most_bytes is None or sum(map(_at_most_bytes, rows)) <= most_bytes:
        yield rows
        return
    start, taken = 0, 0
    for n, row in enumerate(rows):
        size = bytes_of(row)
        if taken + size > most_bytes and n > start:
            yield rows[start:n]
            start, taken = n, 0
        taken += size
    yield rows[start:]


def _at_most_bytes(row: Sequence[Any]) -> int:
    """A quick guess from above: no character takes more than four bytes, or two when it is escaped.

    The engine's rows hold texts and numbers only.
    """
    return 4 * sum([len(value) for value in row if value.__class__ is str]) + VALUE_BYTES * len(row)


def bytes_of(row: Sequence[Any]) -> int:
    """How many bytes these values take as part of a statement's text, escaped where they must be."""
    return sum(_text_bytes(value) if isinstance(value, str | bytes) else 0 for value in row) + VALUE_BYTES * len(row)


def _text_bytes(value: str | bytes) -> int:
    data = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else value
    return len(data) + sum(data.count(character) for character in ESCAPED)


def insert_into(table: Table, fields: tuple[str, ...]) -> str:
    """The beginning of an ``INSERT`` of these columns."""
    assert all(field in table.c for field in fields)
    return f"INSERT INTO {table.name} ({', '.join(fields)})"


class Statements:
    """The statements that are the same on all databases, compiled for one of them.

    Args:
        dialect: whose SQL to write; its parameter style must be positional.
        workflow_names: the workflows that this app can run, for claims.
        clock: the server's time in microseconds since the epoch; NULL where all processes share a machine.
        guard: a condition that is always true, and bounds on the way how long a statement that is a transaction of
            its own waits for a lock.
    """

    def __init__(
        self,
        dialect: Dialect,
        workflow_names: Sequence[str],
        clock: ColumnElement[Any],
        guard: ColumnElement[bool] | None = None,
    ) -> None:
        def prepare(statement: ClauseElement) -> Prepared:
            return Prepared(statement, dialect)

        me: BindParameter[str] = bindparam("me")
        now: BindParameter[int] = bindparam("now")
        alive = and_(workers.c.worker_id == me, workers.c.state == "alive")
        self.fence = prepare(select(literal(1)).select_from(workers).where(alive).with_for_update(read=True))
        guarded = true() if guard is None else guard
        self.renew = prepare(update(workers).where(alive, guarded).values(lease_until=bindparam("lease_until")))
        self.register = prepare(insert(workers))
        self.deregister = prepare(delete(workers).where(workers.c.worker_id == me))
        self.bury = prepare(
            update(workers)
            .where(
                workers.c.worker_id == bindparam("worker_id"),
                workers.c.state == "alive",
                or_(workers.c.lease_until < now, literal(1) == bindparam("is_gone")),
                guarded,
            )
            .values(state="dead")
        )
        names: list[BindParameter[str]] = [bindparam(f"name_{n}", name) for n, name in enumerate(workflow_names)]
        known = instances.c.workflow_name.in_(names) if names else false()
        next_due = (
            select(func.min(instances.c.ready_at))
            .where(
                instances.c.owner.is_(None),
                instances.c.ready_at.is_not(None),
                instances.c.completed_at.is_(None),
                known,
            )
            .scalar_subquery()
        )
        has_news = select(func.min(deliveries.c.instance_id)).scalar_subquery()
        self.scan = prepare(select(*[workers.c[field] for field in WorkerRow._fields], has_news, next_due, clock))
        self.now = prepare(select(clock))
        self.next_due = prepare(select(next_due))

        free = and_(instances.c.owner.is_(None), instances.c.completed_at.is_(None))
        limit: BindParameter[int] = bindparam("limit")
        claimed = select(*[instances.c[field] for field in CLAIMED_COLUMNS])
        self.find_ready = prepare(
            claimed.where(free, instances.c.ready_at <= now, known)
            .order_by(instances.c.ready_at)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
        of_dead = and_(instances.c.owner == bindparam("worker_id"), instances.c.completed_at.is_(None))
        self.find_of_dead = prepare(claimed.where(of_dead, known).limit(limit).with_for_update(skip_locked=True))
        self.find_claimed = prepare(claimed.where(instances.c.owner == me, instances.c.updated_at == now))
        ids: list[BindParameter[str]] = [bindparam(f"id_{n}") for n in range(MOST_ADDRESSEES)]
        # Mail does not wake what was set aside; but nothing keeps an instance from ending that was asked to. Where its
        # code does not fit, it was parked with an error: it can only end once that is mended.
        is_cancelled = and_(
            instances.c.error.is_(None),
            select(literal(1))
            .where(
                deliveries.c.instance_id == instances.c.instance_id,
                deliveries.c.run == 0,
                deliveries.c.operation_id == CANCEL,
            )
            .exists(),
        )
        may_wake = or_(instances.c.status != Status.SUSPENDED.value, is_cancelled)
        self.find_addressed = prepare(
            claimed.where(free, instances.c.instance_id.in_(ids), known, may_wake).with_for_update(skip_locked=True)
        )
        self.lock_worker = prepare(select(literal(1)).select_from(workers).where(alive).with_for_update())
        self.read_event = prepare(
            select(history.c.kind).where(
                history.c.instance_id == bindparam("instance_id"),
                history.c.run == bindparam("run"),
                history.c.seq == bindparam("seq"),
            )
        )
        self.read_state = prepare(
            select(*[instances.c[field] for field in StateRow._fields], instances.c.created_at).where(
                instances.c.instance_id == bindparam("instance_id")
            )
        )
        statuses: list[BindParameter[str]] = [bindparam(f"waiting_{n}", s.value) for n, s in enumerate(WAITING)]
        waiting = instances.c.status.in_(statuses)
        self.release = prepare(
            update(instances)
            .where(of_dead)
            .values(
                owner=null(),
                ready_at=case((waiting, func.coalesce(instances.c.ready_at, 0)), else_=0),
                status=case(
                    (instances.c.status == Status.RUNNING.value, Status.PENDING.value),
                    else_=instances.c.status,
                ),
                updated_at=now,
            )
        )
        self.forget_worker = prepare(
            delete(workers).where(
                workers.c.worker_id == bindparam("worker_id"),
                workers.c.state == "dead",
                ~select(literal(1)).select_from(instances).where(of_dead).exists(),
            )
        )
        self.resume = prepare(
            update(instances)
            .where(
                instances.c.instance_id == bindparam("instance_id"),
                instances.c.status == Status.SUSPENDED.value,
                guarded,
            )
            .values(status=Status.PENDING.value, ready_at=0, error=null(), claims=0, updated_at=now)
        )
        self.read_history = prepare(
            select(*[history.c[field] for field in HistoryRow._fields])
            .where(
                history.c.instance_id == bindparam("instance_id"),
                history.c.run == bindparam("run"),
                history.c.seq > bindparam("after"),
            )
            .order_by(history.c.seq)
            .limit(limit)
        )
        self.read_start = prepare(
            select(instances.c.workflow_name, FIRST_INPUT, instances.c.parent_id).where(
                instances.c.instance_id == bindparam("instance_id")
            )
        )


@lru_cache(maxsize=64)
def statements_for(
    dialect: Dialect,
    workflow_names: tuple[str, ...],
    clock: ColumnElement[Any],
    guard: ColumnElement[bool] | None = None,
) -> Statements:
    """The statements for this dialect, the same for all apps of the process that can run the same workflows."""
    return Statements(dialect, workflow_names, clock, guard)
