"""Benchmark Edda (PyPI: edda-framework), for comparison with Romancy.

    python benchmarks/peers/edda_peer.py throughput --concurrency 64 --count 200 --dir TMPDIR
    python benchmarks/peers/edda_peer.py latency --count 100 --activities 1 --dir TMPDIR
    python benchmarks/peers/edda_peer.py replay --activities 1000 --dir TMPDIR
    python benchmarks/peers/edda_peer.py memory --count 1000 --dir TMPDIR

Each prints one JSON object as the last line of stdout; `{"error": ...}` in it says that the work failed. Instead of
`--dir`, throughput and latency take `--database URL`: an empty database, as postgresql://… or mysql://….

Configuration, and why:

* `workflow.start(...)` from async code, with async activities. It runs the workflow in the caller's task and
  returns once it has completed or waits, so the caller's tasks are the concurrency; Edda has no other limit.
  The result is then read with `storage.get_instance`, since `start` returns only the instance's id.
* uvloop, which Edda depends on and itself installs as the event loop policy.
* An engine of our own with five connections (Edda's pool size) and no limit to the wait for one. The engine
  that Edda makes takes no pool settings for SQLite: up to 15 connections, and a workflow that waits 30 s for
  one fails. With more in flight than that, single workflows did starve in runs longer than 30 s. Between 2
  and 15 connections made no difference in throughput.
* Edda's background tasks are stopped after `initialize`. None is needed here, and the one that looks for
  running workflows without a lock also finds those that are just about to be started: on SQLite, where taking
  a lock is a read and then a write, both then run the same instance, and one run fails with a violated UNIQUE
  constraint (seen in four runs of four, with 600 workflows and 64 in flight). If at all, this favours Edda.
* No outbox and no HTTP: those are parts of Edda that the works measured here don't need.
* WAL and synchronous=FULL come from `common.force_durability`; Edda's own are rollback journal and FULL. On servers
  its connections keep the server's settings.
* On servers it has the engine that it makes for itself, with asyncpg and aiomysql.
"""

import argparse
import asyncio
import time
from pathlib import Path
from typing import Any

import common
import uvloop
from edda import EddaApp, WorkflowContext, activity, sleep, workflow
from edda.storage import SQLAlchemyStorage
from sqlalchemy.ext.asyncio import create_async_engine

WARM_UP = 16
MEMORY_WARM_UP = 200  # so many wait before the baseline: connections and caches are then in place
LOCK_SECONDS = 3600
SETTINGS = {"event_loop": "uvloop", "pool_size": 5, "background_tasks": False}

clock = common.ReplayClock()
crashing = False


@activity
async def step(_ctx: WorkflowContext, name: str, number: int) -> dict[str, Any]:
    clock.executed += 1
    return {"name": name, "number": number}


