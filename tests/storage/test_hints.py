"""Hints that are lost: a listener notices that it is deaf, and a worker that looks is enough."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from romancy import App, ConfigurationError, Status, Workflow, WorkflowContext, activity, workflow
from romancy.engine import claims as claims_module
from romancy.storage import listener as listener_module
from romancy.storage.listener import Listener
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.postgresql_link import PostgresqlLink
from tests.databases import clean
from tests.pgbouncer import pgbouncer
from tests.support import RESULT_TIMEOUT_S, wait_for_status

HASTE = 10
"""How much shorter everything periodic is in these tests."""

LEASE_TTL_S = 10.0 / HASTE


@pytest.fixture
def database(postgresql_url: str) -> Iterator[str]:
    yield postgresql_url
    clean(postgresql_url)


@pytest.fixture(autouse=True)
def _haste(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in (
        (claims_module, "SCAN_INTERVAL_S"),
        (claims_module, "CLEARING_INTERVAL_S"),
        (listener_module, "CALL_INTERVAL_S"),
        (listener_module, "LONGEST_ECHO_S"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name) / HASTE)


@contextmanager
def drop_notifications() -> Iterator[None]:
    """Let listeners hear nothing, not even themselves."""
    real = PostgresqlStore._wait_for_hint
    is_over = threading.Event()

    def wait(self: PostgresqlStore, link: Any, timeout_s: float) -> str | None:
        heard = real(self, link, timeout_s)
        return heard if is_over.is_set() else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PostgresqlStore, "_wait_for_hint", wait)
        yield
        is_over.set()


@pytest.fixture(params=["pooler", "dropped"])
def deaf(request: pytest.FixtureRequest, database: str) -> Iterator[str]:
    """An address on which no notification ever arrives."""
    if request.param == "pooler":
        with pgbouncer(database) as url:
            yield url
    else:
        with drop_notifications():
            yield database


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(RESULT_TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


def listener_of(app: App) -> Listener:
    listener = app._life.store._listener
    assert listener is not None
    return listener


def define() -> Workflow[..., Any]:
    @activity
    async def answer(text: str) -> str:
        return text

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        event = await ctx.wait_event("go", key=ctx.instance_id, type=str)
        return await answer(event.data)

    return flow


async def test_listener_hears_itself(database: str, romancy_log: pytest.LogCaptureFixture) -> None:
    async with App(database) as app:
        await until(lambda: listener_of(app)._has_heard)
        assert not app._life.store.is_deaf
    assert "NOTIFY" not in romancy_log.text


async def test_worker_is_right_when_every_hint_is_lost(deaf: str, romancy_log: pytest.LogCaptureFixture) -> None:
    flow = define()
    async with App(deaf, lease_ttl=LEASE_TTL_S) as app, App(deaf, worker=False) as client:
        await until(lambda: app._life.store.is_deaf)
        for number in range(3):
            handle = await client.start_workflow(flow, id=f"number-{number}")
            await wait_for_status(client, handle.instance_id, Status.WAITING_FOR_EVENT)
            await client.send_event("go", f"answer {number}", key=handle.instance_id)
            assert await handle.result(RESULT_TIMEOUT_S) == f"answer {number}"
        cancelled = await client.start_workflow(flow)
        await wait_for_status(client, cancelled.instance_id, Status.WAITING_FOR_EVENT)
        await client.cancel(cancelled.instance_id)
        await wait_for_status(client, cancelled.instance_id, Status.CANCELLED)
    warnings = [record for record in romancy_log.records if "has not come back" in record.getMessage()]
    assert len(warnings) == 1
    assert "App(listen_on=…)" in warnings[0].getMessage()


async def test_deaf_worker_looks_often_while_something_goes_on(database: str) -> None:
    flow = define()
    with drop_notifications():
        async with App(database, lease_ttl=100) as app:
            await until(lambda: app._life.store.is_deaf)
            worker = app._life.worker
            assert worker is not None
            await app.start_workflow(flow)
            await worker.writer.drained()
            waits_s = [worker._claims._next_scan_wait_s() for _ in range(5)]
            assert waits_s == [0.1, 0.2, 0.4, claims_module.SCAN_INTERVAL_S, claims_module.SCAN_INTERVAL_S]
    async with App(database) as app:
        assert app._life.worker is not None
        assert app._life.worker._claims._next_scan_wait_s() == claims_module.SCAN_INTERVAL_S


async def test_a_direct_address_for_listening_cures_a_pooler(
    database: str, romancy_log: pytest.LogCaptureFixture
) -> None:
    with pgbouncer(database) as pooled:
        async with App(pooled, listen_on=database) as app:
            await until(lambda: listener_of(app)._has_heard)
            assert not app._life.store.is_deaf
    assert "has not come back" not in romancy_log.text


@pytest.mark.parametrize("database", [":memory:", "mysql://user@host/name"])
async def test_listening_elsewhere_is_for_postgresql(database: str) -> None:
    with pytest.raises(ConfigurationError, match="listen_on='postgresql://host/name' is for PostgreSQL"):
        await App(database, listen_on="postgresql://host/name").start()


async def test_listener_whose_connection_died_silently_makes_another(database: str) -> None:
    flow = define()
    dead: list[Any] = []
    real = PostgresqlStore._wait_for_hint

    def wait(self: PostgresqlStore, link: Any, timeout_s: float) -> str | None:
        heard = real(self, link, timeout_s)
        return None if link in dead else heard

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PostgresqlStore, "_wait_for_hint", wait)
        async with App(database) as app, App(database, worker=False) as client:
            await until(lambda: listener_of(app)._has_heard)
            first = listener_of(app)._link
            dead.append(first)
            await until(lambda: listener_of(app)._link not in (first, None) and listener_of(app)._has_heard)
            assert not app._life.store.is_deaf
            handle = await client.start_workflow(flow)
            await client.send_event("go", "heard", key=handle.instance_id)
            assert await handle.result(RESULT_TIMEOUT_S) == "heard"


async def test_deaf_listener_that_hears_again_says_so(database: str, romancy_log: pytest.LogCaptureFixture) -> None:
    async with App(database) as app:
        with drop_notifications():
            app._life.store.start_listening(lambda: None)
            await until(lambda: app._life.store.is_deaf)
        await until(lambda: not app._life.store.is_deaf)
    assert "heard again" in romancy_log.text


@pytest.mark.parametrize("hears", [True, False])
async def test_idle_worker_is_quiet(database: str, hears: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 30 statements a minute."""
    if hears:
        # A loaded machine may take a while to hear itself.
        monkeypatch.setattr(listener_module, "LONGEST_ECHO_S", RESULT_TIMEOUT_S)
    said: Counter[str] = Counter()
    execute = PostgresqlLink.execute
    execute_together = PostgresqlLink.execute_together

    def counted(self: PostgresqlLink, sql: str, *arguments: Any) -> Any:
        said[sql] += 1
        return execute(self, sql, *arguments)

    def counted_together(self: PostgresqlLink, *statements: str) -> Any:
        said.update(statements)
        return execute_together(self, *statements)

    with pgbouncer(database) as pooled:
        async with App(database if hears else pooled, lease_ttl=LEASE_TTL_S) as app:
            await until(lambda: listener_of(app)._has_heard if hears else app._life.store.is_deaf)
            assert app._life.worker is not None
            claims = app._life.worker._claims
            await until(lambda: claims._scan_wait_s == claims_module.SCAN_INTERVAL_S)
            # What the listener's first hint has asked for belongs to the start.
            await until(lambda: not claims._may_have_mail and claims._next_due_us != 0)
            monkeypatch.setattr(PostgresqlLink, "execute", counted)
            monkeypatch.setattr(PostgresqlLink, "execute_together", counted_together)
            began = time.monotonic()
            await asyncio.sleep(60 / HASTE)
            minutes = (time.monotonic() - began) * HASTE / 60
            assert 10 <= said.total() <= 30 * minutes, (minutes, said)
