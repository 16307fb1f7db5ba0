"""A database that is locked, full, read-only or damaged: a typed error, and nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from romancy import (
    App,
    AppNotRunningError,
    DatabaseCorruptError,
    DatabaseError,
    DatabaseFullError,
    DatabaseLockedError,
    DatabaseReadOnlyError,
    DatabaseUnavailableError,
    DatabaseURLError,
    RetryPolicy,
    SchemaError,
    Status,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy.storage import sqlite as sqlite_module
from romancy.storage.failures import database_error, is_row_error
from romancy.storage.sqlite import SqliteStore

TIMEOUT_S = 20.0


@pytest.fixture
def short_busy_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a locked database be an error soon."""
    monkeypatch.setattr(SqliteStore.__init__, "__defaults__", (0.02,))


@contextmanager
def write_lock(path: Path) -> Iterator[sqlite3.Connection]:
    """Hold the write lock, as another process would."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
    finally:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        connection.close()


class Gate:
    """An activity that waits until the test lets it go on, inside a workflow of three."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()
        self.calls: list[str] = []
        gate = self

        @activity
        async def before() -> str:
            gate.calls.append("before")
            return "b"

        @activity
        async def waits() -> str:
            gate.calls.append("waits")
            gate.reached.set()
            await gate.open.wait()
            return "w"

        @activity
        async def after() -> str:
            gate.calls.append("after")
            return "a"

        @workflow
        async def three(ctx: WorkflowContext) -> str:
            return await before() + await waits() + await after()

        self.workflow = three


async def _logged(romancy_log: pytest.LogCaptureFixture, wanted: str) -> None:
    """Wait until Romancy has logged this."""
    async with asyncio.timeout(TIMEOUT_S / 4):
        while wanted not in romancy_log.text:
            await asyncio.sleep(0)


# -- locked -------------------------------------------------------------------------------------------------------


async def test_start_on_a_locked_database_is_a_typed_error_and_works_afterwards(
    database: Path, short_busy_timeout: None
) -> None:
    gate = Gate()
    gate.open.set()
    async with App(database) as app:
        first = await app.start_workflow(gate.workflow, id="first")
        assert await first.result(timeout=TIMEOUT_S) == "bwa"
        with write_lock(database):
            with pytest.raises(DatabaseLockedError, match=r"another process holds its write lock.*try again") as caught:
                await app.start_workflow(gate.workflow, id="second")
            assert str(database) in str(caught.value)
            assert await app.get_instance("second") is None
        second = await app.start_workflow(gate.workflow, id="second")
        assert await second.result(timeout=TIMEOUT_S) == "bwa"
        assert len((await app.list_instances()).instances) == 2


