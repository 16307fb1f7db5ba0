"""The least that any engine must do in Python, on the floor's writer: how near the floor can one come?

    python benchmarks/skeleton.py throughput --concurrency 512 --count 20000 --dir TMPDIR
    python benchmarks/skeleton.py throughput --concurrency 512 --count 20000 --database URL
    python benchmarks/skeleton.py sessions --concurrency 64 --count 4000 --database URL

Prints one JSON object: workflows a second of the floor, and of this skeleton, in one process, taking turns.

The skeleton of the throughput has what the promises cannot do without, and nothing else: each workflow is a task on an
event loop of its own, each activity a task on the real one; arguments and results become JSON, and a result is read
back; an activity waits until the outcome before it is durable. It has no replay, no retries, no timeouts, no
cancellation, no limits, no leases, no ids by counter, no errors, and no types. So its ratio to the floor is more than
an engine can reach.

The skeleton of the sessions has no engine at all: between the floor's two group commits, the user's row goes through
SQLAlchemy's AsyncSession, and the row of history through its connection, and both are committed. So its ratio to the
floor tells what such a session costs by itself.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from asyncio import _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

from floor import MAKE_ROWS, SESSION_CONNECTIONS, Sessions, Writer, end_row, history_row, instance_ids, marks, start_row
from group_commit import MAKERS, Group, SqliteGroup, connect_sqlite, insert_into
from peers.common import Result, timed_bounded, tune_garbage_collector
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from databases import connect
from romancy.storage.address import parse_address
from romancy.storage.migrate import ensure_schema
from romancy.storage.rows import HistoryRow
from romancy.storage.stores import make_store

TURNS = 5

dump = json.JSONEncoder(ensure_ascii=False, check_circular=False, separators=(",", ":")).encode


class Ready:
    """What `call_soon` returns."""

    __slots__ = ("args", "callback", "context")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context) -> None:
        self.callback = callback
        self.args = args
        self.context = context


class Loop(asyncio.AbstractEventLoop):
    """A ready queue."""

    def __init__(self, outer: asyncio.AbstractEventLoop) -> None:
        self._ready: deque[Ready] = deque()
        self._outer = outer

    def call_soon(self, callback: Callable[..., Any], *args: Any, context: Context | None = None) -> Any:
        ready = Ready(callback, args, context or copy_context())
        self._ready.append(ready)
        return ready

    def get_debug(self) -> bool:
        return False

    def run(self) -> None:
        _set_running_loop(self)
        try:
            while self._ready:
                ready = self._ready.popleft()
                ready.context.run(ready.callback, *ready.args)
        finally:
            _set_running_loop(self._outer)


async def step(name: str, number: int) -> dict[str, Any]:
    return {"name": name, "number": number}


async def chain(instance: "Instance", name: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for number in range(3):
        result = await instance.call(name, number)
    return result


class Instance:
    """One workflow on its way."""

    def __init__(self, instance_id: str, writer: Writer, outer: asyncio.AbstractEventLoop) -> None:
        self.ended: asyncio.Future[None] = outer.create_future()
        self._id = instance_id
        self._writer = writer
        self._outer = outer
        self._seq = 0
        self._durable: asyncio.Future[None] | None = None
        self._loop = Loop(outer)
        self._main = asyncio.Task(chain(self, "bench"), loop=self._loop, context=Context())

    def call(self, name: str, number: int) -> "asyncio.Future[dict[str, Any]]":
        self._asked = (name, number)
        self._text = f'{{"name":{dump(name)},"number":{dump(number)}}}'
        self._future: asyncio.Future[dict[str, Any]] = asyncio.Future(loop=self._loop)
        return self._future

    def advance(self) -> None:
        self._loop.run()
        if self._main.done():
            now = time.time_ns() // 1_000
            values = ("completed", None, None, now, now, dump(self._main.result()), None, self._id)
            self._writer.write(("end", values)).add_done_callback(self._on_end)
        elif self._durable is None or self._durable.done():
            self._start()
        else:
            self._durable.add_done_callback(self._start)

    def _start(self, _durable: Any = None) -> None:
        task = asyncio.Task(step(*self._asked), loop=self._outer, context=copy_context())
        task.add_done_callback(self._on_done)

    def _on_done(self, task: "asyncio.Task[dict[str, Any]]") -> None:
        result = dump(task.result())
        self._seq += 1
        row = (
            self._id, 1, self._seq, "ActivityCompleted", f"step:{self._seq}", "step", self._seq, 1,
            time.time_ns() // 1_000, None, self._text, result, None,
        )  # fmt: skip
        self._durable = self._writer.write(("event", row))
        self._future.set_result(json.loads(result))
        self.advance()

    def _on_end(self, _durable: Any) -> None:
        del self._loop, self._main
        self.ended.set_result(None)


RunOne = Callable[[int], Coroutine[Any, Any, None]]


async def throughput(args: argparse.Namespace, group: Group) -> Result:
    writer, ids, outer = Writer(group), instance_ids(), asyncio.get_running_loop()

    async def floor(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        for seq in (1, 2, 3):
            await writer.write(history_row(instance_id, seq))
        await writer.write(end_row(instance_id))

    async def skeleton(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        instance = Instance(instance_id, writer, outer)
        instance.advance()
        await instance.ended

    return await beside(args, floor, skeleton) | writer.durability()


async def sessions(args: argparse.Namespace, group: Group) -> Result:
    writer, own, ids = Writer(group), Sessions(args.database), instance_ids()
    connect(args.database).cursor().execute(MAKE_ROWS)
    url = make_store(parse_address(args.database), []).url(is_async=True)
    engine = create_async_engine(url, pool_size=SESSION_CONNECTIONS, max_overflow=0)
    user_row = text("INSERT INTO bench_rows (id, name) VALUES (:id, :name)")
    event = f"{insert_into('romancy_history', HistoryRow._fields)} VALUES ({marks(HistoryRow._fields)})"

    async def floor(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        await own.commit(instance_id)
        await writer.write(end_row(instance_id))

    async def skeleton(_: int) -> None:
        instance_id = next(ids)
        await writer.write(start_row(instance_id))
        async with AsyncSession(engine) as session:
            await session.execute(user_row, {"id": instance_id, "name": "bench"})
            connection = await session.connection()
            await connection.exec_driver_sql(event, tuple(history_row(instance_id, 1)[1]))
            await session.commit()
        await writer.write(end_row(instance_id))

    found = await beside(args, floor, skeleton) | writer.durability()
    await engine.dispose()
    return found


async def beside(args: argparse.Namespace, floor: RunOne, skeleton: RunOne) -> Result:
    """The medians of some turns of both."""
    rates: dict[str, list[float]] = {"floor": [], "skeleton": []}
    tune_garbage_collector()
    for turn in range(TURNS + 1):
        for run_one in (floor, skeleton):
            seconds = await timed_bounded(run_one, args.count, args.concurrency)
            if turn:  # the first warms up
                rates[run_one.__name__].append(args.count / seconds)
    found = {name: round(statistics.median(some)) for name, some in rates.items()}
    ratios = sorted(mine / best for mine, best in zip(rates["skeleton"], rates["floor"], strict=True))
    ratio = {"ratio": round(statistics.median(ratios), 3), "least": round(ratios[0], 3), "most": round(ratios[-1], 3)}
    return {"concurrency": args.concurrency} | found | ratio


WORKS = {"throughput": throughput, "sessions": sessions}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=WORKS)
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--dir", type=Path, help="where to put a SQLite database (default: the system's temp)")
    parser.add_argument("--database", help="instead: an empty database on a server")
    args = parser.parse_args()
    work = WORKS[args.work]
    if args.database is not None:
        store = make_store(parse_address(args.database), [])
        store.prepare(migrate=True)
        print(json.dumps(asyncio.run(work(args, MAKERS[store.kind](args.database)))))
        return
    if args.work == "sessions":
        parser.error("sessions are measured on a server: give --database")
    with tempfile.TemporaryDirectory(prefix="skeleton-", dir=args.dir, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "skeleton.db"
        ensure_schema(str(path), lambda: connect_sqlite(path), migrate=True)
        print(json.dumps(asyncio.run(work(args, SqliteGroup(path)))))


if __name__ == "__main__":
    main()
