"""Measure Romancy in one process; the same works as the peers do, and some of its own.

    python benchmarks/romancy_works.py throughput --concurrency 64 --count 10000 --dir TMPDIR
    python benchmarks/romancy_works.py latency --activities 1 --count 500 --dir TMPDIR
    python benchmarks/romancy_works.py sessions --concurrency 64 --count 4000 --dir TMPDIR
    python benchmarks/romancy_works.py replay --activities 10000 --dir TMPDIR [--recorded KEPT]
    python benchmarks/romancy_works.py growth --activities 5000 --dir TMPDIR
    python benchmarks/romancy_works.py memory --count 5000 [--max-hot 500] --dir TMPDIR
    python benchmarks/romancy_works.py restart --count 200 --dir TMPDIR
    python benchmarks/romancy_works.py sleepers --count 100000 --dir TMPDIR
    python benchmarks/romancy_works.py idle --seconds 60 --dir TMPDIR

Each prints one JSON object as the last line of stdout. Instead of `--dir`, most take `--database URL`: an empty
database on a server. The app has its default options, except where a work
is about one of them (`memory --max-hot`). What durability the app's own connections answer is in the result.
"""

import argparse
import asyncio
import json
import shutil
import signal
import subprocess
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import connections
from peers.common import (
    ReplayClock,
    Result,
    die,
    resident_bytes,
    throughput_result,
    timed_bounded,
    timed_each,
)
from place import FILE, Place, add_place, again, run_work
from sqlalchemy import text

from romancy import App, Status, WorkflowContext, activity, current_activity, workflow

WARM_UP = 64
WAL_WARM_UP = 4_000  # workflows: the log has then been filled, checkpointed and begun anew
HOT_WARM_UP = 4_000  # so many wait before the baseline: threads, connections, caches and heap have their size
COLD_WARM_UP = 20_000
RESTART_ACTIVITIES = 5
RESTART_ACTIVITY_S = 0.2
IDLE_SLEEPERS = 100
IDLE_SETTLE_S = 6.0

MAKE_ROWS = "CREATE TABLE bench_rows (id VARCHAR(36) PRIMARY KEY, name VARCHAR(40) NOT NULL)"
KEEP_ROW = text("INSERT INTO bench_rows (id, name) VALUES (:id, :name)")

clock = ReplayClock()
reached = asyncio.Event()
is_crashing = False
durations_s: dict[str, list[float]] = {"long": [], "fresh": []}
returned_at: dict[str, float] = {}
turns = {"long": asyncio.Event(), "fresh": asyncio.Event()}
begun: set[str] = set()
woken_late_s: list[float] = []


@activity
async def step(name: str, number: int) -> dict[str, Any]:
    clock.executed += 1
    return {"name": name, "number": number}


