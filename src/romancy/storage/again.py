"""Runs that go on again: a failed one from what failed on, and a new instance with the history of another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from romancy.errors import InstanceConflictError, InstanceNotFoundError, InstanceStateError
from romancy.model import HistoryKind, Status
from romancy.serde import dump_plain, load_json
from romancy.storage.mail import Mail
from romancy.storage.mail_desk import Execute, MailDesk
from romancy.storage.posting import outcome_mail
from romancy.storage.rows import HistoryRow, StateRow
from romancy.storage.schema import history, instances, mail, subscriptions

_REFUSALS = (HistoryKind.ACTIVITY_FAILED, HistoryKind.CHILD_REFUSED, HistoryKind.CHANNEL_REFUSED)
_UNDOINGS = (HistoryKind.COMPENSATION_EXECUTED, HistoryKind.COMPENSATION_FAILED)
_ROW = ", ".join(HistoryRow._fields)


class Fork(NamedTuple):
    """A new instance that begins with the history of another.

    Attributes:
        source_id: the other.
        activity_id: the first call whose outcome is not taken over.
        new_id: the id of the new instance.
        mail_ids: makes ids for mail.
        now_us: the time.
    """

    source_id: str
    activity_id: str
    new_id: str
    mail_ids: Iterator[str]
    now_us: int


class _Source(NamedTuple):
    """What is read of the instance that goes on."""

    status: str
    run: int
    workflow_name: str
    started_at: int | None
    source_hash: str | None
    input: str
    error: str | None
    patches: str | None
    seed: str | None


class Reruns:
    """Lets runs go on again, within one transaction of one database.

    Args:
        execute: runs statements in that transaction.
        dialect: ``sqlite``, ``postgresql`` or ``mysql``.
    """

    def __init__(self, execute: Execute, dialect: str) -> None:
        self._execute = execute
        self._desk = MailDesk(execute, dialect, 0)
        self._lock = "" if dialect == "sqlite" else " FOR UPDATE"

    # -- a failed instance ---------------------------------------------------------------------------

    def retry(self, instance_id: str, now_us: int) -> None:
        """Take back what made an instance fail, so that it goes on from there.

        Outcomes that replay no longer needs are taken back by the worker that replays it.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it has not failed, or has been compensated.
        """
        source = self._read(instance_id, self._lock)
        if source.status != Status.FAILED:
            raise InstanceStateError(f"instance {instance_id!r} is {source.status}, not failed: nothing to retry")
        events = self._events(instance_id, source.run)
        undone = [event.name for event in events if event.kind in _UNDOINGS]
        if undone:
            raise InstanceStateError(
                f"instance {instance_id!r} has been compensated ({len(undone)} activities, {undone[0]!r} first), so "
                f"what it would go on from is undone: start it anew, or fork it from its first activity"
            )
        failures = _failures(events, source.error)
        for child_id in [event.name for event in failures if event.kind == HistoryKind.CHILD_ENDED]:
            assert child_id is not None
            self.retry(child_id, now_us)
        gone = [*failures, *(event for event in events if event.kind == HistoryKind.WORKFLOW_FAILED)]
        supersede(self._execute, instance_id, source.run, [event.seq for event in gone])
        self._note(instance_id, source.run, events[-1].seq + 1, HistoryKind.WORKFLOW_RETRIED, now_us, None)
        self._execute(
            f"UPDATE {instances.name} SET status = '{Status.PENDING.value}', owner = NULL, ready_at = 0, claims = 0, "
            f"updated_at = ?, completed_at = NULL, result = NULL, error = NULL WHERE instance_id = ?",
            (now_us, instance_id),
        )
        self._subscribe(instance_id, instance_id, source.run, events)

    # -- a new instance ------------------------------------------------------------------------------

    def fork(self, asked: Fork) -> None:
        """Make the new instance; when it is there already, from the same call of the same instance, that will do.

        Raises:
            InstanceNotFoundError: there is no such instance.
            InstanceStateError: it has no such call; or it waits there for a child that has not ended.
            InstanceConflictError: the id of the new instance belongs to another.
        """
        source = self._read(asked.source_id, "")
        events = self._events(asked.source_id, source.run)
        cut = next((n for n, event in enumerate(events) if event.operation_id == asked.activity_id), None)
        if cut is None:
            known = list(dict.fromkeys(event.operation_id for event in events if event.operation_id))
            raise InstanceStateError(
                f"run {source.run} of instance {asked.source_id!r} has recorded nothing of {asked.activity_id!r}; "
                f"it has: {', '.join(known[:20]) or 'nothing'}{' …' if len(known) > 20 else ''}"
            )
        origin = dump_plain({"from": asked.source_id, "run": source.run, "activity": asked.activity_id})
        if self._is_there(asked.new_id, origin):
            return
        prefix = events[:cut]
        started_at = source.started_at or asked.now_us
        fields = (
            "instance_id", "run", "workflow_name", "status", "ready_at", "claims", "created_at", "started_at",
            "updated_at", "source_hash", "input", "patches", "seed",
        )  # fmt: skip
        row = (
            asked.new_id, 1, source.workflow_name, Status.PENDING.value, 0, 0, asked.now_us, started_at,
            asked.now_us, source.source_hash, source.input, source.patches,
            source.seed or seed_of(asked.source_id, source.run),
        )  # fmt: skip
        self._desk.insert(instances.name, fields, [row])
        copies = [event._replace(instance_id=asked.new_id, run=1) for event in prefix]
        self._desk.insert(history.name, HistoryRow._fields, copies)
        self._note(asked.new_id, 1, events[cut].seq, HistoryKind.WORKFLOW_FORKED, asked.now_us, origin)
        self._desk.insert(mail.name, Mail._fields[:-1], self._outcomes_of_children(asked, prefix))
        self._subscribe(asked.new_id, asked.source_id, source.run, prefix)

    def _is_there(self, instance_id: str, origin: str) -> bool:
        found = self._execute(
            f"SELECT h.input FROM {instances.name} i LEFT JOIN {history.name} h ON h.instance_id = i.instance_id "
            f"AND h.run = 1 AND h.kind = ? WHERE i.instance_id = ? ORDER BY h.seq DESC",
            (HistoryKind.WORKFLOW_FORKED.value, instance_id),
        ).fetchall()
        # The history of a fork of a fork has the notes of both; the last is its own.
        if found and found[0][0] != origin:
            raise InstanceConflictError(f"the id {instance_id!r} belongs to another instance: choose another id")
        return bool(found)

    def _outcomes_of_children(self, asked: Fork, prefix: list[HistoryRow]) -> list[tuple[Any, ...]]:
        """For each child that the source had started and not heard of: how it has ended, for the new instance, too."""
        begun = [load_json(event.result or "null") for event in prefix if event.kind == HistoryKind.CHILD_STARTED]
        heard_of = {event.name for event in prefix if event.kind == HistoryKind.CHILD_ENDED}
        sent: list[tuple[Any, ...]] = []
        for child_id in begun:
            if child_id in heard_of:
                continue
            columns = ", ".join(StateRow._fields)
            found = self._execute(
                f"SELECT {columns} FROM {instances.name} WHERE instance_id = ?", (child_id,)
            ).fetchone()
            if found is not None and StateRow._make(found).completed_at is None:
                raise InstanceStateError(
                    f"child {child_id!r} runs, and tells its end only to {asked.source_id!r}: wait until it has ended, "
                    f"or fork from before its start"
                )
            if found is not None:
                sent.append(outcome_mail(next(asked.mail_ids), asked.new_id, StateRow._make(found))[:-1])
        return sent

    # -- both ----------------------------------------------------------------------------------------

    def _read(self, instance_id: str, lock: str) -> _Source:
        fields = ", ".join(_Source._fields)
        row = self._execute(f"SELECT {fields} FROM {instances.name} WHERE instance_id = ?{lock}", (instance_id,))
        found = row.fetchone()
        if found is None:
            raise InstanceNotFoundError(f"there is no instance {instance_id!r}; list_instances() shows what there is")
        return _Source._make(found)

    def _events(self, instance_id: str, run: int) -> list[HistoryRow]:
        sql = f"SELECT {_ROW} FROM {history.name} WHERE instance_id = ? AND run = ? ORDER BY seq"
        return [HistoryRow._make(row) for row in self._execute(sql, (instance_id, run)).fetchall()]

    def _note(self, instance_id: str, run: int, seq: int, kind: HistoryKind, now_us: int, text: str | None) -> None:
        row = HistoryRow(instance_id, run, seq, kind.value, None, None, None, 0, now_us, None, text, None, None)
        self._desk.insert(history.name, HistoryRow._fields, [row])

    def _subscribe(self, instance_id: str, source_id: str, run: int, of_last_run: list[HistoryRow]) -> None:
        """Its end has cost the instance its subscriptions; those of earlier runs are kept by later ones."""
        kinds = (HistoryKind.CHANNEL_SUBSCRIBED, HistoryKind.CHANNEL_UNSUBSCRIBED)
        earlier = self._execute(
            f"SELECT {_ROW} FROM {history.name} WHERE instance_id = ? AND run < ? AND kind IN (?, ?) ORDER BY run, seq",
            (source_id, run, *(kind.value for kind in kinds)),
        ).fetchall()
        channels: set[str] = set()
        for event in [*(HistoryRow._make(row) for row in earlier), *of_last_run]:
            if event.kind == HistoryKind.CHANNEL_UNSUBSCRIBED:
                channels.discard(event.name or "")
            elif event.kind == HistoryKind.CHANNEL_SUBSCRIBED and event.name is not None:
                channels.add(event.name)
        rows = [(channel, instance_id) for channel in sorted(channels)]
        self._desk.insert(subscriptions.name, ("channel", "instance_id"), rows, ignore=True)


def supersede(execute: Execute, instance_id: str, run: int, seqs: list[int]) -> None:
    """Take outcomes back: replay passes over them."""
    for seq in seqs:
        execute(
            f"UPDATE {history.name} SET kind = ? WHERE instance_id = ? AND run = ? AND seq = ?",
            (HistoryKind.SUPERSEDED.value, instance_id, run, seq),
        )


def seed_of(instance_id: str, run: int) -> str:
    """What a run's random numbers come from, unless it is a fork."""
    return f"{instance_id}/{run}"


def _failures(events: list[HistoryRow], error: str | None) -> list[HistoryRow]:
    """The failures from the first one on that the workflow's own error comes from.

    An earlier failure that the code has coped with stays; so do all of them when the code itself is to blame.
    """
    reasons = set(_reasons(load_json(error))) if error is not None else set()
    found: list[HistoryRow] = []
    for event in events:
        failure = _failure(event)
        if failure is not None and (found or (failure["type"], failure["message"]) in reasons):
            found.append(event)
    return found


def _failure(event: HistoryRow) -> dict[str, Any] | None:
    """The error that an outcome brought to the workflow."""
    if event.kind in _REFUSALS and event.error is not None:
        failure: dict[str, Any] = load_json(event.error)
        return failure
    if event.kind == HistoryKind.CHILD_ENDED and event.result is not None:
        error = load_json(event.result)[2]
        return None if error is None else load_json(error)
    return None


def _reasons(error: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """An error, what caused it, and the members of a group."""
    yield error["type"], error["message"]
    for part in (*error.get("members", ()), *([error["cause"]] if "cause" in error else ())):
        yield from _reasons(part)
