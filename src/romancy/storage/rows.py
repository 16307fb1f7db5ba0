"""Rows on their way between the engine and the database, as plain tuples with names."""

from __future__ import annotations

from typing import NamedTuple


class StartRow(NamedTuple):
    """A new instance."""

    instance_id: str
    run: int
    workflow_name: str
    status: str
    owner: str | None
    ready_at: int | None
    claims: int
    created_at: int
    started_at: int | None
    updated_at: int
    source_hash: str | None
    input: str
    parent_id: str | None = None


class HistoryRow(NamedTuple):
    """One recorded event; ``seq`` is unique within a run."""

    instance_id: str
    run: int
    seq: int
    kind: str
    operation_id: str | None
    name: str | None
    position: int | None
    attempt: int
    at: int
    due_at: int | None
    input: str | None
    result: str | None
    error: str | None


class StateRow(NamedTuple):
    """The new state of an instance that this worker owns."""

    instance_id: str
    status: str
    owner: str | None
    ready_at: int | None
    updated_at: int
    completed_at: int | None
    result: str | None
    error: str | None


class InstanceRow(NamedTuple):
    """What callers see of an instance."""

    instance_id: str
    run: int
    workflow_name: str
    status: str
    owner: str | None
    ready_at: int | None
    claims: int
    created_at: int
    started_at: int | None
    updated_at: int
    completed_at: int | None
    source_hash: str
    input: str
    result: str | None
    error: str | None


class ClaimedRow(NamedTuple):
    """An instance that this worker has just taken."""

    instance_id: str
    run: int
    workflow_name: str
    status: str
    claims: int
    started_at: int
    input: str
    parent_id: str | None = None
    patches: str | None = None
    seed: str | None = None
    is_fresh: bool = False


CLAIMED_COLUMNS = ClaimedRow._fields[:-1]
"""``is_fresh`` is worked out: nobody has run the instance yet."""


class RunRow(NamedTuple):
    """The next run of an instance that this worker owns."""

    instance_id: str
    run: int
    started_at: int
    source_hash: str | None
    input: str


class PatchRow(NamedTuple):
    """The patches that a run has met, as a JSON list."""

    instance_id: str
    patches: str


class SupersededRow(NamedTuple):
    """Outcomes of a run that a retry has taken back, and that its code no longer asks for."""

    instance_id: str
    run: int
    seqs: list[int]


class ProgressRow(NamedTuple):
    """The latest heartbeat of an activity, in the row of history that its first one has made."""

    instance_id: str
    run: int
    seq: int
    at: int
    details: str


Change = RunRow | PatchRow | SupersededRow | ProgressRow


class WorkerRow(NamedTuple):
    """A registered worker, as others see it."""

    worker_id: str
    name: str
    state: str
    host: str
    pid: int
    process_started: int
    lease_until: int