@workflow
async def chain(ctx: WorkflowContext, name: str, activities: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for number in range(activities):
        result = await step(name, number)
    return result


@activity
async def gate() -> None:
    """The activity N+1 of a replay: the end of the first process, the aim of the second."""
    clock.past = time.perf_counter()
    if is_crashing:
        die()
    reached.set()


@workflow
async def recorded(ctx: WorkflowContext, activities: int) -> None:
    clock.entered = clock.entered or time.perf_counter()
    for number in range(activities):
        await step("bench", number)
    await gate()


@activity
async def paired_step(side: str) -> None:
    """Note how long the engine took from the last return to here; then let the other side take its turn."""
    if side in returned_at:
        durations_s[side].append(time.perf_counter() - returned_at[side])
    if side == "long":
        turns["fresh"].set()
    elif side in returned_at:  # at its first step the fresh one holds the only turn there is
        turns["long"].set()
    await turns[side].wait()
    turns[side].clear()
    returned_at[side] = time.perf_counter()


@workflow
async def growing(ctx: WorkflowContext, activities: int) -> None:
    tenth = activities // 10
    for number in range(activities - tenth):
        await step("bench", number)
    await gate()
    for _ in range(tenth):
        await paired_step("long")


@workflow
async def fresh(ctx: WorkflowContext, activities: int) -> None:
    for _ in range(activities):
        await paired_step("fresh")


@workflow
async def sleeper(ctx: WorkflowContext) -> None:
    await ctx.sleep(24 * 3600)


@workflow
async def alarm(ctx: WorkflowContext, due: datetime) -> None:
    await ctx.sleep_until(due)
    woken_late_s.append((datetime.now(UTC) - due).total_seconds())


@activity
async def slow_step(instance_id: str) -> None:
    begun.add(instance_id)
    await asyncio.sleep(RESTART_ACTIVITY_S)


@workflow
async def slow_chain(ctx: WorkflowContext) -> None:
    for _ in range(RESTART_ACTIVITIES):
        await slow_step(ctx.instance_id)


@activity
async def keep_row(instance_id: str, name: str) -> str:
    await current_activity().session.execute(KEEP_ROW, {"id": instance_id, "name": name})
    return name


@workflow
async def keep(ctx: WorkflowContext, name: str) -> str:
    return await keep_row(ctx.instance_id, name)


async def run_chain(app: App, activities: int) -> None:
    handle = await app.start_workflow(chain, "bench", activities)
    result = await handle.result()
    assert result == {"name": "bench", "number": activities - 1}, result


async def warm_up(app: App) -> None:
    await timed_bounded(lambda _: run_chain(app, 3), WAL_WARM_UP, 512)


# -- the works -------------------------------------------------------------------------------------------


async def throughput(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address) as app:
        await warm_up(app)
        cpu = time.process_time()
        seconds = await timed_bounded(lambda _: run_chain(app, 3), args.count, args.concurrency)
        cpu = time.process_time() - cpu
        extra = {"cpu_us_per_workflow": round(cpu / args.count * 1e6, 1)}
        return throughput_result(args.count, seconds) | extra | watch.durability(app)


async def latency(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address) as app:
        await warm_up(app)
        await timed_each(lambda _: run_chain(app, args.activities), WARM_UP)
        return await timed_each(lambda _: run_chain(app, args.activities), args.count) | watch.durability(app)


async def sessions(args: argparse.Namespace, place: Place) -> Result:
    """Workflows of one activity that inserts a row of its own in the transaction that records its outcome."""
    watch = place.watch()
    async with App(place.address) as app:
        place.connection.cursor().execute(MAKE_ROWS)

        async def run_one(_: int) -> None:
            handle = await app.start_workflow(keep, "bench")
            assert await handle.result() == "bench"

        await timed_bounded(run_one, args.concurrency * 10, args.concurrency)
        seconds = await timed_bounded(run_one, args.count, args.concurrency)
        kept = place.ask("SELECT count(*) FROM bench_rows")
        if kept != args.count + args.concurrency * 10:
            raise RuntimeError(f"{kept} rows are there")
        return throughput_result(args.count, seconds) | watch.durability(app)


async def replay(args: argparse.Namespace, place: Place) -> Result:
    """A process is killed after N activities; another one resumes the workflow from its history.

    `seconds` begin as the app starts, `replay_seconds` with the statement that claims the instance; both end
    when activity N+1 begins. A history recorded once (`--recorded`) is copied and resumed again and again.
    """
    global is_crashing
    if args.phase == "crash":
        is_crashing = True
        async with App(place.address) as app:
            await app.start_workflow(recorded, args.activities)
            await reached.wait()
    origin: Path = args.recorded or place.folder / "recorded"
    if not (origin / FILE).exists():
        origin.mkdir(parents=True, exist_ok=True)
        command = again("replay", "crash", Place(origin, None), activities=args.activities)
        crashed = await asyncio.to_thread(subprocess.run, command)
        if crashed.returncode != -signal.SIGKILL:
            raise RuntimeError(f"the recording process ended with {crashed.returncode}, not SIGKILL")
    for file in origin.glob(f"{FILE}*"):
        shutil.copy(file, place.folder)
    watch = connections.watch_sqlite(is_traced=True)
    claim = "UPDATE romancy_instances SET"
    watch.note_first(claim)
    clock.launched = time.perf_counter()
    async with App(place.address) as app:
        await reached.wait()
        result = clock.result() | {"replay_seconds": round(clock.past - watch.first_seen[claim], 5)}
        await asyncio.sleep(0.1)
        return result | watch.durability(app)


async def growth(args: argparse.Namespace, place: Place) -> Result:
    """The last tenth of a long history against the first activities of a fresh one, in turns.

    One activity of the one, one of the other: a slow moment of the disk meets both. Only one is on its way at
    a time; what is timed is the engine, from the return of an activity until the next one begins.
    """
    watch = place.watch()
    async with App(place.address) as app:
        await warm_up(app)
        long = await app.start_workflow(growing, args.activities)
        await reached.wait()
        other = await app.start_workflow(fresh, args.activities // 10)
        done = [asyncio.create_task(handle.result()) for handle in (long, other)]
        while not all(task.done() for task in done):
            await asyncio.wait([task for task in done if not task.done()], return_when=asyncio.FIRST_COMPLETED)
            for turn in turns.values():
                turn.set()  # the side that is left has nobody to wait for
        await asyncio.gather(*done)
        first, last = median(durations_s["fresh"]), median(durations_s["long"])
        result = {"first_ms": round(first * 1000, 4), "last_ms": round(last * 1000, 4)}
        return result | {"last_to_first": round(last / first, 4)} | watch.durability(app)


async def memory(args: argparse.Namespace, place: Place) -> Result:
    """How much the resident set grows with each sleeping instance; with `--max-hot`, with each cold one."""
    watch = place.watch()
    options = {} if args.max_hot is None else {"max_hot_instances": args.max_hot}
    before_count = HOT_WARM_UP if args.max_hot is None else COLD_WARM_UP
    waiting = f"SELECT count(*) FROM romancy_instances WHERE status = '{Status.WAITING_FOR_TIMER.value}'"
    async with App(place.address, **options) as app:
        await timed_bounded(lambda _: app.start_workflow(sleeper), before_count, WARM_UP)
        await place.until(waiting, before_count, 0.1)
        before = resident_bytes()
        await timed_bounded(lambda _: app.start_workflow(sleeper), args.count, WARM_UP)
        await place.until(waiting, before_count + args.count, 0.1)
        await asyncio.sleep(0.5)
        grown = resident_bytes() - before
        owned = place.ask("SELECT count(*) FROM romancy_instances WHERE owner IS NOT NULL")
        result = {"bytes_per_instance": round(grown / args.count), "grown_bytes": grown, "hot": owned}
        return result | watch.durability(app)


async def restart(args: argparse.Namespace, place: Place) -> Result:
    """Kill a process with so many instances in their first activity, and start it again.

    `seconds` from the kill until all instances are complete, the start of the interpreter and imports
    included; `app_seconds` from the start of the app. What is left to be done takes one second.
    """
    if args.phase == "crash":
        await run_until_killed(args.count, place)
    if args.phase == "recover":
        return await recover(place)
    first = subprocess.Popen(again("restart", "crash", place, count=args.count), stdout=subprocess.PIPE)
    assert first.stdout is not None
    if first.stdout.readline() != b"in flight\n":
        raise RuntimeError(f"the first process ended early, with {first.wait()}")
    first.kill()
    killed = time.time()
    first.wait()
    left = place.ask("SELECT count(*) FROM romancy_instances WHERE completed_at IS NULL")
    if left != args.count:
        raise RuntimeError(f"{left} instances were in flight, not {args.count}")
    second = await asyncio.to_thread(
        subprocess.run, again("restart", "recover", place), stdout=subprocess.PIPE, check=True, timeout=600
    )
    result: Result = json.loads(second.stdout)
    return {"seconds": round(result.pop("ended") - killed, 3)} | result


async def run_until_killed(count: int, place: Place) -> None:
    async with App(place.address) as app:
        await timed_bounded(lambda _: app.start_workflow(slow_chain), count, count)
        while len(begun) < count:
            await asyncio.sleep(0.001)
        print("in flight", flush=True)
        await asyncio.sleep(3600)


async def recover(place: Place) -> Result:
    watch = place.watch()
    launched = time.time()
    async with App(place.address) as app:
        await place.until("SELECT count(*) FROM romancy_instances WHERE completed_at IS NULL", 0, 0.01)
        ended = time.time()
        bad = place.ask("SELECT count(*) FROM romancy_instances WHERE status <> 'completed'")
        if bad:
            raise RuntimeError(f"{bad} instances did not complete")
        return {"ended": ended, "app_seconds": round(ended - launched, 3)} | watch.durability(app)


async def sleepers(args: argparse.Namespace, place: Place) -> Result:
    """So many instances sleep until moments spread over one second; how long until all have been woken?

    `seconds` from the first of those moments until the last instance has gone on; `durable_seconds` until its
    end is durable too. Most of them are cold then: the app keeps its default number hot.
    """
    watch = place.watch()
    async with App(place.address) as app:
        started = time.perf_counter()
        far = datetime.now(UTC) + timedelta(days=1)
        probe = 2_000
        await timed_bounded(lambda _: app.start_workflow(alarm, far), probe, 512)
        lead_s = 5 + (time.perf_counter() - started) / probe * args.count * 2
        due = datetime.now(UTC) + timedelta(seconds=lead_s)
        spread = timedelta(seconds=1) / args.count
        started = time.perf_counter()
        commits = app._life.writer.committed
        await timed_bounded(lambda n: app.start_workflow(alarm, due + n * spread), args.count, 512)
        start_seconds = time.perf_counter() - started
        commits = app._life.writer.committed - commits
        if datetime.now(UTC) >= due:
            raise RuntimeError(f"the start took {start_seconds:.0f} s: longer than until the first was due")
        resident = resident_bytes()
        while len(woken_late_s) < args.count:
            await asyncio.sleep(0.02)
            if datetime.now(UTC) > due + timedelta(seconds=600):
                raise RuntimeError(f"{args.count - len(woken_late_s)} were not woken within 600 s")
        seconds = (datetime.now(UTC) - due).total_seconds()
        await place.until("SELECT count(*) FROM romancy_instances WHERE completed_at IS NULL", probe, 0.1)
        durable_seconds = (datetime.now(UTC) - due).total_seconds()
        late = sorted(woken_late_s)
        return {
            "seconds": round(seconds, 3),
            "durable_seconds": round(durable_seconds, 3),
            "p50_late_s": round(late[len(late) // 2], 3),
            "p99_late_s": round(late[len(late) * 99 // 100], 3),
            "early": sum(late_s < 0 for late_s in late),
            "woken": len(late),
            "starts_per_s": round(args.count / start_seconds),
            "commits_per_start": round(commits / args.count, 4),
            "resident_megabytes": round(resident / 1e6, 1),
        } | watch.durability(app)


async def idle(args: argparse.Namespace, place: Place) -> Result:
    """The statements that a worker sends while some instances sleep and nothing is due."""
    watch = place.watch(is_traced=True)
    async with App(place.address) as app:
        await timed_bounded(lambda _: app.start_workflow(sleeper), IDLE_SLEEPERS, IDLE_SLEEPERS)
        await asyncio.sleep(IDLE_SETTLE_S)
        before, cpu = watch.statements, time.process_time()
        await asyncio.sleep(args.seconds)
        statements, cpu = watch.statements - before, time.process_time() - cpu
        result = {
            "statements_per_minute": round(statements / args.seconds * 60, 1),
            "cpu_percent": round(cpu / args.seconds * 100, 2),
        }
        return result | watch.durability(app)


def main() -> None:
    measured = (throughput, latency, sessions, replay, growth, memory, restart, sleepers, idle)
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=[work.__name__ for work in measured])
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--activities", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--max-hot", type=int, help="keep so few waiting instances in memory")
    parser.add_argument("--recorded", type=Path, help="a folder that keeps the history to replay")
    parser.add_argument("--phase", choices=["crash", "recover"], help=argparse.SUPPRESS)
    add_place(parser)
    run_work(parser.parse_args(), {work.__name__: work for work in measured})


if __name__ == "__main__":
    main()
