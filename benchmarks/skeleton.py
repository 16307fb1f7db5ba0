"""The least that any engine must do in Python, on the floor's writer: how near the floor can one come?

    python benchmarks/skeleton.py --concurrency 512 --count 20000 --dir TMPDIR

Prints one JSON object: workflows of three activities a second of the floor, and of this skeleton, in one process.

The skeleton has what the promises cannot do without, and nothing else: each workflow is a task on an event loop of its
own, each activity a task on the real one; arguments and results become JSON, and a result is read back; an activity
waits until the outcome before it is durable. It has no replay, no retries, no timeouts, no cancellation, no limits, no
leases, no ids by counter, no errors, and no types. So its ratio to the floor is more than an engine can reach.
"""

import argparse
import asyncio
import json
import tempfile
import time
from asyncio import _set_running_loop
from collections import deque
from collections.abc import Callable
from contextvars import Context, copy_context
from pathlib import Path
from typing import Any

from floor import WAL_WARM_UP, Writer, end_row, history_row, instance_ids, start_row
from group_commit import SqliteGroup, connect_sqlite
from peers.common import timed_bounded

from romancy.storage.migrate import ensure_schema

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


async def measure(args: argparse.Namespace, path: Path) -> dict[str, Any]:
    writer, ids, outer = Writer(SqliteGroup(path)), instance_ids(), asyncio.get_running_loop()

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

    rates = {}
    for run_one in (floor, skeleton):
        await timed_bounded(run_one, WAL_WARM_UP, 512)
        rates[run_one.__name__] = round(args.count / await timed_bounded(run_one, args.count, args.concurrency))
    return rates | {"ratio": round(rates["skeleton"] / rates["floor"], 3)} | writer.durability()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--dir", type=Path, help="where to put the database (default: the system's temp)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="skeleton-", dir=args.dir, ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "skeleton.db"
        ensure_schema(str(path), lambda: connect_sqlite(path), migrate=True)
        print(json.dumps({"concurrency": args.concurrency} | asyncio.run(measure(args, path))))


if __name__ == "__main__":
    main()
