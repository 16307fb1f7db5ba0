"""Group commits that the event loop itself sends to PostgreSQL, on the connection of the writer's thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url

from romancy import (
    App,
    DatabaseError,
    DatabaseLockedError,
    DatabaseUnavailableError,
    WorkflowContext,
    activity,
    workflow,
)
from romancy.errors import FencedError
from romancy.storage import database as database_module
from romancy.storage import postgresql as postgresql_module
from romancy.storage import threads as threads_module
from romancy.storage.address import parse_address
from romancy.storage.batch import Batch, Party
from romancy.storage.flight import Flight
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.postgresql_link import PREPARE_AFTER, PostgresqlLink
from romancy.storage.rows import HistoryRow, StartRow, WorkerRow
from romancy.storage.stores import make_store
from romancy.storage.threads import ConnectionThread, Link
from romancy.storage.writer import Recorder
from tests.databases import clean, execute, rows
from tests.support import RESULT_TIMEOUT_S

CARRIED: ContextVar[str] = ContextVar("carried")
ME = "me"
LARGE = 2_000_000
"""Characters; no small socket takes so many at once."""


@pytest.fixture
def url(postgresql_url: str) -> Iterator[str]:
    yield postgresql_url
    clean(postgresql_url)


@contextlib.contextmanager
def opened(url: str) -> Iterator[PostgresqlStore]:
    store = make_store(parse_address(url), ["flow"])
    assert isinstance(store, PostgresqlStore)
    store.open(migrate=True)
    execute(url.partition("?")[0], "DELETE FROM romancy_workers")
    store.register(WorkerRow(ME, "w", "alive", "here", 1, 1, 2**60), started_at=0).result()
    try:
        yield store
    finally:
        store.close()


@pytest.fixture
def store(url: str) -> Iterator[PostgresqlStore]:
    with opened(url) as store:
        yield store


def thread_of(store: PostgresqlStore) -> ConnectionThread:
    assert store._writer is not None
    return store._writer


def start(instance_id: str, text: str = "{}") -> StartRow:
    return StartRow(instance_id, 1, "flow", "running", ME, None, 0, 0, 0, 0, None, text)


def batch_of(*starts: StartRow) -> Batch:
    batch = Batch(1)
    for row in starts:
        party = Party(Recorder())
        party.keyed_starts = [row]
        batch.waiting.append(party)
    batch.row_count = len(starts)
    return batch


def stored(url: str) -> list[str]:
    return [i for (i,) in rows(url, "SELECT instance_id FROM romancy_instances ORDER BY instance_id")]


def departed(store: PostgresqlStore, batch: Batch) -> Future[None]:
    """A flush that is on its way without a thread."""
    outcome = store.flush(batch, ME)
    assert thread_of(store)._loan is not None
    return outcome


def link_of(store: PostgresqlStore) -> PostgresqlLink:
    link = thread_of(store)._link
    assert isinstance(link, PostgresqlLink)
    return link


def narrow(store: PostgresqlStore) -> None:
    """Let the socket take little at once."""
    with socket.socket(fileno=socket.dup(link_of(store).descriptor())) as same:
        same.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)


def has_more_to_send(store: PostgresqlStore) -> bool:
    flight = thread_of(store)._loan
    assert isinstance(flight, Flight)
    return flight._has_writer


async def landed(outcome: Future[None]) -> None:
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        await asyncio.wrap_future(outcome)


@contextlib.contextmanager
def locked_worker(url: str) -> Iterator[psycopg.Connection]:
    """The fence waits."""
    with psycopg.connect(url) as connection:
        connection.execute("SELECT 1 FROM romancy_workers FOR UPDATE")
        yield connection


async def test_the_loop_sends_and_hears(store: PostgresqlStore, url: str) -> None:
    batch = batch_of(start("one"), start("two"))
    await landed(departed(store, batch))
    assert batch.inserted == {"one", "two"}
    assert not batch.waiting
    assert stored(url) == ["one", "two"]
    again = batch_of(start("two"), start("three"))
    await landed(departed(store, again))
    assert again.inserted == {"three"}


async def test_who_looks_hears_without_a_turn_of_the_loop(store: PostgresqlStore, url: str) -> None:
    store.look()
    with locked_worker(url) as holder:
        outcome = departed(store, batch_of(start("one")))
        store.look()
        assert not outcome.done()
        holder.rollback()
        contexts: list[int] = []
        outcome.add_done_callback(lambda _: contexts.append(len(copy_context())))
        CARRIED.set("by who happened to look")
        began = time.monotonic()
        while not outcome.done() and time.monotonic() - began < RESULT_TIMEOUT_S:
            store.look()
    assert stored(url) == ["one"]
    assert contexts == [0]
    assert thread_of(store)._loan is None
    store.look()
    await landed(departed(store, batch_of(start("two"))))


async def test_unforeseen_error_is_the_end_of_a_batch_too(
    store: PostgresqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    batch = batch_of(start("one"))
    with monkeypatch.context() as patch:
        patch.setattr(store, "_note_written", fail)
        outcome = departed(store, batch)
        with pytest.raises(ZeroDivisionError):
            await landed(outcome)
    # What it has written is found, and not taken for somebody else's.
    await landed(store.flush(batch, ME))
    assert batch.inserted == {"one"}
    assert not batch.refused


async def test_nothing_is_left_on_the_loop(store: PostgresqlStore) -> None:
    loop = asyncio.get_running_loop()
    await landed(departed(store, batch_of(start("one"))))
    descriptor = link_of(store).descriptor()
    assert not loop.remove_reader(descriptor)
    assert not loop.remove_writer(descriptor)


async def test_thread_finishes_what_a_blocked_loop_has_begun(store: PostgresqlStore, url: str) -> None:
    outcome = departed(store, batch_of(start("one")))
    # The loop stands still from here on; so a lease could not be renewed.
    assert store._write(lambda link: link.execute("SELECT 7").fetchone()).result(RESULT_TIMEOUT_S) == (7,)
    assert stored(url) == ["one"]
    assert not outcome.done()
    await landed(outcome)
    await landed(departed(store, batch_of(start("two"))))


async def test_thread_that_is_busy_writes_itself(store: PostgresqlStore, url: str) -> None:
    job = store._write(lambda link: time.sleep(0.1))
    outcome = store.flush(batch_of(start("one")), ME)
    assert thread_of(store)._loan is None
    await landed(outcome)
    assert job.done()
    assert stored(url) == ["one"]


async def test_more_than_the_socket_takes_at_once(store: PostgresqlStore, url: str) -> None:
    narrow(store)
    outcome = departed(store, batch_of(start("large", "x" * LARGE)))
    assert has_more_to_send(store)
    await landed(outcome)
    assert rows(url, "SELECT length(input) FROM romancy_instances") == [(LARGE,)]


async def test_thread_sends_the_rest_for_a_blocked_loop(store: PostgresqlStore, url: str) -> None:
    narrow(store)
    outcome = departed(store, batch_of(start("large", "x" * LARGE)))
    assert has_more_to_send(store)
    store._write(lambda link: None).result(RESULT_TIMEOUT_S)
    assert rows(url, "SELECT length(input) FROM romancy_instances") == [(LARGE,)]
    await landed(outcome)
    await test_nothing_is_left_on_the_loop(store)


async def test_lost_lease_is_told(store: PostgresqlStore, url: str) -> None:
    execute(url, "UPDATE romancy_workers SET state = 'dead'")
    with pytest.raises(FencedError):
        await landed(departed(store, batch_of(start("one"))))
    assert stored(url) == []


@pytest.mark.parametrize("text", ["\0", "\ud800"], ids=["nul", "surrogate"])
async def test_row_that_is_refused_leaves_the_others(store: PostgresqlStore, url: str, text: str) -> None:
    batch = batch_of(start("one"), start("bad", text), start("two"))
    await landed(store.flush(batch, ME))
    assert [party.keyed_starts[0].instance_id for party, _ in batch.refused] == ["bad"]
    assert stored(url) == ["one", "two"]


async def test_row_that_the_server_refuses_leaves_the_others(store: PostgresqlStore, url: str) -> None:
    batch = batch_of(start("one"), start("two"))
    batch.waiting[0].history = [HistoryRow("one", 1, 2**40, "kind", None, None, None, 1, 1, None, None, None, None)]
    await landed(departed(store, batch))
    ((party, error),) = batch.refused
    assert party.keyed_starts[0].instance_id == "one"
    assert "out of range" in str(error)
    assert stored(url) == ["two"]


async def test_connection_that_breaks_on_the_way_leaves_it_unsure(store: PostgresqlStore, url: str) -> None:
    batch = batch_of(start("one"))
    with locked_worker(url):
        outcome = departed(store, batch)
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = "
        others += "current_database()"
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while rows(url, others) == []:
                await asyncio.sleep(0.01)
        with pytest.raises(DatabaseUnavailableError):
            await landed(outcome)
    assert batch.is_unsure
    assert stored(url) == []
    retried = store.flush(batch, ME)
    assert thread_of(store)._loan is None
    await landed(retried)
    assert stored(url) == ["one"]
    await landed(departed(store, batch_of(start("two"))))


def hang_up(url: str) -> None:
    others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
    rows(url, others + "pg_backend_pid()")


async def test_server_that_hangs_up_between_two_is_noticed(store: PostgresqlStore, url: str) -> None:
    await landed(departed(store, batch_of(start("one"))))
    hang_up(url)
    batch = batch_of(start("two"))
    with pytest.raises(DatabaseUnavailableError):
        await landed(departed(store, batch))
    await landed(store.flush(batch, ME))
    assert stored(url) == ["one", "two"]


async def test_commit_that_fails_after_its_row_is_told(store: PostgresqlStore, url: str) -> None:
    execute(url, "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN RAISE EXCEPTION 'no'; END$$")
    execute(
        url,
        "CREATE CONSTRAINT TRIGGER refusing AFTER INSERT ON romancy_instances DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION refuse()",
    )
    try:
        with pytest.raises(DatabaseError, match="no CONTEXT"):
            await landed(departed(store, batch_of(start("one"))))
        assert stored(url) == []
    finally:
        execute(url, "DROP TRIGGER refusing ON romancy_instances")
        execute(url, "DROP FUNCTION refuse()")


async def test_lock_is_waited_for_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql_module, "MOST_LOCK_WAIT_S", 0.6)
    with opened(url) as store, locked_worker(url):
        began = time.monotonic()
        with pytest.raises(DatabaseLockedError):
            await landed(departed(store, batch_of(start("one"))))
        assert time.monotonic() - began < 1.1


@pytest.mark.parametrize("is_blocked", [False, True])
async def test_connection_that_breaks_while_there_is_more_to_send(
    store: PostgresqlStore, url: str, is_blocked: bool
) -> None:
    narrow(store)
    batch = batch_of(start("large", "x" * LARGE))
    outcome = departed(store, batch)
    assert has_more_to_send(store)
    link_of(store).line.cut()
    if is_blocked:
        store._write(lambda link: None).result(RESULT_TIMEOUT_S)
    with pytest.raises(DatabaseUnavailableError):
        await landed(outcome)
    assert batch.is_unsure
    await landed(store.flush(batch, ME))
    assert stored(url) == ["large"]


async def test_connection_that_was_lost_without_a_word_is_made_anew(store: PostgresqlStore, url: str) -> None:
    """Where a hint fails, nobody is told."""
    link_of(store).line.cut()
    store.tell_others().result(RESULT_TIMEOUT_S)
    batch = batch_of(start("one"))
    await landed(store.flush(batch, ME))
    await landed(departed(store, batch_of(start("two"))))
    assert stored(url) == ["one", "two"]


async def test_server_that_has_hung_up_while_the_loop_is_busy(store: PostgresqlStore, url: str) -> None:
    await landed(departed(store, batch_of(start("one"))))
    hang_up(url)
    time.sleep(0.1)
    outcome = departed(store, batch_of(start("two")))
    assert store._write(lambda link: 7).result(RESULT_TIMEOUT_S) == 7
    with pytest.raises(DatabaseUnavailableError):
        await landed(outcome)


async def test_descriptor_of_a_lost_connection_may_be_anothers_by_then(
    store: PostgresqlStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread closes it; and in the same turn of the loop somebody opens a pipe."""

    def connect() -> Link:
        raise DatabaseUnavailableError("it is down")

    loop = asyncio.get_running_loop()
    with locked_worker(url):
        outcome = departed(store, batch_of(start("one")))
        descriptor = link_of(store).descriptor()
        monkeypatch.setattr(thread_of(store), "_connect", connect)
        link_of(store).line.cut()
        with pytest.raises(DatabaseUnavailableError):
            store._write(lambda link: None).result(RESULT_TIMEOUT_S)
    pipes: list[int] = []
    while descriptor not in pipes:
        pipes += os.pipe()
    heard = asyncio.Event()
    loop.add_reader(descriptor, heard.set)
    os.write(pipes[pipes.index(descriptor) + 1], b"x")
    with pytest.raises(DatabaseUnavailableError):
        await landed(outcome)
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        await heard.wait()
    assert loop.remove_reader(descriptor)
    for end in pipes:
        os.close(end)


