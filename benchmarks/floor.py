"""The floor: the same rows through the same driver, group-committed, by bare asyncio without an engine.

    python benchmarks/floor.py throughput --concurrency 64 --count 10000 --dir TMPDIR
    python benchmarks/floor.py latency --activities 1 --count 500 --dir TMPDIR
    python benchmarks/floor.py replay --activities 10000 --dir TMPDIR

Each prints one JSON object as the last line of stdout. Nothing durable on the same machine, with this
database and this driver, can be expected to be much faster.

* The tables and their indexes are Romancy's own, made by `romancy.storage.migrate`; the rows have the columns
  and the sizes that Romancy writes. Ids sort by time, as Romancy's do.
* One thread writes. It takes whatever waits, writes it in one transaction (`BEGIN IMMEDIATE`, then COMMIT
  with a flush to disk) and wakes the waiters with one call into the event loop.
* Throughput: a workflow of three activities is five strict durable waits, one after the other: its instance
  row, three rows of history, the update of the instance row.
* Latency: n activities are n + 1 commits, for the last outcome and the end share one.
* No fence, no JSON, no clock: constants.
* Inserts go as `VALUES (...), (...)` of up to 256 rows; `--inserts executemany` measures the other way that
  suggests itself, which came out somewhat slower. Updates go through `executemany`.
"""

import argparse
import asyncio
import json
import queue
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peers.common import Result, durability, throughput_result, timed_bounded, timed_each

from romancy.storage.migrate import ensure_schema
from romancy.storage.rows import HistoryRow, StartRow

Write = tuple[str, tuple[Any, ...]]

WARM_UP = 64
WAL_WARM_UP = 4_000  # workflows: the log has then been filled, checkpointed and begun anew
SIZES = (256, 64, 16, 4, 1)
PAGES_BETWEEN_CHECKPOINTS = 4_000
NOW_US = 1_795_183_267_772_057
WORKER_ID = "5e0b9d4c-7d55-4a5e-9f0f-0d6c1a5f7b21"

INSERT_INSTANCE = f"INSERT INTO romancy_instances ({', '.join(StartRow._fields)})"
INSERT_HISTORY = f"INSERT INTO romancy_history ({', '.join(HistoryRow._fields)})"
UPDATE_INSTANCE = (
    "UPDATE romancy_instances SET status = ?, owner = ?, ready_at = ?, updated_at = ?, completed_at = ?, "
    "result = ?, error = ? WHERE instance_id = ?"
)


class Writer:
    """A group commit as one would write it by hand."""

    def __init__(self, path: Path, inserts: str) -> None:
        self._connection = connect(path)
        self._insert = insert_values if inserts == "values" else insert_executemany
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
        return durability(
            self._connection.execute("PRAGMA journal_mode").fetchone()[0],
            self._connection.execute("PRAGMA synchronous").fetchone()[0],
        )

    def _run(self) -> None:
        while True:
            batch = [self._jobs.get()]
            batch += [self._jobs.get_nowait() for _ in range(self._jobs.qsize())]
            self._commit(batch)
            self._loop.call_soon_threadsafe(self._wake, [durable for _, durable in batch])

    def _commit(self, batch: list[tuple[Sequence[Write], asyncio.Future[None]]]) -> None:
        by_statement: dict[str, list[tuple[Any, ...]]] = {
            INSERT_INSTANCE: [],
            INSERT_HISTORY: [],
            UPDATE_INSTANCE: [],
        }
        for rows, _ in batch:
            for statement, values in rows:
                by_statement[statement].append(values)
        self._connection.execute("BEGIN IMMEDIATE")
        self._insert(self._connection, INSERT_INSTANCE, by_statement[INSERT_INSTANCE])
        self._insert(self._connection, INSERT_HISTORY, by_statement[INSERT_HISTORY])
        if by_statement[UPDATE_INSTANCE]:
            self._connection.executemany(UPDATE_INSTANCE, by_statement[UPDATE_INSTANCE])
        self._connection.execute("COMMIT")
        self.commits += 1

    @staticmethod
    def _wake(waiters: list[asyncio.Future[None]]) -> None:
        for waiter in waiters:
            waiter.set_result(None)