@workflow
async def chain(ctx: WorkflowContext, name: str, activities: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for number in range(activities):
        result = await step(ctx, name, number)
    return result


@activity
async def gate(_ctx: WorkflowContext) -> dict[str, Any]:
    """The activity N+1 of a replay: the end of the first process, the aim of the second."""
    clock.past = time.perf_counter()
    if crashing:
        common.die()
    return {}


@workflow
async def recorded(ctx: WorkflowContext, activities: int) -> dict[str, Any]:
    clock.entered = time.perf_counter()
    for number in range(activities):
        await step(ctx, "replay", number)
    return await gate(ctx)


@workflow
async def sleeper(ctx: WorkflowContext) -> dict[str, Any]:
    await sleep(ctx, 24 * 3600)
    return {}


DRIVERS = {"postgresql": "postgresql+asyncpg", "mysql": "mysql+aiomysql"}


async def launch(place: Path | str) -> EddaApp:
    if isinstance(place, str):
        kind = place.partition(":")[0]
        app = EddaApp(service_name="edda-peer", db_url=DRIVERS[kind] + place.removeprefix(kind))
    else:
        url = f"sqlite+aiosqlite:///{place / 'edda.sqlite'}"
        app = EddaApp(service_name="edda-peer", db_url=url)
        patient = create_async_engine(url, pool_size=5, max_overflow=0, pool_timeout=3600, connect_args={"timeout": 60})
        app.storage = SQLAlchemyStorage(patient)
    await app.initialize()
    for task in app._background_tasks:
        task.cancel()
    await asyncio.gather(*app._background_tasks, return_exceptions=True)
    return app


async def durability(app: EddaApp) -> common.Result:
    """Ask one of the connections of Edda's own pool."""
    async with app.storage.engine.connect() as connection:
        kind = app.storage.engine.dialect.name
        if kind != "sqlite":
            row = (await connection.exec_driver_sql(common.QUESTIONS[kind])).one()
            return common.server_settings(kind, lambda _: row)
        journal_mode = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one()
        synchronous = (await connection.exec_driver_sql("PRAGMA synchronous")).scalar_one()
    return common.durability(journal_mode, synchronous) | {"settings": SETTINGS}


async def run_chain(app: EddaApp, activities: int) -> None:
    instance_id = await chain.start(name="peer", activities=activities)
    instance = await app.storage.get_instance(instance_id)
    assert instance is not None
    assert instance["status"] == "completed", instance
    assert instance["output_data"] == {"result": {"name": "peer", "number": activities - 1}}, instance


async def throughput(args: argparse.Namespace, place: Path | str) -> common.Result:
    app = await launch(place)
    await run_chain(app, 3)  # the very first start of a workflow must be alone: it inserts the definition
    await common.timed_bounded(lambda _: run_chain(app, 3), WARM_UP, WARM_UP)
    seconds = await common.timed_bounded(lambda _: run_chain(app, 3), args.count, args.concurrency)
    return common.throughput_result(args.count, seconds) | await durability(app)


async def latency(args: argparse.Namespace, place: Path | str) -> common.Result:
    app = await launch(place)
    await common.timed_each(lambda _: run_chain(app, args.activities), WARM_UP)
    timed = await common.timed_each(lambda _: run_chain(app, args.activities), args.count)
    return timed | await durability(app)


async def replay(args: argparse.Namespace, directory: Path) -> common.Result:
    """Recover as Edda's leader does, but at once.

    By itself Edda resumes a crashed workflow when its lock has expired (300 s by default) and the leader next
    looks (every 60 to 78 s). Neither wait is measured here: the dead worker's lock is released by hand and
    the instance resumed by name, the call that the leader makes.
    """
    global crashing
    if args.phase is None:
        return await asyncio.to_thread(common.crash_then_recover, args, directory)
    crashing = args.phase == "crash"
    clock.launched = time.perf_counter()
    app = await launch(directory)
    if crashing:
        # A longer lock than the default, lest Edda takes a long recording for a dead one.
        await recorded.start(lock_timeout_seconds=LOCK_SECONDS, activities=args.activities)
    found = await app.storage.list_instances(status_filter="running")
    (instance,) = found["instances"]
    await app.storage.release_lock(instance["instance_id"], instance["locked_by"])
    await app.replay_engine.resume_by_name(instance["instance_id"], instance["workflow_name"])
    note = "resumed by hand; by itself Edda waits for the lock's expiry (300 s) and its leader's look (60 s)"
    return clock.result() | {"note": note} | await durability(app)


async def memory(args: argparse.Namespace, directory: Path) -> common.Result:
    """A sleeping Edda workflow leaves memory: it is a row, and is replayed when its timer has expired."""
    app = await launch(directory)
    await sleeper.start()  # alone: it inserts the definition
    await common.timed_bounded(lambda _: sleeper.start(), MEMORY_WARM_UP, WARM_UP)
    before = common.resident_bytes()
    await common.timed_bounded(lambda _: sleeper.start(), args.count, WARM_UP)
    grown = common.resident_bytes() - before
    note = "waiting instances are only rows in the database; the growth is the process's own"
    measured = {"bytes_per_instance": round(grown / args.count), "waiting_in": "sleep", "note": note}
    return measured | await durability(app)


if __name__ == "__main__":
    works = {f.__name__: f for f in (throughput, latency, replay, memory)}
    common.main("edda", "edda-framework", works, loop_factory=uvloop.new_event_loop)
