"""Connections to a server that break at every request in turn: nothing lost, nothing doubled, nobody stuck."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import Connection, make_url

from romancy import (
    App,
    DatabaseUnavailableError,
    RetryPolicy,
    Status,
    Workflow,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy.storage import stores
from romancy.storage.failures import HistoryConflictError
from romancy.storage.mysql import MysqlStore
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.rows import HistoryRow
from romancy.storage.server import ServerStore
from tests.databases import Database, clean, execute, kind_of, rows
from tests.ledger import INSERT, create_ledger
from tests.proxy import Proxy, When
from tests.support import RESULT_TIMEOUT_S, wait_for_status

PORTS = {"postgresql": 5432, "mysql": 3306}
REQUESTS = 24
"""More than one run of the workflow sends."""


@pytest.fixture(params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    url: str = request.getfixturevalue(f"{request.param}_url")
    yield url
    clean(url)


@contextmanager
def behind_proxy(url: str) -> Iterator[tuple[Proxy, str]]:
    parts = make_url(url)
    proxy = Proxy(parts.host or "127.0.0.1", parts.port or PORTS[kind_of(url)])
    try:
        yield proxy, parts.set(host="127.0.0.1", port=proxy.port).render_as_string(hide_password=False)
    finally:
        proxy.close()


def in_plain_text(url: str) -> str:
    """Without TLS, which PyMySQL uses wherever the server has it, so that the proxy can read."""
    if kind_of(url) == "postgresql":
        return url
    return make_url(url).update_query_dict({"ssl_disabled": "true"}).render_as_string(hide_password=False)


def define() -> Workflow[..., Any]:
    @activity
    async def plain(name: str) -> str:
        return name

    @activity(retry=RetryPolicy.no_retry())
    async def book(name: str) -> str:
        await current_activity().session.execute(INSERT, {"token": f"{current_activity().instance_id} {name}"})
        return name

    @activity(retry=RetryPolicy.no_retry())
    def book_in_thread(name: str) -> str:
        current_activity().sync_session.execute(INSERT, {"token": f"{current_activity().instance_id} {name}"})
        return name

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        found = [await plain("a"), await book("b")]
        found += await asyncio.gather(book("c"), book_in_thread("d"), plain("e"))
        found += [await book("f"), await book("g"), await book("h"), await book("i")]
        return found

    return flow


def check(server: Database, instance_id: str) -> None:
    sql = "SELECT operation_id FROM romancy_history WHERE instance_id = ? AND kind = 'ActivityCompleted'"
    outcomes = Counter(activity_id for (activity_id,) in rows(server, sql, instance_id))
    assert outcomes == Counter(
        ["plain:1", "book:1", "book:2", "book_in_thread:1", "plain:2", "book:3", "book:4", "book:5", "book:6"]
    )
    tokens = [token for (token,) in rows(server, "SELECT token FROM ledger WHERE token LIKE ?", f"{instance_id} %")]
    assert sorted(tokens) == [f"{instance_id} {name}" for name in "bcdfghi"]


@pytest.mark.parametrize("when", ["before", "after"])
async def test_connection_that_breaks_at_any_request(server: str, when: When) -> None:
    create_ledger(server)
    flow = define()
    with behind_proxy(server) as (proxy, url):
        async with App(url) as app:
            for request in range(1, REQUESTS):
                instance_id = f"{when}-{request:02}"
                proxy.cut_at(request, when)
                handle = await start_until_it_works(app, flow, instance_id)
                assert await handle.result(RESULT_TIMEOUT_S) == list("abcdefghi")
                check(server, instance_id)
            proxy.spare()
            assert proxy.cuts >= REQUESTS - 4
        assert rows(server, "SELECT count(*) FROM romancy_instances WHERE status <> 'completed'") == [(0,)]


async def start_until_it_works(app: App, flow: Workflow[..., Any], instance_id: str) -> Any:
    """A start with an id of one's own may be repeated."""
    while True:
        try:
            return await app.start_workflow(flow, id=instance_id)
        except Exception as error:
            assert "can't be reached" in str(error), error


async def test_server_that_is_away_for_a_while_is_an_error_of_the_database(
    server: str, romancy_log: pytest.LogCaptureFixture
) -> None:
    create_ledger(server)
    flow = define()
    with behind_proxy(server) as (proxy, url):
        async with App(url) as app:
            proxy.go_away()
            for _ in range(2):
                with pytest.raises(DatabaseUnavailableError):
                    await app.send_to("it", "inbox", 1)
                with pytest.raises(DatabaseUnavailableError):
                    await app.start_workflow(flow, id="it")
            proxy.come_back()
            handle = await start_until_it_works(app, flow, "it")
            assert await handle.result(RESULT_TIMEOUT_S) == list("abcdefghi")
    assert "unforeseen" not in romancy_log.text


async def test_server_that_ends_all_connections(server: str) -> None:
    create_ledger(server)
    flow = define()
    async with App(server) as app:
        handles = []
        for number in range(20):
            handles.append(await start_until_it_works(app, flow, f"number-{number}"))
            if number % 5 == 4:
                end_all_connections(server)
        for handle in handles:
            assert await handle.result(RESULT_TIMEOUT_S) == list("abcdefghi")
            check(server, handle.instance_id)