async def test_activities_have_nobodys_context(url: str) -> None:
    """Not even that of the request which happened to send the commit that told of the lost lease."""
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen: set[str] = set()

    @activity
    async def look() -> None:
        seen.add(who.get())

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await look()
        seen.add(who.get())

    async def request(app: App) -> None:
        who.set("request")
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)

    def worker_of(app: App) -> str | None:
        return None if app._life.worker is None else app._life.worker.worker_id

    async with App(url, lease_ttl=30) as app:
        await asyncio.create_task(request(app))
        before = worker_of(app)
        execute(url, "UPDATE romancy_workers SET state = 'dead'")
        last = asyncio.create_task(request(app))
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while worker_of(app) in (before, None):
                await asyncio.sleep(0.01)
            await (await app.start_workflow(flow)).result()
        last.cancel()
    assert seen == {"nobody"}


class HalfCloser:
    """A proxy that reads no more, then says that it will write no more."""

    def __init__(self, server: tuple[str, int]) -> None:
        self._server = server
        self._clients: list[socket.socket] = []
        self._is_over = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def half_close(self) -> None:
        self._is_over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        for client in self._clients:
            client.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._listener.close()
        for client in self._clients:
            client.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
                server = socket.create_connection(self._server)
                self._clients.append(client)
                for ends in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=ends, daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while not self._is_over.is_set() and (data := source.recv(4_096)):
                target.sendall(data)


