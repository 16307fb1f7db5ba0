"""The group commit: barriers, retries, guilty rows, back pressure."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from romancy import (
    App,
    AppNotRunningError,
    DatabaseCorruptError,
    DatabaseError,
    DatabaseLockedError,
    WorkflowContext,
    activity,
    workflow,
)
from romancy.errors import FencedError
from romancy.storage import writer as writer_module
from romancy.storage.batch import Batch, Party, Written, run_batch
from romancy.storage.rows import HistoryRow, StartRow, StateRow
from romancy.storage.store import Store
from romancy.storage.writer import MUCH, Recorder, Writer
from tests.databases import rows
from tests.support import RESULT_TIMEOUT_S


class FakeStore:
    """Keeps batches until the test says how they ended."""

    works_beside = False

    def look(self) -> None:
        raise AssertionError

    def __init__(self) -> None:
        self.batches: list[tuple[Batch, Future[None]]] = []

    def flush(self, batch: Batch, worker_id: str | None) -> Future[None]:
        future: Future[None] = Future()
        self.batches.append((batch, future))
        return future


class StoreBeside(FakeStore):
    """Tells only if it's asked."""

    works_beside = True

    def __init__(self) -> None:
        super().__init__()
        self.has_written = False
        self.looks_at: list[int] = []

    def look(self) -> None:
        self.looks_at.append(sum(batch.row_count for batch, _ in self.batches))
        if self.has_written:
            self.batches[-1][1].set_result(None)


class Member(Recorder):
    def __init__(self) -> None:
        super().__init__()
        self.refusals: list[DatabaseError] = []

    def on_refused(self, error: DatabaseError) -> None:
        self.refusals.append(error)


def make(store: FakeStore) -> tuple[Writer, list[DatabaseError]]:
    stopped: list[DatabaseError] = []
    return Writer(store, "me", stopped.append), stopped


def event(seq: int) -> HistoryRow:
    return HistoryRow("i", 1, seq, "x", None, None, None, 0, 0, None, None, None, None)


def start(name: str) -> StartRow:
    return StartRow(name, 1, "w", "pending", None, 0, 0, 0, None, 0, None, "{}")


def ignore(is_new: bool) -> None:
    pass


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@pytest.mark.parametrize(("store", "sent"), [(StoreBeside(), [MUCH, MUCH + 2]), (FakeStore(), [2 * MUCH + 2])])
async def test_much_is_sent_before_the_turn_is_over_where_the_database_works_beside(
    store: FakeStore, sent: list[int]
) -> None:
    writer, _ = make(store)
    for number in range(2 * MUCH + 2):
        writer.hurry()
        writer.record(Member(), event(number))
    assert len(store.batches) == len(sent) - 1
    await turns()
    while store.batches[-1][1].done() is False:
        store.batches[-1][1].set_result(None)
        await turns()
    assert [batch.row_count for batch, _ in store.batches] == sent


async def test_whether_much_has_been_written_is_looked_at_before_the_turn_is_over() -> None:
    """Each time as much as that has come again; else the loop would hear of it only when all else is done."""
    store = StoreBeside()
    writer, _ = make(store)
    seen: list[int] = []

    def one_turn() -> None:
        for number in range(4 * MUCH + 2):
            writer.hurry()
            writer.record(Member(), event(number))
            if number == 2 * MUCH:
                store.has_written = True
            seen.append(writer.committed)

    asyncio.get_running_loop().call_soon(one_turn)
    await turns()
    assert store.looks_at == [MUCH, MUCH]
    assert [batch.row_count for batch, _ in store.batches] == [MUCH, 2 * MUCH]
    assert (seen.index(1), seen[-1]) == (3 * MUCH, 1)


async def test_flush_that_can_not_even_begin_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    store = FakeStore()
    writer, stopped = make(store)

    def refuse(*_: Any) -> Future[None]:
        monkeypatch.undo()
        raise DatabaseLockedError("not now")

    monkeypatch.setattr(store, "flush", refuse)
    ticket = writer.record(Member(), event(1))
    while not store.batches:
        await asyncio.sleep(0.001)
    store.batches[0][1].set_result(None)
    await turns()
    assert writer.committed == ticket
    assert not stopped


async def test_what_comes_in_one_turn_of_the_loop_shares_a_commit() -> None:
    store = FakeStore()
    writer, _ = make(store)
    members = [Member() for _ in range(5)]
    for member in members:
        writer.record(member, event(1))
        writer.record(member, event(2))
    await turns()
    assert len(store.batches) == 1
    assert [len(party.history) for party in store.batches[0][0].waiting] == [2] * 5