def insert_values(connection: sqlite3.Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
    """Several rows a statement, in few sizes, so that few statements are prepared."""
    done = 0
    for size in SIZES:
        while len(rows) - done >= size:
            row = f"({','.join('?' * len(rows[0]))})"
            flat = [value for row in rows[done : done + size] for value in row]
            connection.execute(f"{statement} VALUES {','.join([row] * size)}", flat)
            done += size


def insert_executemany(connection: sqlite3.Connection, statement: str, rows: list[tuple[Any, ...]]) -> None:
    if rows:
        connection.executemany(f"{statement} VALUES ({','.join('?' * len(rows[0]))})", rows)


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, cached_statements=256)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute(f"PRAGMA wal_autocheckpoint = {PAGES_BETWEEN_CHECKPOINTS}")
    return connection


def instance_ids() -> Iterator[str]:
    """In order, as UUIDs of version 7 are."""
    number = 0
    while True:
        yield f"01a1f942-cfbc-7000-be6e-{number:012x}"
        number += 1


def start_row(instance_id: str) -> Write:
    return INSERT_INSTANCE, (
        instance_id, 1, "chain", "running", WORKER_ID, None, 0, NOW_US, NOW_US, NOW_US, "417e19f2dd805c70",
        '{"name":"bench","number":0}',
    )  # fmt: skip


def history_row(instance_id: str, seq: int) -> Write:
    return INSERT_HISTORY, (
        instance_id, 1, seq, "ActivityCompleted", f"step:{seq}", "step", seq, 1, NOW_US, None,
        '{"name":"bench","number":0}', '{"name":"bench","number":0}', None,
    )  # fmt: skip


def end_row(instance_id: str) -> Write:
    result = '{"name":"bench","number":2}'
    return UPDATE_INSTANCE, ("completed", None, None, NOW_US, NOW_US, result, None, instance_id)


async def throughput(args: argparse.Namespace, path: Path) -> Result:
    writer = Writer(path, args.inserts)
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


async def latency(args: argparse.Namespace, path: Path) -> Result:
    writer = Writer(path, args.inserts)
    ids = instance_ids()

    async def run_one(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        for seq in range(1, args.activities):
            await writer.write(history_row(instance_id, seq))
        await writer.write(history_row(instance_id, args.activities), end_row(instance_id))

    await timed_bounded(run_one, WAL_WARM_UP, 512)
    await timed_each(run_one, WARM_UP)
    return await timed_each(run_one, args.count) | writer.durability()


async def replay(args: argparse.Namespace, path: Path) -> Result:
    """Reading the rows of one history, in their order, on a connection that was not used before."""
    instance_id = next(instance_ids())
    setup = connect(path)
    setup.execute("BEGIN IMMEDIATE")
    rows = [history_row(instance_id, seq)[1] for seq in range(1, args.activities + 1)]
    insert_values(setup, INSERT_HISTORY, rows)
    setup.execute("COMMIT")
    setup.close()
    connection = connect(path)
    columns = ", ".join(HistoryRow._fields)
    query = f"SELECT {columns} FROM romancy_history WHERE instance_id = ? AND run = 1 ORDER BY seq"
    started = time.perf_counter()
    found = connection.execute(query, (instance_id,)).fetchall()
    seconds = time.perf_counter() - started
    assert len(found) == args.activities
    return {"replay_seconds": round(seconds, 5)}


def main() -> None:
    works = {work.__name__: work for work in (throughput, latency, replay)}
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=works)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--activities", type=int, default=1)
    parser.add_argument("--inserts", choices=["values", "executemany"], default="values")
    parser.add_argument("--dir", type=Path, help="where to put the database (default: the system's temp)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="floor-", dir=args.dir, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "floor.db"
        ensure_schema(str(path), lambda: connect(path), migrate=True)
        result = asyncio.run(works[args.work](args, path))
    print(json.dumps({"system": "floor", "work": args.work} | result))


if __name__ == "__main__":
    main()