@pytest.mark.parametrize("is_blocked", [False, True])
async def test_server_that_says_no_more_while_there_is_more_to_send(url: str, is_blocked: bool) -> None:
    """The driver raises when it sends, not when it receives."""
    parts = make_url(url)
    proxy = HalfCloser((parts.host or "127.0.0.1", parts.port or 5432))
    with contextlib.closing(proxy):
        through = parts.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
        with opened(through) as store:
            narrow(store)
            outcome = departed(store, batch_of(start("large", "x" * 12 * LARGE)))
            assert has_more_to_send(store)
            proxy.half_close()
            if is_blocked:
                with pytest.raises(DatabaseError):
                    store._write(lambda link: link.execute("SELECT 7")).result(RESULT_TIMEOUT_S)
            with pytest.raises(DatabaseUnavailableError):
                await landed(outcome)
            assert thread_of(store)._thread.is_alive()


async def test_statements_that_somebody_has_discarded_are_prepared_again(store: PostgresqlStore, url: str) -> None:
    def count(link: Link) -> int:
        asked = "SELECT count(*) FROM pg_prepared_statements WHERE starts_with(name, 'romancy')"
        return int(link.execute(asked).fetchone()[0])

    for number in range(3 * PREPARE_AFTER):
        batch = batch_of(start(f"{number:02}"))
        await landed(store.flush(batch, ME))
        assert batch.inserted == {f"{number:02}"}
        if number == PREPARE_AFTER:
            assert store._write(count).result(RESULT_TIMEOUT_S) == 1
            store._write(lambda link: link.execute("DEALLOCATE ALL")).result(RESULT_TIMEOUT_S)
            assert store._write(count).result(RESULT_TIMEOUT_S) == 0
        store._write(lambda link: None).result(RESULT_TIMEOUT_S)
    assert store._write(count).result(RESULT_TIMEOUT_S) == 1
    assert len(stored(url)) == 3 * PREPARE_AFTER