async def test_next_batch_fills_while_one_is_in_flight_and_callbacks_wait_for_their_own() -> None:
    store = FakeStore()
    writer, _ = make(store)
    member, calls = Member(), []
    first = writer.record(member, event(1))
    writer.when_durable(first, lambda: calls.append("first"))
    await turns()
    second = writer.record(member, event(2))
    writer.when_durable(second, lambda: calls.append("second"))
    writer.when_durable(first, lambda: calls.append("first again"))
    await turns()
    assert len(store.batches) == 1
    store.batches[0][1].set_result(None)
    await turns()
    assert calls == ["first", "first again"]
    assert len(store.batches) == 2
    store.batches[1][1].set_result(None)
    await writer.drained()
    await turns()
    assert calls == ["first", "first again", "second"]
    writer.when_durable(second, lambda: calls.append("at once"))
    assert calls[-1] == "at once"


async def test_failed_flush_is_tried_again_whole_and_starts_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_RETRY_WAIT_S", 0.0)
    store = FakeStore()
    writer, stopped = make(store)
    member = Member()
    ticket = writer.record(member, event(1))
    starting = asyncio.ensure_future(writer.start(start("s"), False, ignore))
    await turns()
    store.batches[0][1].set_exception(DatabaseLockedError("locked"))
    with pytest.raises(DatabaseLockedError):
        await starting
    while len(store.batches) < 2:
        await asyncio.sleep(0)
    batch, future = store.batches[1]
    assert [party.member for party in batch.waiting] == [member]
    future.set_result(None)
    await writer.drained()
    assert writer.committed == ticket
    assert stopped == []


async def test_start_that_is_durable_already_is_not_reported_as_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_RETRY_WAIT_S", 0.0)
    store = FakeStore()
    writer, _ = make(store)
    durable = asyncio.ensure_future(writer.start(start("a"), False, ignore))
    lost = asyncio.ensure_future(writer.start(start("b"), False, ignore))
    await turns()
    batch, future = store.batches[0]
    del batch.waiting[0]  # committed in a first half; then the second half failed
    future.set_exception(DatabaseLockedError("locked"))
    with pytest.raises(DatabaseLockedError):
        await lost
    while len(store.batches) < 2:
        await asyncio.sleep(0)
    store.batches[1][1].set_result(None)
    assert await durable is True


@pytest.mark.parametrize("error", [FencedError("lost"), DatabaseCorruptError("broken")])
async def test_lost_lease_or_hopeless_database_stops_the_writer(error: DatabaseError) -> None:
    store = FakeStore()
    writer, stopped = make(store)
    calls: list[str] = []
    writer.when_durable(writer.record(Member(), event(1)), lambda: calls.append("never"))
    starting = asyncio.ensure_future(writer.start(start("s"), False, ignore))
    await turns()
    store.batches[0][1].set_exception(error)
    with pytest.raises(type(error)):
        await starting
    assert stopped == [error]
    assert calls == []
    with pytest.raises(AppNotRunningError):
        await writer.start(start("t"), False, ignore)
    await writer.drained()


async def test_start_returns_when_it_is_durable_and_not_before() -> None:
    store = FakeStore()
    writer, _ = make(store)
    settled: list[bool] = []
    starting = asyncio.create_task(writer.start(start("a"), False, settled.append))
    await turns()
    assert len(store.batches) == 1
    assert not starting.done()
    assert settled == []
    store.batches[0][1].set_result(None)
    assert await starting
    assert settled == [True]


async def test_cancelled_caller_does_not_undo_its_start() -> None:
    store = FakeStore()
    writer, _ = make(store)
    ran: list[bool] = []
    starting = asyncio.ensure_future(writer.start(start("s"), False, ran.append))
    await turns()
    starting.cancel()
    await turns()
    store.batches[0][1].set_result(None)
    await writer.drained()
    await turns()
    assert ran == [True]


async def test_refused_member_hears_of_it_and_its_later_rows_are_left_out() -> None:
    store = FakeStore()
    writer, _ = make(store)
    guilty, innocent = Member(), Member()
    writer.record(guilty, event(1))
    await turns()
    writer.record(guilty, event(2))
    writer.record(innocent, event(1))
    batch, future = store.batches[0]
    batch.refused.append((batch.waiting[0], DatabaseError("refused")))
    future.set_result(None)
    await turns()
    assert len(guilty.refusals) == 1
    assert [party.member for party in store.batches[1][0].waiting] == [innocent]


async def test_starts_wait_for_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer_module, "MAX_WAITING_ROWS", 3)
    store = FakeStore()
    writer, _ = make(store)
    starts = [asyncio.ensure_future(writer.start(start(str(n)), False, ignore)) for n in range(8)]
    await turns()
    seen = 0
    while not all(task.done() for task in starts):
        while seen < len(store.batches):
            assert len(store.batches[seen][0].waiting) <= 8
            store.batches[seen][1].set_result(None)
            seen += 1
        await asyncio.sleep(0)
    assert seen >= 2


