"""The floor: the same rows through the same driver, group-committed, by bare asyncio without an engine.

    python benchmarks/floor.py throughput --concurrency 64 --count 10000 --dir TMPDIR
    python benchmarks/floor.py latency --activities 1 --count 500 --dir TMPDIR
    python benchmarks/floor.py sessions --concurrency 64 --count 4000 --database URL
    python benchmarks/floor.py replay --activities 10000 --dir TMPDIR

Each prints one JSON object as the last line of stdout. Instead of `--dir`, all but the replay take `--database URL`: an
empty database on a server. Nothing durable on the same machine, with this database and this driver, can be expected
to be much faster.

* The tables and their indexes are Romancy's own; the rows have the columns and the sizes that Romancy writes. Ids sort
  by time, as Romancy's do.
* One thread writes; with `--on-loop`, on PostgreSQL, none (`on_loop.py`). It takes whatever waits, writes it in one
  transaction (`group_commit.py`) and wakes the waiters with one call into the event loop.
* Throughput: a workflow of three activities is five strict durable waits, one after the other: its instance
  row, three rows of history, the update of the instance row.
* Latency: n activities are n + 1 commits, for the last outcome and the end share one. With `--idle-seconds 20
  --count 1` it's one workflow after so long a pause; an event that ends a workflow is two commits, too.
* Sessions: a workflow of one activity with a transaction of its own is three durable waits: the instance row, then the
  user's row and the row of history in a transaction on one of 16 further connections, each on a thread, then the
  update of the instance row. The first and the last are group-committed, as above.
* No fence, no clock: constants; and no JSON but where it carries the rows to the server.
"""

import argparse
import asyncio
import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from group_commit import MAKERS, Group, PostgresqlGroup, SqliteGroup, connect_sqlite, insert_into, insert_values
from on_loop import LoopWriter
from peers.common import Result, throughput_result, timed_bounded, timed_each

from databases import connect
from romancy.storage.address import parse_address
from romancy.storage.migrate import ensure_schema
from romancy.storage.rows import HistoryRow, StartRow
from romancy.storage.stores import make_store

Kind = Literal["start", "event", "end"]
Write = tuple[Kind, tuple[Any, ...]]

WARM_UP = 64
WAL_WARM_UP = 4_000  # workflows: the log has then been filled, checkpointed and begun anew
SESSION_CONNECTIONS = 16
NOW_US = 1_795_183_267_772_057
WORKER_ID = "5e0b9d4c-7d55-4a5e-9f0f-0d6c1a5f7b21"
MAKE_ROWS = "CREATE TABLE bench_rows (id VARCHAR(36) PRIMARY KEY, name VARCHAR(40) NOT NULL)"


class Writer:
    """A group commit as one would write it by hand."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._jobs: queue.SimpleQueue[tuple[Sequence[Write], asyncio.Future[None]]] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self.commits = 0
        threading.Thread(target=self._run, daemon=True).start()

    def write(self, *rows: Write) -> asyncio.Future[None]:
        """Write these rows; done once they are durable."""
        durable = self._loop.create_future()
        self._jobs.put((rows, durable))
        return durable

    def durability(self) -> Result:
        return self._group.durability()

    def _run(self) -> None:
        while True:
            batch = [self._jobs.get()]
            batch += [self._jobs.get_nowait() for _ in range(self._jobs.qsize())]
            waiters = [durable for _, durable in batch]
            try:
                self._commit(batch)
            except Exception as error:
                self._loop.call_soon_threadsafe(self._fail, waiters, error)
                raise
            self._loop.call_soon_threadsafe(self._wake, waiters)

    def _commit(self, batch: list[tuple[Sequence[Write], asyncio.Future[None]]]) -> None:
        rows_by_kind: dict[Kind, list[tuple[Any, ...]]] = {"start": [], "event": [], "end": []}
        for rows, _ in batch:
            for kind, values in rows:
                rows_by_kind[kind].append(values)
        self._group.commit(rows_by_kind["start"], rows_by_kind["event"], rows_by_kind["end"])
        self.commits += 1

    @staticmethod
    def _wake(waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            waiter.set_result(None)

    @staticmethod
    def _fail(waiters: list[asyncio.Future[None]], error: Exception) -> None:
        for waiter in waiters:
            waiter.set_exception(error)


def instance_ids() -> Iterator[str]:
    """In order, as UUIDs of version 7 are."""
    number = 0
    while True:
        yield f"01a1f942-cfbc-7000-be6e-{number:012x}"
        number += 1


def start_row(instance_id: str) -> Write:
    return "start", StartRow(
        instance_id, 1, "chain", "running", WORKER_ID, None, 0, NOW_US, NOW_US, NOW_US, "417e19f2dd805c70",
        '{"name":"bench","number":0}',
    )  # fmt: skip


def history_row(instance_id: str, seq: int) -> Write:
    return "event", HistoryRow(
        instance_id, 1, seq, "ActivityCompleted", f"step:{seq}", "step", seq, 1, NOW_US, None,
        '{"name":"bench","number":0}', '{"name":"bench","number":0}', None,
    )  # fmt: skip


def end_row(instance_id: str) -> Write:
    result = '{"name":"bench","number":2}'
    return "end", ("completed", None, None, NOW_US, NOW_US, result, None, instance_id)


def make_writer(args: argparse.Namespace, group: Group) -> "Writer | LoopWriter":
    if not args.on_loop:
        return Writer(group)
    if not isinstance(group, PostgresqlGroup):
        raise SystemExit("--on-loop is for PostgreSQL")
    return LoopWriter(group)


async def throughput(args: argparse.Namespace, group: Group) -> Result:
    writer = make_writer(args, group)
    ids = instance_ids()

    async def run_one(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        for seq in (1, 2, 3):
            await writer.write(history_row(instance_id, seq))
        await writer.write(end_row(instance_id))

    await timed_bounded(run_one, WAL_WARM_UP, 512)
    commits, cpu = writer.commits, time.process_time()
    seconds = await timed_bounded(run_one, args.count, args.concurrency)
    cpu = time.process_time() - cpu
    extra = {"commits": writer.commits - commits, "cpu_us_per_workflow": round(cpu / args.count * 1e6, 1)}
    return throughput_result(args.count, seconds) | extra | writer.durability()


async def latency(args: argparse.Namespace, group: Group) -> Result:
    writer = make_writer(args, group)
    ids = instance_ids()

    async def run_one(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        for seq in range(1, args.activities):
            await writer.write(history_row(instance_id, seq))
        await writer.write(history_row(instance_id, args.activities), end_row(instance_id))

    await timed_bounded(run_one, WAL_WARM_UP, 512)
    await timed_each(run_one, WARM_UP)
    await asyncio.sleep(args.idle_seconds)
    return await timed_each(run_one, args.count) | writer.durability()


class Sessions:
    """Transactions of the user's own, on connections that each have a thread."""

    def __init__(self, url: str) -> None:
        self._local = threading.local()
        self._url = url
        self._threads = ThreadPoolExecutor(SESSION_CONNECTIONS, initializer=self._connect)
        self._loop = asyncio.get_running_loop()
        self._insert = f"{insert_into('romancy_history', HistoryRow._fields)} VALUES ({marks(HistoryRow._fields)})"

    def commit(self, instance_id: str) -> asyncio.Future[None]:
        """Insert a row of the user's and one of history."""
        return self._loop.run_in_executor(self._threads, self._commit, instance_id)

    def _connect(self) -> None:
        self._local.cursor = connect(self._url).cursor()

    def _commit(self, instance_id: str) -> None:
        execute: Callable[..., Any] = self._local.cursor.execute
        execute("BEGIN")
        execute("INSERT INTO bench_rows (id, name) VALUES (%s, %s)", (instance_id, "bench"))
        execute(self._insert, history_row(instance_id, 1)[1])
        execute("COMMIT")


