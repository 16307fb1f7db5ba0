"""What the engine asks of a database; the same for all of them but for a few methods that each one answers itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError

from romancy.model import HistoryEvent, HistoryKind, Instance, Status
from romancy.storage.again import Fork, Reruns
from romancy.storage.database import fenced
from romancy.storage.failures import HistoryConflictError, is_lost
from romancy.storage.group_commit import GroupCommit
from romancy.storage.lookups import get_history, get_instance, get_outcomes
from romancy.storage.mail import SUSPEND, Delivery, Mail, Post, Receipt, Wait
from romancy.storage.mail_desk import (
    MailDesk,
    clear_expired,
    find_news,
    on_connection,
    on_link,
    open_channel,
    read_mail_of,
)
from romancy.storage.rows import ClaimedRow, HistoryRow, StartRow, StateRow, WorkerRow
from romancy.storage.schema import history, instances, workers
from romancy.storage.statements import MOST_ADDRESSEES, Prepared
from romancy.storage.threads import Job, Link

T = TypeVar("T")

_AT_REST = (Status.PENDING.value, Status.SUSPENDED.value)


class Store(GroupCommit):
    """All that the engine asks of a database.

    Methods that return a ``concurrent.futures.Future`` may be called from any thread; they never block.
    """

    _unsure_claim: int | None = None

    # -- workers and their leases ------------------------------------------------------------------

    def register(self, row: WorkerRow, started_at: int) -> Future[None]:
        """Add this worker, alive."""
        statement = self._statements.register(**row._asdict(), started_at=started_at)

        def job(link: Link) -> None:
            self._run(link, statement)

        return self._write(job)

    def renew(self, worker_id: str, lease_until: int) -> Future[bool]:
        """Lengthen the lease; ``False`` when it was lost."""
        statement = self._statements.renew(me=worker_id, lease_until=lease_until)

        def job(link: Link) -> bool:
            is_news = self._is_changed()
            is_alive = self._run(link, statement) == 1
            if not is_news:
                self.has_changed()  # that was us; should somebody else have been as quick, the next scan sees it
            return is_alive

        return self._write(job)

    def scan(self) -> Future[tuple[list[WorkerRow], int | None, bool]]:
        """All workers, the earliest time at which an instance without an owner may be claimed, and whether there is
        mail."""
        sql, values = self._statements.scan()

        def job(link: Link) -> tuple[list[WorkerRow], int | None, bool]:
            rows = link.execute(sql, values).fetchall()
            if not rows:
                return [], None, False
            *_, news, due, server_us = rows[0]
            self._note_time(server_us)
            return [WorkerRow(*row[:-3]) for row in rows], due, news is not None

        return self._read(job)

    def next_due(self) -> Future[int | None]:
        """The earliest time at which an instance without an owner may be claimed."""
        sql, values = self._statements.next_due()
        return self._read(lambda link: link.execute(sql, values).fetchone()[0])

    def bury(self, worker_id: str, now: int, is_gone: bool) -> Future[bool]:
        """Mark a worker dead whose lease has run out, or whose process is known to be gone.

        Waits for a commit of that worker that is under way; one that comes later fails at its fence.
        """
        statement = self._statements.bury(worker_id=worker_id, now=now, is_gone=int(is_gone))
        return self._write(lambda link: self._run(link, statement) == 1)

    def claim_from(self, dead_id: str, me: str, now: int, limit: int) -> Future[list[ClaimedRow]]:
        """Take over instances of a dead worker.

        When none is left that this app can run, the others go back to everybody, and the dead worker's row goes.
        """
        statements = self._statements

        def claim(link: Link) -> list[ClaimedRow]:
            found = link.execute(*statements.find_of_dead(worker_id=dead_id, limit=limit)).fetchall()
            claimed = self._take(link, found, me, now, counted=1)
            if not claimed:
                link.execute(*statements.release(worker_id=dead_id, now=now))
                link.execute(*statements.forget_worker(worker_id=dead_id))
            return claimed

        return self._claim(me, now, claim)

    def claim_ready(self, me: str, now: int, limit: int) -> Future[list[ClaimedRow]]:
        """Take instances that nobody owns and whose time has come."""
        statements = self._statements

        def claim(link: Link) -> list[ClaimedRow]:
            found = link.execute(*statements.find_ready(now=now, limit=limit)).fetchall()
            return self._take(link, found, me, now, counted=0)

        return self._claim(me, now, claim)

    def claim_addressed(self, me: str, now: int, instance_ids: Sequence[str]) -> Future[list[ClaimedRow]]:
        """Take those of these instances, at most ``MOST_ADDRESSEES``, that nobody owns: they have mail."""
        statements = self._statements
        padded = [*instance_ids, *[instance_ids[0]] * (MOST_ADDRESSEES - len(instance_ids))]
        values = {f"id_{n}": instance_id for n, instance_id in enumerate(padded)}

        def claim(link: Link) -> list[ClaimedRow]:
            found = link.execute(*statements.find_addressed(**values)).fetchall()
            return self._take(link, found, me, now, counted=0)

        return self._claim(me, now, claim)

    def _claim(self, me: str, now: int, claim: Job[list[ClaimedRow]]) -> Future[list[ClaimedRow]]:
        def job(link: Link) -> list[ClaimedRow]:
            try:
                with self._transaction(link):
                    self._check_fence(link, me, self._statements.fence)
                    return claim(link)
            except Exception as error:
                if is_lost(error):
                    self._unsure_claim = now
                raise

        return self._write(job)

    @property
    def has_unsure_claim(self) -> bool:
        """Whether a connection was lost while instances were claimed; :meth:`recover_claim` finds out."""
        return self._unsure_claim is not None

    def recover_claim(self, me: str) -> Future[list[ClaimedRow]]:
        """What the claim has taken whose connection was lost, if anything."""
        statements, claimed_at = self._statements, self._unsure_claim

        def job(link: Link) -> list[ClaimedRow]:
            with self._transaction(link):
                self._check_fence(link, me, statements.lock_worker)
                rows = link.execute(*statements.find_claimed(me=me, now=claimed_at)).fetchall()
            self._unsure_claim = None
            return [ClaimedRow(*row) for row in rows]

        return self._write(job)

    def _take(self, link: Link, found: Sequence[Any], me: str, now: int, *, counted: int) -> list[ClaimedRow]:
        """Make instances, whose rows this transaction has locked, this worker's own."""
        if not found:
            return []
        rows = [ClaimedRow(*row) for row in found]
        mark = self.mark
        link.execute(
            f"UPDATE {instances.name} SET owner = {mark}, ready_at = NULL, "
            f"claims = claims + CASE WHEN status IN ('{Status.RUNNING.value}', '{Status.COMPENSATING.value}') "
            f"THEN {mark} ELSE 0 END, "
            f"status = CASE WHEN status IN ('{Status.PENDING.value}', '{Status.SUSPENDED.value}') "
            f"THEN '{Status.RUNNING.value}' ELSE status END, "
            f"started_at = COALESCE(started_at, {mark}), updated_at = {mark} "
            f"WHERE instance_id IN ({','.join([mark] * len(rows))})",
            (me, counted, now, now, *[row.instance_id for row in rows]),
        )
        return [
            row._replace(
                status=Status.RUNNING.value if row.status in _AT_REST else row.status,
                claims=row.claims + (counted if row.status in (Status.RUNNING.value, Status.COMPENSATING.value) else 0),
                started_at=now if row.started_at is None else row.started_at,
                is_fresh=row.started_at is None,
            )
            for row in rows
        ]

    def leave(self, worker_id: str, now: int) -> Future[int]:
        """Hand all instances of this worker back and remove it; returns how many were handed back."""
        statements = self._statements

        def job(link: Link) -> int:
            with self._transaction(link):
                # A worker that was buried meanwhile owns nothing: others may have taken its instances.
                released: int = link.execute(*statements.release(worker_id=worker_id, now=now)).rowcount
                link.execute(*statements.deregister(me=worker_id))
            if released:
                self._tell_others(link)
            return released

        return self._write(job)

    def resume(self, instance_id: str, now: int) -> Future[bool]:
        """Make a suspended instance claimable; ``False`` when it is not suspended.

        Requests to suspend it that came while it was suspended are over with that.
        """
        statement = self._statements.resume(instance_id=instance_id, now=now)

        def job(link: Link) -> bool:
            with self._transaction(link):
                is_resumed: bool = link.execute(*statement).rowcount == 1
                if is_resumed:
                    MailDesk(on_link(link, self.mark), self.kind, now).handle([Receipt(instance_id, 0, SUSPEND)])
            if is_resumed:
                self._tell_others(link)
            return is_resumed

        return self._write(job)

    def retry(self, instance_id: str, now: int) -> Future[None]:
        """Let a failed instance go on; see :meth:`romancy.storage.again.Reruns.retry`."""
        return self._rerun(lambda reruns: reruns.retry(instance_id, now))

    def fork(self, asked: Fork) -> Future[None]:
        """Make an instance with the history of another; see :meth:`romancy.storage.again.Reruns.fork`."""
        return self._rerun(lambda reruns: reruns.fork(asked))

    def _rerun(self, what: Callable[[Reruns], None]) -> Future[None]:
        def job(link: Link) -> None:
            with self._transaction(link):
                what(Reruns(on_link(link, self.mark), self.kind))
            self._tell_others(link)

        return self._write(job)

    # -- children ------------------------------------------------------------------------------

    def start_child(self, worker_id: str, row: StartRow) -> Future[tuple[str, str, str | None] | None]:
        """Insert a child with an id of the user's; where that is taken, the name, input and parent of who has it."""

        def job(link: Link) -> tuple[str, str, str | None] | None:
            with self._transaction(link):
                self._check_fence(link, worker_id, self._statements.fence)
                found: tuple[str, str, str | None] | None = link.execute(
                    *self._statements.read_start(instance_id=row.instance_id)
                ).fetchone()
                if found is None:
                    for sql, values, _ in self._starts.pieces([row]):
                        link.execute(sql, values)
            if found is None:
                self._tell_others(link)
            return found

        return self._write(job)

    # -- mail --------------------------------------------------------------------------------------

    def find_news(self, worker_id: str) -> Future[tuple[list[Delivery], list[str]]]:
        """Mail for this worker's instances that is not recorded yet; and instances without an owner that have some."""
        names = self._workflow_names
        return self._read(lambda link: find_news(on_link(link, self.mark), worker_id, names, MOST_ADDRESSEES))

    def read_mail_of(self, instance_ids: Sequence[str]) -> Future[tuple[list[Delivery], list[Wait]]]:
        """The deliveries and the open waits of these instances."""
        return self._read(lambda link: read_mail_of(on_link(link, self.mark), instance_ids))

    def open_channel(
        self, worker_id: str | None, channel: str, mode: str | None, subscriber: str | None
    ) -> Future[str | None]:
        """The channel's mode; where it has none yet, it gets this one. Then subscribes, if that is its mode."""

        def job(link: Link) -> str | None:
            with self._transaction(link):
                if worker_id is not None:
                    self._check_fence(link, worker_id, self._statements.fence)
                return open_channel(on_link(link, self.mark), self.kind, channel, mode, subscriber)

        if mode is None:
            return self._read(lambda link: open_channel(on_link(link, self.mark), self.kind, channel, None, None))
        return self._write(job)

    def clear_expired(self, now: int, limit: int) -> Future[int]:
        """Remove mail that has expired; returns how much."""

        def job(link: Link) -> int:
            with self._transaction(link):
                return clear_expired(on_link(link, self.mark), self.kind, now, limit)

        return self._write(job)

    # -- the outcome of a transactional activity ---------------------------------------------------

    def is_in_transaction(self, connection: Connection) -> bool:
        """Whether the server has a transaction open here. Asked only where savepoints may wait.

        Raises:
            DBAPIError: it has, and it has failed.
        """
        raise NotImplementedError

    def commit_in(
        self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int, outgoing: Sequence[Mail]
    ) -> Post | None:
        """Check the fence, write the outcome, send what goes with it, and commit the transaction that carries the
        user's rows; returns what became of the mail.

        Raises:
            FencedError: the worker lost its lease.
            HistoryConflictError: somebody else has recorded this event.
            IntegrityError: a constraint that is checked at the commit refused the user's rows.
        """
        try:
            self._record_in(connection, worker_id, event, renew_until)
        except IntegrityError as error:
            raise taken(event, error.orig) from error
        post = self._send_in(connection, outgoing) if outgoing else None
        connection.commit()
        return post

    def _record_in(self, connection: Connection, worker_id: str, event: HistoryRow, renew_until: int) -> None:
        """Check the fence and write the outcome."""
        del renew_until
        fence = workers.select().where(workers.c.worker_id == worker_id, workers.c.state == "alive")
        if connection.execute(fence.with_for_update(read=True)).first() is None:
            raise fenced(worker_id)
        connection.execute(history.insert().values(event._asdict()))

    def _send_in(self, connection: Connection, outgoing: Sequence[Mail]) -> Post:
        """Send, as the last thing before the commit, for it locks topics."""
        desk = MailDesk(on_connection(connection), self.kind, self.workflow_clock.now_us(), self.most_bytes)
        desk.lock(outgoing)
        return desk.handle(outgoing)

    def settle_event(self, worker_id: str, event: HistoryRow) -> Future[bool]:
        """Whether this outcome is durable, after a connection was lost while it was committed.

        If it is not, its place in history is taken, so that it never will be: the server may have its commit still to
        read, and would carry it out after it was asked.

        The future fails with ``FencedError`` when the worker has lost its lease meanwhile.
        """
        plug = event._replace(kind=HistoryKind.ACTIVITY_ATTEMPT_LOST.value, result=None, error=None)
        key = {"instance_id": event.instance_id, "run": event.run, "seq": event.seq}

        def job(link: Link) -> bool:
            with self._transaction(link):
                self._check_fence(link, worker_id, self._statements.lock_worker)
                found = link.execute(*self._statements.read_event(**key)).fetchone()
                if found is None:
                    for sql, values, _ in self._history.pieces([plug]):
                        link.execute(sql, values)
            return found is not None and found[0] != plug.kind

        return self._write(job)

    # -- reading -----------------------------------------------------------------------------------

    def read_history(self, wanted: Sequence[tuple[str, int, int]], limit: int) -> Future[list[list[HistoryRow]]]:
        """For each ``(instance_id, run, after_seq)`` the next recorded events, at most ``limit`` of them."""
        read: Prepared = self._statements.read_history

        def job(link: Link) -> list[list[HistoryRow]]:
            return [
                [
                    HistoryRow._make(row)
                    for row in link.execute(
                        *read(instance_id=instance_id, run=run, after=after, limit=limit)
                    ).fetchall()
                ]
                for instance_id, run, after in wanted
            ]

        return self._read(job)

    def get_instance(self, instance_id: str) -> Future[Instance | None]:
        """One instance, or ``None``."""
        return self._read(lambda link: get_instance(on_link(link, self.mark), instance_id))

    def get_history(self, instance_id: str, run: int | None) -> Future[list[HistoryEvent]]:
        """The recorded events of a run (by default the latest), in order."""
        return self._read(lambda link: get_history(on_link(link, self.mark), instance_id, run))

    def get_outcomes(self, instance_ids: Sequence[str]) -> Future[list[StateRow]]:
        """The state of those of these instances that have ended or are suspended."""
        return self._read(lambda link: get_outcomes(on_link(link, self.mark), instance_ids))

    def read_start(self, instance_id: str) -> Future[tuple[str, str] | None]:
        """The workflow's name, and the input that an instance was started with."""
        statement = self._statements.read_start(instance_id=instance_id)

        def job(link: Link) -> tuple[str, str] | None:
            row = link.execute(*statement).fetchone()
            return None if row is None else (row[0], row[1])

        return self._read(job)


def taken(event: HistoryRow, error: BaseException | None) -> HistoryConflictError:
    """The error for an event whose place in history has been taken."""
    return HistoryConflictError(f"another worker has recorded event {event.seq}: {error}")