def test_bisection_finds_every_guilty_party_and_commits_all_others() -> None:
    batch = Batch(1)
    batch.waiting = [Party(Member()) for _ in range(13)]
    guilty = {id(batch.waiting[n]) for n in (0, 5, 6, 12)}
    committed: list[int] = []

    def commit(parties: list[Party]) -> Written:
        if any(id(party) in guilty for party in parties):
            raise sqlite3.IntegrityError("UNIQUE")
        committed.extend(id(party) for party in parties)
        return Written(set())

    everyone = {id(party) for party in batch.waiting}
    run_batch(batch, commit)
    assert {id(party) for party, _ in batch.refused} == guilty
    assert set(committed) == everyone - guilty
    assert len(committed) == len(set(committed))
    assert batch.waiting == []


def test_bisection_that_fails_in_the_middle_goes_on_where_it_was() -> None:
    batch = Batch(1)
    parties = batch.waiting = [Party(Member()) for _ in range(4)]
    order = list(parties)
    committed: list[Party] = []
    failures = iter([sqlite3.IntegrityError("UNIQUE"), None, sqlite3.OperationalError("locked"), None])

    def commit(some: list[Party]) -> Written:
        failure = next(failures)
        if failure is not None:
            raise failure
        committed.extend(some)
        return Written(set())

    with pytest.raises(sqlite3.OperationalError):
        run_batch(batch, commit)
    assert batch.waiting == order[2:]
    run_batch(batch, commit)
    assert committed == order


def held_flushes(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Callable[[], None]], Callable[[], None]]:
    """Flushes stay away until they are let go."""
    real = Store.flush
    held: list[Callable[[], None]] = []
    is_open = False

    def flush(self: Store, *arguments: Any) -> Future[None]:
        if is_open:
            return real(self, *arguments)
        future: Future[None] = Future()

        def go() -> None:
            real(self, *arguments).add_done_callback(lambda done: future.set_result(done.result()))

        held.append(go)
        return future

    def open_all() -> None:
        nonlocal is_open
        is_open = True
        while held:
            held.pop(0)()

    monkeypatch.setattr(Store, "flush", flush)
    return held, open_all


async def test_no_activity_starts_before_the_outcome_before_it_is_durable(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[str] = []
    seen: list[str] = []

    @activity
    async def step(name: str) -> str:
        started.append(name)
        return name

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        for name in ("a", "b"):
            await step(name)
            seen.append(name)

    async with App(database) as app:
        held, open_all = held_flushes(monkeypatch)
        starting = asyncio.ensure_future(app.start_workflow(flow))
        while not held:
            await asyncio.sleep(0)
        await turns(20)
        assert started == [], "the start was not durable yet"
        held.pop(0)()
        while not held:
            await asyncio.sleep(0)
        await turns(20)
        # The code has seen the result, for it has no side effects; the next activity waits for the commit.
        assert seen == ["a"]
        assert started == ["a"]
        result = asyncio.ensure_future((await starting).result(RESULT_TIMEOUT_S))
        open_all()
        await result
        assert started == ["a", "b"]


async def test_result_is_not_given_out_before_the_end_is_durable(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()

    @activity
    async def work() -> str:
        await go.wait()
        return "end"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await work()

    async with App(database) as app:
        handle = await app.start_workflow(flow)
        # Somebody waits already when the end comes.
        result = asyncio.ensure_future(handle.result(RESULT_TIMEOUT_S))
        await turns()
        held, open_all = held_flushes(monkeypatch)
        go.set()
        while not held:
            await asyncio.sleep(0)
        await turns(20)
        assert not result.done()
        open_all()
        assert await result == "end"


async def test_three_sequential_activities_cost_four_commits(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commits = []
    real = Store._write_parties
    monkeypatch.setattr(Store, "_write_parties", lambda self, *a: commits.append(1) or real(self, *a))

    @activity
    async def step() -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        for _ in range(3):
            await step()

    async with App(database) as app:
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert len(commits) == 4
    assert rows(database, "SELECT count(*) FROM romancy_history") == [(3,)]


async def test_latest_state_of_an_instance_stands_for_the_earlier_ones() -> None:
    store = FakeStore()
    writer, _ = make(store)
    member = Member()
    for status in ("waiting_for_timer", "running", "waiting_for_timer", "completed"):
        writer.record(member, None, StateRow("i", status, None, None, 0, None, None, None))
    await turns()
    states = [party.state for party in store.batches[0][0].waiting]
    assert [state and state.status for state in states] == ["completed"]