def marks(columns: Sequence[str]) -> str:
    return ", ".join(["%s"] * len(columns))


async def sessions(args: argparse.Namespace, group: Group) -> Result:
    writer, own, ids = Writer(group), Sessions(args.database), instance_ids()
    connect(args.database).cursor().execute(MAKE_ROWS)

    async def run_one(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        await own.commit(instance_id)
        await writer.write(end_row(instance_id))

    await timed_bounded(run_one, args.concurrency * 10, args.concurrency)
    seconds = await timed_bounded(run_one, args.count, args.concurrency)
    return throughput_result(args.count, seconds) | writer.durability()


async def replay(args: argparse.Namespace, path: Path) -> Result:
    """Reading the rows of one history, in their order, on a connection that was not used before."""
    instance_id = next(instance_ids())
    setup = connect_sqlite(path)
    setup.execute("BEGIN IMMEDIATE")
    rows = [history_row(instance_id, seq)[1] for seq in range(1, args.activities + 1)]
    insert_values(setup, insert_into("romancy_history", HistoryRow._fields), rows)
    setup.execute("COMMIT")
    setup.close()
    connection = connect_sqlite(path)
    columns = ", ".join(HistoryRow._fields)
    query = f"SELECT {columns} FROM romancy_history WHERE instance_id = ? AND run = 1 ORDER BY seq"
    started = time.perf_counter()
    found = connection.execute(query, (instance_id,)).fetchall()
    seconds = time.perf_counter() - started
    assert len(found) == args.activities
    return {"replay_seconds": round(seconds, 5)}


def on_server(args: argparse.Namespace) -> Result:
    address = parse_address(args.database)
    store = make_store(address, [])
    store.prepare(migrate=True)
    return asyncio.run(WORKS[args.work](args, MAKERS[store.kind](args.database)))


def on_sqlite(args: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(prefix="floor-", dir=args.dir, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "floor.db"
        ensure_schema(str(path), lambda: connect_sqlite(path), migrate=True)
        if args.work == "replay":
            return asyncio.run(replay(args, path))
        return asyncio.run(WORKS[args.work](args, SqliteGroup(path, args.inserts)))


WORKS = {work.__name__: work for work in (throughput, latency, sessions)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=[*WORKS, "replay"])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--activities", type=int, default=1)
    parser.add_argument("--idle-seconds", type=float, default=0.0, help="latency: how long nothing happens before")
    parser.add_argument("--on-loop", action="store_true", help="on PostgreSQL: without a thread; see on_loop.py")
    parser.add_argument("--inserts", choices=["values", "executemany"], default="values", help="on SQLite")
    parser.add_argument("--dir", type=Path, help="where to put a SQLite database (default: the system's temp)")
    parser.add_argument("--database", help="instead: an empty database on a server, as postgresql://… or mysql://…")
    args = parser.parse_args()
    result = on_sqlite(args) if args.database is None else on_server(args)
    print(json.dumps({"system": "floor", "work": args.work} | result))


if __name__ == "__main__":
    main()
