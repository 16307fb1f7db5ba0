"""The engine's statements, written once in SQLAlchemy Core and compiled once for the driver."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    BindParameter,
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
    update,
)
from sqlalchemy.engine.interfaces import Dialect
from sqlalchemy.sql.expression import ClauseElement

from romancy.model import Status
from romancy.storage.rows import ClaimedRow, HistoryRow, StartRow, WorkerRow
from romancy.storage.schema import history, instances, workers

CHUNKS = (256, 64, 16, 4, 1)
"""Rows a statement of several rows may carry: few sizes, so that few statements are prepared."""


class Prepared:
    """A statement compiled for one dialect; called with its parameters, it gives what the driver takes."""

    __slots__ = ("_defaults", "_order", "sql")

    def __init__(self, statement: ClauseElement, dialect: Dialect) -> None:
        compiled: Any = statement.compile(dialect=dialect, compile_kwargs={"render_postcompile": True})
        self.sql = str(compiled)
        self._order: Sequence[str] = tuple(compiled.positiontup or ())
        self._defaults: dict[str, Any] = {name: value for name, value in compiled.params.items() if value is not None}

    def __call__(self, **parameters: Any) -> tuple[str, tuple[Any, ...]]:
        given = {**self._defaults, **parameters}
        return self.sql, tuple(given[name] for name in self._order)


class ManyRows:
    """One statement for many rows: ``prefix VALUES (…), (…) suffix``, in a few prepared sizes."""

    __slots__ = ("_by_size", "_width")

    def __init__(self, prefix: str, width: int, suffix: str = "") -> None:
        self._width = width
        row = "(" + ",".join("?" * width) + ")"
        self._by_size = {size: f"{prefix} VALUES {','.join([row] * size)} {suffix}" for size in CHUNKS}

    def pieces(self, rows: Sequence[tuple[Any, ...]]) -> list[tuple[str, list[Any], int]]:
        """The statements for these rows: text, parameters and number of rows of each."""
        pieces: list[tuple[str, list[Any], int]] = []
        start, left = 0, len(rows)
        for size in CHUNKS:
            while left >= size:
                flat = [value for row in rows[start : start + size] for value in row]
                pieces.append((self._by_size[size], flat, size))
                start += size
                left -= size
        return pieces


def _columns(table: Table, fields: tuple[str, ...]) -> str:
    assert all(field in table.c for field in fields)
    return ", ".join(fields)


class Statements:
    """All statements of the engine, for one dialect.

    Args:
        dialect: whose SQL to write; its parameter style must be positional.
        workflow_names: the workflows that this app can run, for claims.
    """

    def __init__(self, dialect: Dialect, workflow_names: Sequence[str]) -> None:
        start_columns = _columns(instances, StartRow._fields)
        self.starts = ManyRows(f"INSERT INTO {instances.name} ({start_columns})", len(StartRow._fields))
        self.keyed_starts = ManyRows(
            f"INSERT INTO {instances.name} ({start_columns})",
            len(StartRow._fields),
            "ON CONFLICT (instance_id) DO NOTHING RETURNING instance_id",
        )
        self.history = ManyRows(
            f"INSERT INTO {history.name} ({_columns(history, HistoryRow._fields)})", len(HistoryRow._fields)
        )
        # The row itself is compared too: a worker may change only what it owns (the last column).
        self.states = ManyRows(
            f"UPDATE {instances.name} SET status = v.column2, owner = v.column3, ready_at = v.column4, "
            f"updated_at = v.column5, completed_at = v.column6, result = v.column7, error = v.column8, claims = 0 "
            f"FROM (",
            9,
            f") AS v WHERE {instances.name}.instance_id = v.column1 AND {instances.name}.owner = v.column9",
        )

        def prepare(statement: ClauseElement) -> Prepared:
            return Prepared(statement, dialect)

        me: BindParameter[str] = bindparam("me")
        now: BindParameter[int] = bindparam("now")
        alive = and_(workers.c.worker_id == me, workers.c.state == "alive")
        self.fence = prepare(select(literal(1)).select_from(workers).where(alive))
        self.renew = prepare(update(workers).where(alive).values(lease_until=bindparam("lease_until")))
        self.register = prepare(insert(workers))
        self.deregister = prepare(delete(workers).where(workers.c.worker_id == me))
        self.bury = prepare(
            update(workers)
            .where(
                workers.c.worker_id == bindparam("worker_id"),
                workers.c.state == "alive",
                or_(workers.c.lease_until < now, literal(1) == bindparam("is_gone")),
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
        self.scan = prepare(select(*[workers.c[field] for field in WorkerRow._fields], next_due))
        self.next_due = prepare(select(next_due))

        free = and_(instances.c.owner.is_(None), instances.c.completed_at.is_(None))
        limit: BindParameter[int] = bindparam("limit")
        self.claim_ready = prepare(
            self._claim(
                select(instances.c.instance_id)
                .where(free, instances.c.ready_at <= now, known)
                .order_by(instances.c.ready_at)
                .limit(limit),
                instances.c.claims,
            )
        )
        of_dead = and_(instances.c.owner == bindparam("worker_id"), instances.c.completed_at.is_(None))
        self.claim_from = prepare(
            self._claim(select(instances.c.instance_id).where(of_dead, known).limit(limit), instances.c.claims + 1)
        )
        waiting = instances.c.status == Status.WAITING_FOR_TIMER.value
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
            select(instances.c.workflow_name, instances.c.input).where(
                instances.c.instance_id == bindparam("instance_id")
            )
        )

    @staticmethod
    def _claim(chosen: Any, claims: Any) -> Any:
        return (
            update(instances)
            .where(instances.c.instance_id.in_(chosen))
            .values(
                owner=bindparam("me"),
                ready_at=null(),
                status=case(
                    (instances.c.status == Status.PENDING.value, Status.RUNNING.value),
                    else_=instances.c.status,
                ),
                claims=claims,
                started_at=func.coalesce(instances.c.started_at, bindparam("now")),
                updated_at=bindparam("now"),
            )
            .returning(*[instances.c[field] for field in ClaimedRow._fields])
        )
