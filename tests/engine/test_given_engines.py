"""The sessions of activities on the application's own engines: its pool and events serve, and are left as they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import URL, Engine, create_engine, event, make_url, text
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from romancy import (
    App,
    ConfigurationError,
    DatabaseUnavailableError,
    FencedError,
    RetryPolicy,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    current_activity,
    workflow,
)
from romancy.storage.server import LINE
from romancy.storage.sessions import ActivityTransaction
from romancy.testing import isolated_catalogue
from tests.databases import Database, clean, execute, kind_of, rows
from tests.ledger import INSERT, Entry, create_ledger
from tests.support import RESULT_TIMEOUT_S

DRIVERS = {
    "sqlite": ("sqlite+aiosqlite", "sqlite"),
    "postgresql": ("postgresql+psycopg", "postgresql+psycopg"),
    "mysql": ("mysql+asyncmy", "mysql+pymysql"),
}


@pytest.fixture
def ledger(database: Database) -> Database:
    create_ledger(database)
    return database


def url_of(database: Database, *, is_async: bool) -> URL:
    name = DRIVERS[kind_of(database)][0 if is_async else 1]
    return (
        URL.create(name, database=str(database))
        if isinstance(database, Path)
        else make_url(database).set(drivername=name)
    )


@pytest.fixture
async def engine(ledger: Database) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(url_of(ledger, is_async=True), pool_size=1, max_overflow=0)
    yield engine
    await engine.dispose()


@pytest.fixture
def sync_engine(ledger: Database) -> Any:
    engine = create_engine(url_of(ledger, is_async=False), pool_size=1, max_overflow=0)
    yield engine
    engine.dispose()


def tokens(database: Database) -> list[str]:
    return [token for (token,) in rows(database, "SELECT token FROM ledger ORDER BY id")]


async def run(app: App, *activities: Any) -> Any:
    with isolated_catalogue():

        @workflow
        async def flow(ctx: WorkflowContext) -> Any:
            return [await act() for act in activities]

        async with app:
            return await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)


def noted(engine: Engine) -> list[str]:
    """The statements that this engine sends from now on."""
    sent: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, sql: str, *_: Any) -> None:
        sent.append(sql)

    return sent


@activity(name="book_async", retry=RetryPolicy.fixed(2, 0))
async def book_async() -> None:
    session = current_activity().session
    await session.execute(INSERT, {"token": f"async {current_activity().attempt}"})
    session.add(Entry(token="added"))
    if current_activity().attempt == 1:
        raise ValueError("the first attempt fails")


@activity(name="book_sync", retry=RetryPolicy.fixed(2, 0))
def book_sync() -> None:
    current_activity().sync_session.execute(INSERT, {"token": f"sync {current_activity().attempt}"})
    if current_activity().attempt == 1:
        raise ValueError("the first attempt fails")


async def test_rows_and_outcome_commit_together_through_the_given_engines(
    ledger: Database, engine: AsyncEngine, sync_engine: Engine
) -> None:
    by_async, by_sync = noted(engine.sync_engine), noted(sync_engine)
    await run(App(ledger, engine=engine, sync_engine=sync_engine), book_async, book_sync)
    assert tokens(ledger) == ["async 2", "added", "sync 2"]
    for sent in (by_async, by_sync):
        assert any("INTO ledger" in sql for sql in sent)
        assert any("INTO romancy_history" in sql for sql in sent)


async def test_one_given_engine_leaves_the_other_kind_to_romancy(ledger: Database, engine: AsyncEngine) -> None:
    sent = noted(engine.sync_engine)
    await run(App(ledger, engine=engine), book_sync)
    assert tokens(ledger) == ["sync 2"]
    assert not any("INTO ledger" in sql for sql in sent)


async def test_the_engine_alone_gives_the_address(ledger: Database, engine: AsyncEngine, sync_engine: Engine) -> None:
    await run(App(engine=engine), book_async)
    await run(App(sync_engine=sync_engine), book_sync)
    assert tokens(ledger) == ["async 2", "added", "sync 2"]


async def test_given_engine_lives_on_after_the_shutdown_and_has_no_listener(
    ledger: Database, engine: AsyncEngine, sync_engine: Engine
) -> None:
    listeners = [(len(e.pool.dispatch.connect), len(e.pool.dispatch.checkout), e._has_events) for e in
                 (engine.sync_engine, sync_engine)]  # fmt: skip
    closed: list[Any] = []
    event.listen(engine.sync_engine, "close", lambda *_: closed.append(1))
    event.listen(sync_engine, "close", lambda *_: closed.append(1))
    await run(App(ledger, engine=engine, sync_engine=sync_engine), book_async, book_sync)
    assert closed == []
    assert listeners == [
        (len(e.pool.dispatch.connect), len(e.pool.dispatch.checkout), e._has_events)
        for e in (engine.sync_engine, sync_engine)
    ]
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT count(*) FROM ledger"))).scalar_one() == 3
        raw = await connection.get_raw_connection()
        assert LINE not in raw.info


SETTINGS = {
    "sqlite": "PRAGMA synchronous",
    "postgresql": "SELECT current_setting('transaction_isolation')",
    "mysql": "SELECT @@SESSION.autocommit, @@SESSION.{isolation}{idle}",
}


def settings_query(database: Database) -> str:
    is_mariadb = kind_of(database) == "mysql" and "mariadb" in rows(database, "SELECT VERSION()")[0][0].lower()
    return SETTINGS[kind_of(database)].format(
        isolation="tx_isolation" if is_mariadb else "transaction_isolation",
        idle=", @@SESSION.idle_write_transaction_timeout" if is_mariadb else ", @@SESSION.wait_timeout",
    )


PROMISED: dict[str, tuple[Any, ...]] = {"sqlite": (2,), "postgresql": ("read committed",), "mysql": ("READ-COMMITTED",)}


@pytest.mark.parametrize("isolation", [None, "SERIALIZABLE", "AUTOCOMMIT"])
@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_promised_settings_hold_within_sessions_only(ledger: Database, isolation: str | None, kind: str) -> None:
    is_async = kind == "async"
    options = {} if isolation is None else {"isolation_level": isolation}
    url = url_of(ledger, is_async=is_async)
    given: Any = (create_async_engine if is_async else create_engine)(url, pool_size=1, max_overflow=0, **options)
    inner: Engine = given.sync_engine if is_async else given
    query = settings_query(ledger)
    if kind_of(ledger) == "sqlite":

        @event.listens_for(inner, "connect")
        def fast(connection: Any, _record: Any) -> None:
            cursor = connection.cursor()
            cursor.execute("PRAGMA synchronous = OFF")
            cursor.close()

    seen: list[Any] = []

    @activity(retry=RetryPolicy.no_retry())
    async def look_async() -> None:
        session = current_activity().session
        seen.append(tuple((await session.execute(text(query))).one()))
        await session.execute(INSERT, {"token": "rolled back"})
        raise ValueError

    @activity(retry=RetryPolicy.no_retry())
    def look_sync() -> None:
        session = current_activity().sync_session
        seen.append(tuple(session.execute(text(query)).one()))
        session.execute(INSERT, {"token": "rolled back"})
        raise ValueError

    async def outside() -> Any:
        if is_async:
            async with given.connect() as connection:
                return tuple((await connection.execute(text(query))).one())

        def look() -> Any:
            with given.connect() as connection:
                return tuple(connection.execute(text(query)).one())

        return await asyncio.to_thread(look)

    before = await outside()
    app = App(ledger, engine=given) if is_async else App(ledger, sync_engine=given)
    with pytest.raises(WorkflowFailedError):
        await run(app, look_async if is_async else look_sync)
    assert PROMISED[kind_of(ledger)][0] in seen[0]
    if kind_of(ledger) == "mysql":
        assert seen[0][-1] in (10, 60)  # MariaDB, MySQL
    assert tokens(ledger) == []
    app = App(ledger, engine=given) if is_async else App(ledger, sync_engine=given)
    await run(app, book_async if is_async else book_sync)
    assert tokens(ledger)[0] == f"{kind} 2"
    assert await outside() == before
    if is_async:
        await given.dispose()
    else:
        given.dispose()


@pytest.mark.parametrize("begin", [None, "BEGIN", "BEGIN IMMEDIATE"])
async def test_session_on_sqlite_holds_the_write_lock_however_the_engine_begins(
    tmp_path: Path, begin: str | None
) -> None:
    path = tmp_path / "sqlite.db"
    create_ledger(path)
    engine = create_async_engine(url_of(path, is_async=True))
    if begin is not None:

        @event.listens_for(engine.sync_engine, "connect")
        def on_connect(connection: Any, _record: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(engine.sync_engine, "begin")
        def on_begin(connection: Any) -> None:
            connection.exec_driver_sql(begin)

    @activity(retry=RetryPolicy.no_retry())
    async def reads_only() -> str:
        await current_activity().session.execute(text("SELECT count(*) FROM ledger"))
        other = create_engine(url_of(path, is_async=False), connect_args={"timeout": 0})
        try:
            with other.begin() as connection:
                connection.execute(INSERT, {"token": "meanwhile"})
        except Exception as error:
            return str(error)
        finally:
            other.dispose()
        return ""

    (said,) = await run(App(path, engine=engine), reads_only)
    assert "database is locked" in said
    await engine.dispose()


async def test_fence_holds_on_a_given_engine(ledger: Database, engine: AsyncEngine) -> None:
    began, go = asyncio.Event(), asyncio.Event()
    runs = []

    @activity
    async def book() -> str:
        runs.append(1)
        began.set()
        await go.wait()
        await current_activity().session.execute(INSERT, {"token": f"run {len(runs)}"})
        return f"run {len(runs)}"

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        return await book()

    async with App(ledger, engine=engine) as app:
        handle = await app.start_workflow(flow)
        await began.wait()
        zombie = app._life.worker
        assert zombie is not None
        execute(ledger, "UPDATE romancy_workers SET state = 'dead'")
        go.set()
        assert await handle.result(RESULT_TIMEOUT_S) == "run 2"
        assert isinstance(zombie.writer.stopped_by, FencedError)
    assert tokens(ledger) == ["run 2"]


async def test_connection_that_the_server_ended_in_the_given_pool_costs_no_attempt(
    database: Database, ledger: Database, engine: AsyncEngine
) -> None:
    if kind_of(database) == "sqlite":
        pytest.skip("there is no server to end it")
    which = "SELECT pg_backend_pid()" if kind_of(database) == "postgresql" else "SELECT CONNECTION_ID()"

    @activity(retry=RetryPolicy.no_retry())
    async def book() -> None:
        await current_activity().session.execute(INSERT, {"token": f"attempt {current_activity().attempt}"})

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await book()

    async with App(ledger, engine=engine) as app:
        async with engine.connect() as connection:
            number = (await connection.execute(text(which))).scalar_one()
        if kind_of(database) == "postgresql":
            rows(ledger, f"SELECT pg_terminate_backend({number}, 5000)")
        else:
            execute(ledger, f"KILL {number}")
        await (await app.start_workflow(flow)).result(RESULT_TIMEOUT_S)
    assert tokens(ledger) == ["attempt 1"]


async def test_connection_of_a_given_engine_is_watched_while_its_transaction_lasts(
    ledger: Database, engine: AsyncEngine
) -> None:
    if kind_of(ledger) == "sqlite":
        pytest.skip("there is no connection to break")
    lines: list[Any] = []

    @activity
    async def book() -> None:
        await current_activity().session.execute(INSERT, {"token": "a"})
        transaction = current_activity().transaction
        assert isinstance(transaction, ActivityTransaction)
        lines.append(transaction._line)

    await run(App(ledger, engine=engine), book)
    assert lines[0] is not None


@pytest.mark.parametrize("kind", ["async", "sync"])
async def test_session_that_waits_for_the_given_pool_keeps_nobody_from_writing(
    ledger: Database, engine: AsyncEngine, sync_engine: Engine, kind: str
) -> None:
    with isolated_catalogue():

        @activity
        async def wait_async() -> None:
            await current_activity().session.execute(INSERT, {"token": "a"})

        @activity
        def wait_sync() -> None:
            current_activity().sync_session.execute(INSERT, {"token": "a"})

        @workflow
        async def flow(ctx: WorkflowContext) -> None:
            await (wait_async() if kind == "async" else wait_sync())

        @workflow
        async def other(ctx: WorkflowContext) -> None: ...

        async with App(ledger, engine=engine, sync_engine=sync_engine) as app:
            inner = engine.sync_engine if kind == "async" else sync_engine
            asked = asyncio.Event()
            loop = asyncio.get_running_loop()
            real = inner.pool.connect

            def connect() -> Any:
                loop.call_soon_threadsafe(asked.set)
                return real()

            if kind == "async":
                held: Any = await engine.connect()
            else:
                held = await asyncio.to_thread(sync_engine.connect)
            inner.pool.connect = connect  # type: ignore[method-assign]
            handle = await app.start_workflow(flow)
            async with asyncio.timeout(RESULT_TIMEOUT_S):
                await asked.wait()
                # The pool's only connection is ours until this is written.
                await (await app.start_workflow(other)).result(RESULT_TIMEOUT_S)
            if kind == "async":
                await held.close()
            else:
                held.close()
            await handle.result(RESULT_TIMEOUT_S)
    assert tokens(ledger) == ["a"]


async def test_read_only_engine_writes_in_sessions(postgresql_url: str) -> None:
    url = make_url(postgresql_url).set(drivername="postgresql+psycopg")
    engine = create_async_engine(url, connect_args={"options": "-cdefault_transaction_read_only=on"})

    @activity(retry=RetryPolicy.no_retry())
    async def act() -> int:
        return int((await current_activity().session.execute(text("SELECT 5"))).scalar_one())

    assert await run(App(postgresql_url, engine=engine), act) == [5]
    await engine.dispose()
    clean(postgresql_url)


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("database", "url"),
    [
        ("a.db", "sqlite+aiosqlite:///b.db"),
        (":memory:", "sqlite+aiosqlite:///b.db"),
        ("a.db", "postgresql+psycopg://host/shop"),
        ("postgresql://host/shop", "sqlite+aiosqlite:///b.db"),
        ("postgresql://host/shop", "postgresql+psycopg://other/shop"),
        ("postgresql://host/shop", "postgresql+psycopg://host/shops"),
        ("postgresql://host/shop", "postgresql+psycopg://host:5433/shop"),
        ("postgresql://host/shop", "mysql+asyncmy://host/shop"),
        ("mysql://host/shop", "mysql+asyncmy://host:3307/shop"),
    ],
)
def test_engine_of_another_database_is_refused_and_both_are_named(database: str, url: str) -> None:
    engine = create_async_engine(url)
    with pytest.raises(ConfigurationError, match="leads to") as caught:
        App(database, engine=engine)
    assert engine.url.render_as_string() in str(caught.value)
    assert database.rpartition("/")[2] in str(caught.value)


@pytest.mark.parametrize(
    ("database", "url"),
    [
        ("./a.db", "sqlite+aiosqlite:///a.db"),
        ("postgresql://ann:x@host/shop", "postgresql+psycopg://bob:y@host:5432/shop"),
        ("postgresql://127.0.0.1/shop", "postgresql+psycopg://localhost/shop"),
        ("mariadb://host/shop", "mysql+asyncmy://host:3306/shop?charset=utf8mb4"),
        ("mysql://host/shop", "mariadb+asyncmy://host/shop"),
    ],
)
def test_engine_of_the_same_database_may_be_written_otherwise(database: str, url: str) -> None:
    App(database, engine=create_async_engine(url))


@pytest.mark.parametrize(
    ("url", "options", "says"),
    [
        ("sqlite+aiosqlite://", {}, "one connection only"),
        ("sqlite+aiosqlite:///:memory:", {}, "one connection only"),
        ("sqlite+aiosqlite:///file:a.db?mode=ro&uri=true", {}, "write a plain path"),
        ("sqlite+aiosqlite:///a.db", {"poolclass": StaticPool}, "hands one connection to several"),
        ("postgresql+psycopg://", {}, "names no database"),
    ],
)
def test_engine_that_can_not_serve_is_refused_with_the_cure(url: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigurationError, match=says):
        App(engine=create_async_engine(url, **options))


def test_the_wrong_kind_of_engine_is_refused_with_the_right_option() -> None:
    with pytest.raises(ConfigurationError, match="goes to sync_engine="):
        App(engine=create_engine("sqlite:///a.db"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="goes to engine="):
        App(sync_engine=create_async_engine("sqlite+aiosqlite:///a.db"))  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="give an AsyncEngine"):
        App(engine="sqlite:///a.db")  # type: ignore[arg-type]


def test_another_driver_is_refused_with_the_one_to_take() -> None:
    engine = create_engine("mysql+pymysql://host/shop")
    engine.dialect.driver = "mysqldb"
    with pytest.raises(ConfigurationError, match=r"make the engine with mysql\+pymysql://"):
        App(sync_engine=engine)


async def test_engine_whose_search_path_leads_elsewhere_is_refused_at_the_start(postgresql_url: str) -> None:
    url = make_url(postgresql_url).set(drivername="postgresql+psycopg")
    engine = create_async_engine(url, connect_args={"options": "-csearch_path=pg_temp"})
    with pytest.raises(ConfigurationError, match="does not see Romancy's tables"):
        await App(postgresql_url, engine=engine).start()
    await engine.dispose()


async def test_engine_that_can_not_connect_is_told_at_the_start(postgresql_url: str) -> None:
    url = make_url(postgresql_url).set(drivername="postgresql+psycopg")
    engine = create_async_engine(url, connect_args={"port": 1})
    with pytest.raises(DatabaseUnavailableError, match="can't be reached"):
        await App(postgresql_url, engine=engine).start()
    await engine.dispose()
