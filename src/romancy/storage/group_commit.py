"""The group commit: everything that waits for it in one transaction, under the worker's fence."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future
from functools import cached_property
from typing import Any

from romancy.model import HistoryKind, Status
from romancy.storage.again import supersede
from romancy.storage.batch import Batch, Party, Written, run_batch
from romancy.storage.database import Database
from romancy.storage.failures import NotOwnedError, is_lost
from romancy.storage.mail_desk import on_link, slots_of
from romancy.storage.rows import Change, HistoryRow, ProgressRow, RunRow, StartRow, StateRow, SupersededRow
from romancy.storage.schema import history, instances
from romancy.storage.statements import ManyRows, insert_into
from romancy.storage.threads import Link


class GroupCommit(Database):
    """Writes batches; and finds out what of one is durable whose connection was lost."""

    @cached_property
    def _starts(self) -> ManyRows:
        return ManyRows(insert_into(instances, StartRow._fields), len(StartRow._fields), mark=self.mark)

    @cached_property
    def _history(self) -> ManyRows:
        return ManyRows(insert_into(history, HistoryRow._fields), len(HistoryRow._fields), mark=self.mark)

    # -- what each database answers itself ---------------------------------------------------------

    @abstractmethod
    def _insert_keyed(self, link: Link, rows: list[StartRow]) -> set[str]:
        """Insert the starts whose ids are new; returns the ids of those."""

    @abstractmethod
    def _update_states(self, link: Link, states: list[StateRow], worker_id: str) -> None:
        """Write the states of instances that this worker owns.

        Raises:
            NotOwnedError: one of them is not this worker's.
        """

    # -- writing -----------------------------------------------------------------------------------

    def flush(self, batch: Batch, worker_id: str | None) -> Future[None]:
        """Commit a batch in one transaction, under the worker's fence.

        Rows that a constraint refuses are found and left out; the batch names their parties. After a connection was
        lost in the middle, nobody knows what is durable: the next attempt looks first.
        """
        outcome = None if batch.is_unsure else self._flush_on_loop(batch, worker_id)
        return self._flush_on_thread(batch, worker_id) if outcome is None else outcome

    def _flush_on_loop(self, batch: Batch, worker_id: str | None) -> Future[None] | None:
        """Commit a batch without another thread, where that can be done now; else ``None``, and nothing is done."""
        del batch, worker_id
        return None

    def look(self) -> None:
        """See whether a flush has ended that no thread hears of; if so, its future is done now."""

    def _flush_on_thread(self, batch: Batch, worker_id: str | None) -> Future[None]:
        def job(link: Link) -> None:
            if batch.is_unsure:
                self._leave_out_what_is_durable(link, batch, worker_id)
            try:
                run_batch(batch, lambda parties: self._write_parties(link, batch, parties, worker_id))
            except Exception as error:
                batch.is_unsure = batch.is_unsure or is_lost(error)
                raise
            if batch.is_unsure:
                self._acquit(link, batch)
            if batch.makes_work:
                self._tell_others(link)

        return self._write(job)

    def _write_parties(self, link: Link, batch: Batch, parties: list[Party], worker_id: str | None) -> Written:
        """Commit these parties' rows in one transaction, under the fence."""
        mail = [operation for party in parties for operation in party.mail]
        with self._transaction(link, slots_of(mail)):
            desk = self._desk(link)
            inserted: set[str] = set()
            for some in _run_by_run(parties):
                if any(party.needs_fence for party in some):
                    inserted |= self._write_rows(link, some, worker_id)
                for party in some:
                    for change in party.changes:
                        assert worker_id is not None
                        # Its state, which has been written, may have given the instance away.
                        owner = worker_id if party.state is None else party.state.owner
                        self._change_instance(link, change, owner)
            return Written(inserted, desk.handle(mail, is_repeated=batch.is_unsure) if mail else None)

    def _write_rows(self, link: Link, parties: list[Party], worker_id: str | None) -> set[str]:
        """Write all rows but the mail, under the fence; returns the ids of the new keyed starts."""
        inserted: set[str] = set()
        if worker_id is not None:
            self._check_fence(link, worker_id, self._statements.fence)
        for sql, values, _ in self._starts.pieces([row for p in parties for row in p.starts], self.most_bytes):
            self._run_with_next(link, sql, values)
        keyed = [row for p in parties for row in p.keyed_starts]
        if keyed:
            inserted = self._insert_keyed(link, keyed)
        for sql, values, _ in self._history.pieces([row for p in parties for row in p.history], self.most_bytes):
            self._run_with_next(link, sql, values)
        states = [p.state for p in parties if p.state is not None]
        if states:
            assert worker_id is not None
            self._update_states(link, states, worker_id)
        return inserted

    def _change_instance(self, link: Link, change: Change, owner: str | None) -> None:
        mark = self.mark
        is_owned = f"owner = {mark}" if owner is not None else "owner IS NULL"
        owners = () if owner is None else (owner,)
        if isinstance(change, SupersededRow):
            supersede(on_link(link, mark), *change)
            return
        if isinstance(change, ProgressRow):
            sql = f"UPDATE {history.name} SET at = {mark}, result = {mark} "
            sql += f"WHERE instance_id = {mark} AND run = {mark} AND seq = {mark}"
            link.execute(sql, (change.at, change.details, *change[:3]))
            return
        if isinstance(change, RunRow):
            if change.run == 2:
                self._keep_first_input(link, change.instance_id)
            sql = (
                f"UPDATE {instances.name} SET run = {mark}, started_at = {mark}, source_hash = {mark}, input = {mark}, "
                f"updated_at = {mark}, status = '{Status.RUNNING.value}', ready_at = NULL, patches = NULL, "
                f"seed = NULL, claims = 0 "
                f"WHERE instance_id = {mark} AND run = {mark} AND {is_owned}"
            )
            values: tuple[Any, ...] = (
                *change[1:], change.started_at, change.instance_id, change.run - 1, *owners,
            )  # fmt: skip
        else:
            sql = f"UPDATE {instances.name} SET patches = {mark} WHERE instance_id = {mark} AND {is_owned}"
            values = (change.patches, change.instance_id, *owners)
        if link.execute(sql, values).rowcount != 1:
            raise NotOwnedError("an instance is no longer owned by this worker")

    def _keep_first_input(self, link: Link, instance_id: str) -> None:
        """A start that is repeated is compared with what the instance was started with."""
        mark = self.mark
        link.execute(
            f"UPDATE {history.name} SET result = (SELECT input FROM {instances.name} WHERE instance_id = {mark}) "
            f"WHERE instance_id = {mark} AND run = 1 AND kind = '{HistoryKind.WORKFLOW_RECURRED.value}'",
            (instance_id, instance_id),
        )

    # -- after a lost connection -------------------------------------------------------------------

    def _leave_out_what_is_durable(self, link: Link, batch: Batch, worker_id: str | None) -> None:
        with self._transaction(link):
            if worker_id is not None:
                # Waits until whatever the lost connection left behind is over: that holds a lock on this row, too.
                self._check_fence(link, worker_id, self._statements.lock_worker)
            durable = [party for party in batch.waiting if self._is_durable(link, party)]
        self._note_durable(batch, durable)
        gone = {id(party) for party in durable}
        batch.waiting = [party for party in batch.waiting if id(party) not in gone]

    def _acquit(self, link: Link, batch: Batch) -> None:
        """What was refused because it was there already, from the attempt before, was not refused."""
        durable = [party for party, _ in batch.refused if self._is_durable(link, party)]
        self._note_durable(batch, durable)
        gone = {id(party) for party in durable}
        batch.refused = [(party, error) for party, error in batch.refused if id(party) not in gone]

    @staticmethod
    def _note_durable(batch: Batch, parties: list[Party]) -> None:
        for party in parties:
            batch.inserted.update(row.instance_id for row in party.keyed_starts)

    def _is_durable(self, link: Link, party: Party) -> bool:
        """Whether this party's rows are there: they stand or fall together, so one of them tells."""
        statements = self._statements
        for event in party.history:
            key = {"instance_id": event.instance_id, "run": event.run, "seq": event.seq}
            return link.execute(*statements.read_event(**key)).fetchone() is not None
        if party.state is not None:
            row = link.execute(*statements.read_state(instance_id=party.state.instance_id)).fetchone()
            return row is not None and StateRow._make(row[:-1]) == party.state
        # Mail alone: handled again, it finds what was done.
        starts = [*party.starts, *party.keyed_starts]
        return bool(starts) and all(self._is_start_ours(link, start) for start in starts)

    def _is_start_ours(self, link: Link, start: StartRow) -> bool:
        """Whether the instance with this id is the one that this start has made."""
        row = link.execute(*self._statements.read_state(instance_id=start.instance_id)).fetchone()
        return row is not None and (row[2] or start.owner, row[-1]) == (start.owner, start.created_at)


def _run_by_run(parties: list[Party]) -> Iterator[list[Party]]:
    """Parties that can be written together: the state of a run comes after the change that has begun the run."""
    some: list[Party] = []
    begun: set[str] = set()
    for party in parties:
        if party.state is not None and party.state.instance_id in begun:
            yield some
            some, begun = [], set()
        some.append(party)
        begun |= {change.instance_id for change in party.changes if isinstance(change, RunRow)}
    yield some