async def test_running_workflow_waits_out_a_lock_and_completes(
    database: Path, short_busy_timeout: None, romancy_log: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    async with App(database) as app:
        handle = await app.start_workflow(gate.workflow)
        await gate.reached.wait()
        with write_lock(database):
            gate.open.set()
            await _logged(romancy_log, "a flush failed and is tried again")
            assert gate.calls == ["before", "waits"]
        assert await handle.result(timeout=TIMEOUT_S) == "bwa"
        assert gate.calls == ["before", "waits", "after"]
        assert [event.activity_id for event in await app.get_history(handle.instance_id)] == [
            "before:1",
            "waits:1",
            "after:1",
        ]


async def test_transactional_activity_is_tried_again_after_a_lock_without_counting_an_attempt(
    database: Path, short_busy_timeout: None, romancy_log: pytest.LogCaptureFixture
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    attempts: list[int] = []

    @activity
    async def insert() -> int:
        context = current_activity()
        attempts.append(context.attempt)
        reached.set()
        await go_on.wait()
        await context.session.execute(text("INSERT INTO orders VALUES (1)"))
        return context.attempt

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        return await insert()

    async with App(database) as app:
        connection = sqlite3.connect(database)
        connection.execute("CREATE TABLE orders (id INTEGER PRIMARY KEY)")
        connection.commit()
        handle = await app.start_workflow(flow)
        await reached.wait()
        with write_lock(database):
            go_on.set()
            await _logged(romancy_log, "runs again, for the database failed")
        assert await handle.result(timeout=TIMEOUT_S) == 1
        assert set(attempts) == {1}
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1,)
        connection.close()


async def test_app_that_cannot_begin_for_a_lock_is_a_typed_error_and_begins_afterwards(
    database: Path, short_busy_timeout: None
) -> None:
    gate = Gate()
    async with App(database):
        pass
    app = App(database)
    with write_lock(database), pytest.raises(DatabaseLockedError):
        await app.start()
    gate.open.set()
    async with app:
        assert await (await app.start_workflow(gate.workflow)).result(timeout=TIMEOUT_S) == "bwa"


async def test_lock_on_a_fresh_database_is_a_typed_error(database: Path, short_busy_timeout: None) -> None:
    gate = Gate()
    connection = sqlite3.connect(database)
    connection.execute("CREATE TABLE mine (x)")
    connection.commit()
    with write_lock(database), pytest.raises(DatabaseLockedError):
        await App(database, workflows=[gate.workflow]).start()
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == [("mine",)]
    connection.close()


# -- full ---------------------------------------------------------------------------------------------------------


async def _set_max_pages(app: App, pages: int | None) -> None:
    """Let the writer's connection find the disk full."""

    def job(connection: sqlite3.Connection) -> None:
        size = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {size if pages is None else pages}")

    await asyncio.wrap_future(app._life.store._write(job))


async def test_full_database_is_a_typed_error_and_work_goes_on_once_there_is_space(
    database: Path, romancy_log: pytest.LogCaptureFixture
) -> None:
    reached, go_on = asyncio.Event(), asyncio.Event()
    calls: list[str] = []

    @activity
    async def large() -> str:
        calls.append("large")
        reached.set()
        await go_on.wait()
        return "x" * 100_000

    @activity
    async def last() -> str:
        calls.append("last")
        return "done"

    @workflow
    async def flow(ctx: WorkflowContext, payload: str) -> str:
        if payload != "running":
            return payload
        await large()
        return await last()

    async with App(database) as app:
        handle = await app.start_workflow(flow, "running", id="running")
        await reached.wait()
        await _set_max_pages(app, None)
        with pytest.raises(DatabaseFullError, match=r"the disk is full; free some space"):
            await app.start_workflow(flow, "y" * 100_000, id="refused")
        assert await app.get_instance("refused") is None
        go_on.set()
        await _logged(romancy_log, "a flush failed and is tried again")
        assert calls == ["large"]
        assert (await handle.status()) is Status.RUNNING
        await _set_max_pages(app, 1_000_000)
        assert await handle.result(timeout=TIMEOUT_S) == "done"
        assert calls == ["large", "last"]
        taken = await app.start_workflow(flow, "y" * 100_000, id="refused")
        assert len(await taken.result(timeout=TIMEOUT_S)) == 100_000


async def test_acknowledged_starts_survive_a_full_database(database: Path) -> None:
    @workflow
    async def flow(ctx: WorkflowContext, payload: str) -> int:
        return len(payload)

    acknowledged: list[str] = []
    async with App(database, worker=False) as app:
        await _set_max_pages(app, None)
        for number in range(200):
            try:
                handle = await app.start_workflow(flow, "y" * 1_000, id=f"i{number}")
            except DatabaseFullError:
                break
            acknowledged.append(handle.instance_id)
        assert acknowledged or number == 0
        found = {i.instance_id for i in (await app.list_instances(limit=1_000)).instances}
        assert found == set(acknowledged)
        await _set_max_pages(app, 1_000_000)
    async with App(database) as app:
        for instance_id in acknowledged:
            assert await (await app.get_handle(instance_id)).result(timeout=TIMEOUT_S) == 1_000


# -- read-only ----------------------------------------------------------------------------------------------------


async def test_database_that_turns_read_only_stops_the_app_with_a_typed_error_and_loses_nothing(
    database: Path, romancy_log: pytest.LogCaptureFixture
) -> None:
    gate = Gate()
    async with App(database) as app:
        handle = await app.start_workflow(gate.workflow, id="kept")
        await gate.reached.wait()
        await asyncio.wrap_future(app._life.store._write(lambda c: c.execute("PRAGMA query_only = ON") and None))
        with pytest.raises(DatabaseReadOnlyError, match=r"can't be written; give this user write permission"):
            await app.start_workflow(gate.workflow, id="refused")
        gate.open.set()
        with pytest.raises((DatabaseReadOnlyError, AppNotRunningError)):
            await handle.result(timeout=TIMEOUT_S)
        with pytest.raises(AppNotRunningError, match=r"the app has stopped, for .*can't be written"):
            await app.start_workflow(gate.workflow)
    _release_dead_workers(database)
    async with App(database) as app:
        again = await app.get_handle("kept")
        assert await again.result(timeout=TIMEOUT_S) == "bwa"
        assert await app.get_instance("refused") is None
    assert gate.calls.count("before") == 1


def _release_dead_workers(path: Path) -> None:
    """Let a new app see at once that the stopped worker, of this very process, is gone."""
    connection = sqlite3.connect(path)
    connection.execute("UPDATE romancy_workers SET pid = 2147483646")
    connection.commit()
    connection.close()


AS_NOBODY = """
import asyncio, os, sys
from romancy import App, workflow
@workflow
async def flow(ctx) -> int:
    return 1
async def main():
    try:
        async with App(sys.argv[1]) as app:
            await (await app.start_workflow(flow)).result(timeout=10)
    except Exception as error:
        print(type(error).__module__, type(error).__name__, error)
    else:
        print("it worked")
import sqlalchemy.dialects.sqlite, alembic, sqlite3, romancy.storage.sqlite
os.setgid(65534)
os.setuid(65534)
asyncio.run(main())
"""


def _as_nobody(database: Path) -> str:
    """What an app says that runs as a user without rights."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    environment = {**os.environ, "HOME": "/"}
    command = [sys.executable, "-c", AS_NOBODY, str(database)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=40, check=False)
    return ended.stdout + ended.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder whose path any user may walk."""
    folder = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
    mine = folder / f"romancy-test-{os.getpid()}-{os.urandom(4).hex()}"
    mine.mkdir(mode=0o755)
    mine.chmod(0o755)
    yield mine
    shutil.rmtree(mine)


async def test_file_of_another_user_is_a_typed_error(open_folder: Path) -> None:
    database = open_folder / "x.db"
    async with App(database, workflows=[Gate().workflow]):
        pass
    database.chmod(0o644)
    before = database.read_bytes()
    said = await asyncio.to_thread(_as_nobody, database)
    assert said.startswith("romancy.errors Database"), said
    assert "DatabaseReadOnlyError" in said or "DatabaseUnavailableError" in said, said
    assert "writ" in said
    assert database.read_bytes() == before


async def test_folder_that_cannot_be_written_is_a_typed_error(open_folder: Path) -> None:
    said = await asyncio.to_thread(_as_nobody, open_folder / "new.db")
    assert "DatabaseUnavailableError" in said, said
    assert "writable" in said
    assert list(open_folder.iterdir()) == []


# -- damaged ------------------------------------------------------------------------------------------------------


async def test_file_that_is_no_database_is_a_typed_error_and_left_alone(database: Path) -> None:
    gate = Gate()
    garbage = b"This is a letter to my aunt, and no database.\n" * 200
    database.write_bytes(garbage)
    with pytest.raises(DatabaseCorruptError, match=r"the file is no SQLite database; check the path") as caught:
        await App(database, workflows=[gate.workflow]).start()
    assert str(database) in str(caught.value)
    assert database.read_bytes() == garbage


@asynccontextmanager
async def _damaged(database: Path) -> AsyncIterator[tuple[App, Gate, list[str]]]:
    """An app over a file whose tables' pages were overwritten while it was closed."""
    gate = Gate()
    gate.open.set()
    async with App(database) as app:
        handles = [await app.start_workflow(gate.workflow, id=f"i{n}") for n in range(40)]
        for handle in handles:
            await handle.result(timeout=TIMEOUT_S)
    connection = sqlite3.connect(database)
    page_size = connection.execute("PRAGMA page_size").fetchone()[0]
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    tables = "('romancy_instances', 'romancy_history')"
    roots = [row[0] for row in connection.execute(f"SELECT rootpage FROM sqlite_master WHERE tbl_name IN {tables}")]
    connection.close()
    with database.open("r+b") as file:
        for page in roots:
            file.seek((page - 1) * page_size)
            file.write(b"\xa5" * page_size)
    async with App(database, workflows=[gate.workflow], worker=False) as app:
        yield app, gate, [handle.instance_id for handle in handles]


async def test_damaged_pages_are_a_typed_error_when_they_are_read(database: Path) -> None:
    async with _damaged(database) as (app, _, ids):
        with pytest.raises(DatabaseCorruptError, match="the file is damaged; restore a backup"):
            await app.get_instance(ids[0])
        with pytest.raises(DatabaseCorruptError):
            await app.list_instances()


async def test_damaged_pages_stop_the_app_with_a_typed_error_when_they_are_written(database: Path) -> None:
    async with _damaged(database) as (app, gate, _):
        with pytest.raises(DatabaseCorruptError):
            await app.start_workflow(gate.workflow)
        with pytest.raises(AppNotRunningError, match=r"the app has stopped, for .*the file is damaged"):
            await app.start_workflow(gate.workflow)


async def test_truncated_file_is_a_typed_error(database: Path) -> None:
    gate = Gate()
    async with App(database):
        pass
    with database.open("r+b") as file:
        file.truncate(5_000)
    with pytest.raises(DatabaseCorruptError):
        async with App(database, workflows=[gate.workflow]) as app:
            await app.list_instances()


# -- wrong places -------------------------------------------------------------------------------------------------


def test_path_of_a_folder_is_refused_before_anything_is_opened(tmp_path: Path) -> None:
    with pytest.raises(DatabaseURLError, match="is a folder: name a file in it"):
        App(tmp_path)


async def test_folder_that_came_to_be_meanwhile_is_a_typed_error(database: Path) -> None:
    gate = Gate()
    app = App(database, workflows=[gate.workflow])
    database.mkdir()
    with pytest.raises(DatabaseUnavailableError, match="it can't be opened"):
        await app.start()


async def test_missing_folder_is_a_typed_error_and_is_not_made(tmp_path: Path) -> None:
    gate = Gate()
    with pytest.raises(DatabaseUnavailableError, match="the folder must exist and be writable"):
        await App(tmp_path / "no" / "such" / "x.db", workflows=[gate.workflow]).start()
    assert list(tmp_path.iterdir()) == []


async def test_path_with_characters_of_urls_is_one_file_throughout(tmp_path: Path) -> None:
    @activity(retry=RetryPolicy.no_retry())
    async def count() -> int:
        session = current_activity().session
        return int((await session.execute(text("SELECT count(*) FROM romancy_instances"))).scalar_one())

    @activity(retry=RetryPolicy.no_retry())
    def count_in_thread() -> int:
        session = current_activity().sync_session
        return int(session.execute(text("SELECT count(*) FROM romancy_instances")).scalar_one())

    @workflow
    async def flow(ctx: WorkflowContext) -> int:
        return await count() + await count_in_thread()

    async with App(tmp_path / "what?a=b#c%41.db") as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(timeout=TIMEOUT_S) == 2
        assert await handle.status() is Status.COMPLETED
    # The log goes with the last connection, which its driver closes in a thread of its own.
    async with asyncio.timeout(TIMEOUT_S):
        while [path.name for path in tmp_path.iterdir()] != ["what?a=b#c%41.db"]:
            await asyncio.sleep(0.005)


async def test_file_system_without_a_write_ahead_log_is_refused(
    database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoWal(sqlite3.Connection):
        def execute(self, sql: str, *args: Any) -> Any:
            return super().execute(
                "PRAGMA journal_mode = DELETE" if sql.startswith("PRAGMA journal_mode") else sql, *args
            )

    real = sqlite3.connect
    monkeypatch.setattr(sqlite_module.sqlite3, "connect", lambda *a, **k: real(*a, **k, factory=NoWal))
    with pytest.raises(SchemaError, match=r"allows no write-ahead log \(journal mode is delete\); use a local disk"):
        await App(database, workflows=[Gate().workflow]).start()


# -- the rule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (sqlite3.SQLITE_BUSY, DatabaseLockedError),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, DatabaseLockedError),
        (sqlite3.SQLITE_LOCKED, DatabaseLockedError),
        (sqlite3.SQLITE_READONLY, DatabaseReadOnlyError),
        (sqlite3.SQLITE_READONLY_DIRECTORY, DatabaseReadOnlyError),
        (sqlite3.SQLITE_PERM, DatabaseReadOnlyError),
        (sqlite3.SQLITE_CORRUPT, DatabaseCorruptError),
        (sqlite3.SQLITE_CORRUPT_INDEX, DatabaseCorruptError),
        (sqlite3.SQLITE_NOTADB, DatabaseCorruptError),
        (sqlite3.SQLITE_FULL, DatabaseFullError),
        (sqlite3.SQLITE_IOERR, DatabaseUnavailableError),
        (sqlite3.SQLITE_IOERR_FSYNC, DatabaseUnavailableError),
        (sqlite3.SQLITE_CANTOPEN, DatabaseUnavailableError),
        (sqlite3.SQLITE_MISUSE, DatabaseError),
    ],
)
def test_code_of_the_driver_becomes_a_typed_error_with_its_cause(code: int, kind: type[DatabaseError]) -> None:
    error = sqlite3.OperationalError("what it said")
    error.sqlite_errorcode = code
    typed = database_error(error, "orders.db")
    assert type(typed) is kind
    assert typed.__cause__ is error
    assert "orders.db" in str(typed)
    assert "what it said" in str(typed)
    assert database_error(typed, "orders.db") is typed
    assert not is_row_error(error)


def test_row_errors_are_those_that_leave_other_rows_alone() -> None:
    for error in (sqlite3.IntegrityError(), OverflowError(), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")):
        assert is_row_error(error)


def test_typed_errors_can_be_printed_as_json() -> None:
    error = database_error(sqlite3.OperationalError("no such table: romancy_instances"), "orders.db")
    assert type(error) is SchemaError
    assert "romancy migrate --database orders.db" in json.dumps(str(error))
