"""Benchmark DBOS Transact (PyPI: dbos), for comparison with Romancy.

    python benchmarks/peers/dbos_peer.py throughput --concurrency 64 --count 200 --dir TMPDIR
    python benchmarks/peers/dbos_peer.py latency --count 100 --activities 1 --dir TMPDIR
    python benchmarks/peers/dbos_peer.py replay --activities 1000 --dir TMPDIR
    python benchmarks/peers/dbos_peer.py memory --count 1000 --dir TMPDIR

Each prints one JSON object as the last line of stdout; `{"error": ...}` in it says that the work failed. Instead of
`--dir`, throughput and latency take `--database postgresql://…`: an empty database.

Configuration, and why:

* The async API throughout: async workflows and steps, started with `start_workflow_async`. Its workflows run
  on the caller's event loop; only its database calls go to threads.
* `max_executor_threads` is twice the cores. The default is unlimited, and then up to 64 threads contend for
  SQLite's single write lock: with 64 workflows in flight the bound gained about a quarter of throughput (120
  -> 150 workflows/s on two cores), and it cost nothing with one in flight. A single thread gained 5 % more,
  but is no setting to run an application with.
* The connection pool stays at its default (20); smaller pools gained nothing more once threads were bounded.
* No queue: DBOS dequeues by polling once a second, which would only slow these works down.
* WAL and synchronous=FULL come from `common.force_durability`; DBOS's own are rollback journal and FULL. On
  PostgreSQL its connections keep the server's settings.
* On PostgreSQL the threads stay unlimited and the pool at its default: there is no lock to contend for.
"""

import argparse
import asyncio
import os
import time
from pathlib import Path
from typing import Any

import common
from dbos import DBOS, DBOSConfig

THREADS = 2 * (os.cpu_count() or 2)
WARM_UP = 16
MEMORY_WARM_UP = 200  # so many wait before the baseline: threads, connections and caches are then in place

clock = common.ReplayClock()
reached = asyncio.Event()
crashing = False


@DBOS.step()
async def activity(name: str, number: int) -> dict[str, Any]:
    clock.executed += 1
    return {"name": name, "number": number}


@DBOS.workflow()
async def chain(name: str, activities: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for number in range(activities):
        result = await activity(name, number)
    return result


@DBOS.step()
async def gate() -> None:
    """The activity N+1 of a replay: the end of the first process, the aim of the second."""
    clock.past = time.perf_counter()
    if crashing:
        common.die()
    reached.set()


@DBOS.workflow()
async def recorded(activities: int) -> None:
    clock.entered = time.perf_counter()
    for number in range(activities):
        await activity("replay", number)
    await gate()


@DBOS.workflow()
async def sleeper() -> None:
    await DBOS.sleep_async(24 * 3600)


def launch(place: Path | str) -> DBOS:
    config: DBOSConfig = {"name": "dbos-peer", "log_level": "ERROR"}
    if isinstance(place, str):
        config["system_database_url"] = place
    else:
        config["system_database_url"] = f"sqlite:///{place / 'dbos.sqlite'}"
        config["max_executor_threads"] = THREADS
    dbos = DBOS(config=config)
    DBOS.launch()  # inside the running loop, so that recovered workflows run on it too
    return dbos


def query(dbos: DBOS, statement: str) -> Any:
    """Ask on one of the connections of DBOS's own pool."""
    return fetch(dbos, statement)[0]


def fetch(dbos: DBOS, statement: str) -> Any:
    with dbos._sys_db.engine.connect() as connection:
        return connection.exec_driver_sql(statement).one()


def durability(dbos: DBOS) -> common.Result:
    if dbos._sys_db.engine.dialect.name == "postgresql":
        return common.server_settings("postgresql", lambda question: fetch(dbos, question))
    verified = common.durability(query(dbos, "PRAGMA journal_mode"), query(dbos, "PRAGMA synchronous"))
    return verified | {"settings": {"event_loop": "asyncio", "max_executor_threads": THREADS}}


async def run_chain(activities: int) -> None:
    handle = await DBOS.start_workflow_async(chain, "peer", activities)
    result = await handle.get_result()
    assert result == {"name": "peer", "number": activities - 1}, result


async def throughput(args: argparse.Namespace, place: Path | str) -> common.Result:
    dbos = launch(place)
    await common.timed_bounded(lambda _: run_chain(3), WARM_UP, WARM_UP)
    seconds = await common.timed_bounded(lambda _: run_chain(3), args.count, args.concurrency)
    return common.throughput_result(args.count, seconds) | durability(dbos)


async def latency(args: argparse.Namespace, place: Path | str) -> common.Result:
    dbos = launch(place)
    await common.timed_each(lambda _: run_chain(args.activities), WARM_UP)
    return await common.timed_each(lambda _: run_chain(args.activities), args.count) | durability(dbos)


async def replay(args: argparse.Namespace, directory: Path) -> common.Result:
    """DBOS recovers by itself at launch, by putting pending workflows on its internal queue.

    That queue is polled once a second and its interval can't be configured, so `entry_seconds` is about 1;
    `replay_seconds` is what going through the recorded steps costs.
    """
    global crashing
    if args.phase is None:
        return await asyncio.to_thread(common.crash_then_recover, args, directory)
    crashing = args.phase == "crash"
    clock.launched = time.perf_counter()
    dbos = launch(directory)
    if crashing:
        await DBOS.start_workflow_async(recorded, args.activities)
    await asyncio.wait_for(reached.wait(), 600)
    note = "entry_seconds includes the wait for DBOS's internal queue, polled once a second"
    return clock.result() | {"note": note} | durability(dbos)


async def memory(args: argparse.Namespace, directory: Path) -> common.Result:
    """A sleeping DBOS workflow stays in memory, as an asyncio task."""
    dbos = launch(directory)

    async def start_sleepers(count: int) -> None:
        await common.timed_bounded(lambda _: DBOS.start_workflow_async(sleeper), count, WARM_UP)

    async def asleep(count: int) -> None:
        counting = "SELECT count(*) FROM operation_outputs WHERE function_name = 'DBOS.sleep'"
        while query(dbos, counting) < count:
            await asyncio.sleep(0.1)
        await asyncio.sleep(0.5)

    await start_sleepers(MEMORY_WARM_UP)
    await asleep(MEMORY_WARM_UP)
    before = common.resident_bytes()
    await start_sleepers(args.count)
    await asleep(MEMORY_WARM_UP + args.count)
    grown = common.resident_bytes() - before
    return {"bytes_per_instance": round(grown / args.count), "waiting_in": "sleep_async"} | durability(dbos)


if __name__ == "__main__":
    common.main("dbos", "dbos", {f.__name__: f for f in (throughput, latency, replay, memory)})