async def test_statements_sent_again_and_again_are_prepared(store: PostgresqlStore) -> None:
    asked = "SELECT count(*) FROM pg_prepared_statements WHERE starts_with(name, 'romancy') AND generic_plans > 0"
    for number in range(PREPARE_AFTER + 1):
        await landed(store.flush(batch_of(start(f"i{number}")), ME))
        store._write(lambda link: None).result(RESULT_TIMEOUT_S)
    assert store._write(lambda link: link.execute(asked).fetchone()).result(RESULT_TIMEOUT_S) == (1,)


async def test_statements_are_prepared_at_once_where_that_is_asked_for(url: str) -> None:
    asked = "SELECT count(*) FROM pg_prepared_statements WHERE starts_with(name, 'romancy')"
    with opened(f"{url}?prepare_threshold=0") as store:
        await landed(departed(store, batch_of(start("one"))))
        assert store._write(lambda link: link.execute(asked).fetchone()).result(RESULT_TIMEOUT_S) == (1,)


async def test_nothing_is_prepared_where_that_is_switched_off(url: str) -> None:
    asked = "SELECT count(*) FROM pg_prepared_statements"
    with opened(f"{url}?prepare_threshold=none") as store:
        for number in range(PREPARE_AFTER + 1):
            await landed(departed(store, batch_of(start(f"i{number}"))))
        assert store._write(lambda link: link.execute(asked).fetchone()).result(RESULT_TIMEOUT_S) == (0,)