def end_all_connections(server: str) -> None:
    if kind_of(server) == "postgresql":
        rows(
            server,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        return
    sql = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND id <> CONNECTION_ID()"
    for (number,) in rows(server, sql):
        try:
            execute(server, f"KILL {number}")
        except Exception as error:
            assert "Unknown thread id" in str(error)


async def test_message_whose_commit_was_not_heard_of_is_delivered_once(server: str) -> None:
    @workflow
    async def consumer(ctx: WorkflowContext, count: int) -> list[int]:
        await ctx.subscribe("jobs", mode="competing")
        return [(await ctx.receive("jobs", type=int)).data for _ in range(count)]

    with behind_proxy(server) as (proxy, url):
        async with App(server) as reader, App(in_plain_text(url), worker=False) as sender:
            handle = await reader.start_workflow(consumer, 8)
            await wait_for_status(reader, handle.instance_id, Status.WAITING_FOR_MESSAGE)
            for number in range(8):
                proxy.cut_at(1, "after", containing=b"COMMIT")
                await sender.publish("jobs", number)
            assert await handle.result(RESULT_TIMEOUT_S) == list(range(8))
            assert proxy.cuts == 8
    assert rows(server, "SELECT count(*) FROM romancy_mail") == [(0,)]


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "def"])
@pytest.mark.parametrize("is_committed", [True, False], ids=["committed", "refused"])
async def test_connection_that_breaks_when_all_has_been_said_changes_nothing(
    server: str,
    is_async: bool,
    is_committed: bool,
    monkeypatch: pytest.MonkeyPatch,
    romancy_log: pytest.LogCaptureFixture,
) -> None:
    create_ledger(server)
    commits: list[str] = []

    def commit_and_cut(store: ServerStore, connection: Connection, worker: str, event: HistoryRow, *rest: Any) -> Any:
        commits.append(worker)
        line = store.line_of(connection)
        assert line is not None
        if is_committed:
            commit_in[type(store)](store, connection, worker, event, *rest)
        line.cut()
        if not is_committed and len(commits) == 1:
            raise HistoryConflictError("this is somebody else's")

    commit_in = {kind: kind.commit_in for kind in (PostgresqlStore, MysqlStore)}
    for kind in commit_in:
        monkeypatch.setattr(kind, "commit_in", commit_and_cut)

    @activity
    async def book() -> None:
        await current_activity().session.execute(INSERT, {"token": "once"})

    @activity
    def book_in_thread() -> None:
        current_activity().session.execute(INSERT, {"token": "once"})

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        await (book() if is_async else book_in_thread())
        return 1

    async with App(server) as app:
        handle = await app.start_workflow(flow)
        if is_committed:
            assert await handle.result(RESULT_TIMEOUT_S) == 1
        else:
            async with asyncio.timeout(RESULT_TIMEOUT_S):
                while "this is somebody else's" not in romancy_log.text:
                    await asyncio.sleep(0.01)
    assert len(commits) == 1
    assert rows(server, "SELECT count(*) FROM ledger") == [(int(is_committed),)]
    assert "unforeseen" not in romancy_log.text


async def test_connection_that_mysql_ends_for_idleness_is_made_anew_before_it_is_missed(
    mysql_url: str, monkeypatch: pytest.MonkeyPatch, romancy_log: pytest.LogCaptureFixture
) -> None:
    """MySQL frees the locks of a host that has vanished by no other means than a time for all that is idle."""
    if "MariaDB" in rows(mysql_url, "SELECT VERSION()")[0][0]:
        pytest.skip("MariaDB ends idle transactions, and no other connections")
    monkeypatch.setattr(stores, "SHORTEST_PATIENCE_S", 1.0)
    idle = "SELECT id FROM information_schema.processlist WHERE db = DATABASE() AND command = 'Sleep'"
    others = {number for (number,) in rows(mysql_url, idle)}
    async with App(mysql_url, worker=False, lease_ttl=1.0) as app:
        await app.send_event("news", 1, key="k")
        async with asyncio.timeout(RESULT_TIMEOUT_S):
            while {number for (number,) in rows(mysql_url, idle)} - others:
                await asyncio.sleep(0.05)
        await app.send_event("news", 2, key="k")
    assert rows(mysql_url, "SELECT count(*) FROM romancy_mail") == [(2,)]
    assert "can't be reached" not in romancy_log.text
    clean(mysql_url)


async def test_user_with_a_password_that_mysql_has_forgotten_the_hash_of(mysql_url: str) -> None:
    """It lets those in whose hash it knows, and asks others for the password, encrypted: that takes a library."""
    url = make_url(mysql_url)
    execute(mysql_url, "CREATE USER 'romancy_test'@'%' IDENTIFIED BY 'secret'")
    try:
        execute(mysql_url, f"GRANT ALL ON {url.database}.* TO 'romancy_test'@'%'")
        create_ledger(mysql_url)
        flow = define()
        own = url.set(username="romancy_test", password="secret").render_as_string(hide_password=False)
        async with App(own) as app:
            execute(mysql_url, "FLUSH PRIVILEGES")
            handle = await app.start_workflow(flow, id="it")
            assert await handle.result(RESULT_TIMEOUT_S) == list("abcdefghi")
            execute(mysql_url, "FLUSH PRIVILEGES")
            assert await app.get_instance("it") is not None
        async with App(in_plain_text(own), worker=False) as app:
            pass
    finally:
        execute(mysql_url, "DROP USER 'romancy_test'@'%'")
    clean(mysql_url)
