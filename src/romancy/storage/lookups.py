"""What is asked of a single instance or history, by its key; on whatever connection there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from romancy.failures import decode_info
from romancy.model import HistoryEvent, HistoryKind, Instance, PendingActivity, Status, from_micros
from romancy.serde import load_json
from romancy.storage.mail import NEVER_US
from romancy.storage.mail_desk import Execute
from romancy.storage.rows import HistoryRow, InstanceRow, StateRow
from romancy.storage.schema import history, instances

IDS_A_STATEMENT = 500

_TOLD = (HistoryKind.ACTIVITY_RETRY_SCHEDULED.value, HistoryKind.ACTIVITY_HEARTBEAT.value)
"""What history has of an activity before its outcome."""

_EVENTS = f"SELECT {', '.join(HistoryRow._fields)} FROM {history.name} WHERE instance_id = ? AND run = ?"


def get_instance(execute: Execute, instance_id: str) -> Instance | None:
    """One instance, or ``None``."""
    sql = f"SELECT {', '.join(InstanceRow._fields)} FROM {instances.name} WHERE instance_id = ?"
    found = execute(sql, (instance_id,)).fetchone()
    if found is None:
        return None
    instance = instance_of(InstanceRow._make(found))
    if instance.status.is_terminal:
        return instance
    return replace(instance, pending=_pending(execute, instance_id, instance.run))


def _pending(execute: Execute, instance_id: str, run: int) -> tuple[PendingActivity, ...]:
    """Activities with failed attempts or heartbeats, and no outcome."""
    told = f"{_EVENTS} AND kind IN ({_marks(_TOLD)}) ORDER BY seq"
    found: dict[str, list[HistoryRow]] = {}
    for row in map(HistoryRow._make, execute(told, (instance_id, run, *_TOLD)).fetchall()):
        found.setdefault(row.operation_id or "", []).append(row)
    last = {activity_id: rows[-1].seq for activity_id, rows in found.items()}
    for some in _chunks(list(last)):
        sql = (
            f"SELECT operation_id, seq FROM {history.name} WHERE instance_id = ? AND run = ? "
            f"AND operation_id IN ({_marks(some)}) AND kind NOT IN ({_marks(_TOLD)})"
        )
        for activity_id, seq in execute(sql, (instance_id, run, *some, *_TOLD)).fetchall():
            if seq > last[activity_id]:
                found.pop(activity_id, None)
    return tuple(_pending_activity(rows) for rows in found.values())


def get_outcomes(execute: Execute, instance_ids: Sequence[str]) -> list[StateRow]:
    """The state of those of these instances that have ended or are suspended."""
    found: list[StateRow] = []
    for some in _chunks(instance_ids):
        sql = (
            f"SELECT {', '.join(StateRow._fields)} FROM {instances.name} WHERE instance_id IN ({_marks(some)}) "
            f"AND (completed_at IS NOT NULL OR status = ?)"
        )
        found += map(StateRow._make, execute(sql, (*some, Status.SUSPENDED.value)).fetchall())
    return found


def get_history(execute: Execute, instance_id: str, run: int | None = None) -> list[HistoryEvent]:
    """The recorded events of a run (by default the latest), in order."""
    if run is None:
        latest = execute(f"SELECT run FROM {instances.name} WHERE instance_id = ?", (instance_id,)).fetchone()
        if latest is None:
            return []
        run = latest[0]
    rows = execute(f"{_EVENTS} ORDER BY seq", (instance_id, run)).fetchall()
    return [_event(HistoryRow._make(row)) for row in rows]


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" * len(values))


def _chunks(ids: Sequence[str]) -> list[Sequence[str]]:
    return [ids[start : start + IDS_A_STATEMENT] for start in range(0, len(ids), IDS_A_STATEMENT)]


def instance_of(row: InstanceRow) -> Instance:
    """The row for callers."""
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


def _pending_activity(rows: list[HistoryRow]) -> PendingActivity:
    failed = next((row for row in reversed(rows) if row.kind == HistoryKind.ACTIVITY_RETRY_SCHEDULED), None)
    heartbeat = next((row for row in rows if row.kind == HistoryKind.ACTIVITY_HEARTBEAT), None)
    return PendingActivity(
        activity_id=rows[0].operation_id or "",
        name=rows[0].name or "",
        attempts=0 if failed is None else failed.attempt,
        last_error=None if failed is None or failed.error is None else decode_info(failed.error),
        next_attempt_at=None if failed is None or failed.due_at is None else from_micros(failed.due_at),
        heartbeat=None if heartbeat is None or heartbeat.result is None else load_json(heartbeat.result),
        heartbeat_at=None if heartbeat is None else from_micros(heartbeat.at),
    )


def _event(row: HistoryRow) -> HistoryEvent:
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