async def test_loop_that_can_watch_no_sockets_has_the_thread(
    store: PostgresqlStore, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add_reader(*_: Any) -> None:
        raise NotImplementedError

    monkeypatch.setattr(asyncio.get_running_loop(), "add_reader", add_reader)
    for name in ("one", "two"):
        await landed(store.flush(batch_of(start(name)), ME))
    assert stored(url) == ["one", "two"]


async def test_closing_while_a_statement_wants_to_be_prepared(url: str) -> None:
    with opened(url) as store:
        for number in range(PREPARE_AFTER - 1):
            await landed(departed(store, batch_of(start(f"i{number}"))))
        outcome = departed(store, batch_of(start("last")))
        store.close()  # the loop stands still, and the thread finishes
        await landed(outcome)


async def test_closing_waits_for_the_answer_and_not_for_ever(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database_module, "LONGEST_CLOSE_S", 0.3)
    with opened(url) as store:
        in_time = departed(store, batch_of(start("in time")))
        await asyncio.to_thread(store.close)
        await landed(in_time)
    with opened(url) as store, locked_worker(url):
        too_late = departed(store, batch_of(start("too late")))
        began = time.monotonic()
        await asyncio.to_thread(store.close)
        assert time.monotonic() - began < 3
        with pytest.raises(DatabaseError):
            await landed(too_late)
    # The server may still carry out what it was told.
    assert "in time" in stored(url)


async def test_flushes_and_jobs_in_any_order(store: PostgresqlStore, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs come from the loop and from other threads, such as the one that renews the lease; and the loop stops."""
    monkeypatch.setattr(threads_module, "LONGEST_LOAN_S", 0.0005)
    chance = random.Random(4)
    done = asyncio.Event()

    def ask(link: Link) -> int:
        return int(link.execute("SELECT 7").fetchone()[0])

    async def keep_asking() -> int:
        asked = 0
        while not done.is_set():
            assert await asyncio.to_thread(lambda: store._write(ask).result(RESULT_TIMEOUT_S)) == 7
            asked += 1
            await asyncio.sleep(chance.random() / 500)
        return asked

    asking = asyncio.create_task(keep_asking())
    expected = []
    on_loop = 0
    for number in range(400):
        names = [f"{number:03}-{n}" for n in range(chance.choice((1, 2, 5)))]
        expected += names
        batch = batch_of(*map(start, names))
        outcome = store.flush(batch, ME)
        on_loop += thread_of(store)._loan is not None
        if chance.random() < 0.2:
            time.sleep(0.002)
        await landed(outcome)
        assert batch.inserted == set(names)
    done.set()
    assert await asking > 20
    assert on_loop > 50
    assert stored(url) == sorted(expected)
