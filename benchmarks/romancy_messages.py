"""Measure Romancy's events, children and runs in a row.

    python benchmarks/romancy_messages.py events --count 200 --sender own --dir TMPDIR
    python benchmarks/romancy_messages.py events --count 100 --sender other --dir TMPDIR
    python benchmarks/romancy_messages.py events --count 1 --idle-seconds 20 --sender other --dir TMPDIR
    python benchmarks/romancy_messages.py earlier --earlier 100000 --count 200 --dir TMPDIR
    python benchmarks/romancy_messages.py children --count 1000 --dir TMPDIR
    python benchmarks/romancy_messages.py runs --count 10000 --dir TMPDIR

Each prints one JSON object. Instead of `--dir` they take `--database URL`: an empty database on a server.

* `events`: from the call of `send_event` until a workflow that waited for it has ended, its end durable and known in
  the process that runs it. With `--sender other` the event is sent by a process without a worker; both read the same
  monotonic clock of the machine. Up to 50 ms pass between one workflow and the next, so that events do not fall into
  step with whatever looks from time to time; with `--idle-seconds`, so long that nothing happened at all.
* `earlier`: first 10 and then so many events of the same type with other keys are kept for whoever may want them.
  After each: how long a workflow takes, from start to result, whose event is there already; and how long one that
  waits takes after its event was sent.
* `children`: one workflow that starts so many and gathers their results.
* `runs`: one workflow that recurs so often, and what the process has grown by between run 1,000 and the last.
"""

import argparse
import asyncio
import subprocess
import sys
import time
from random import Random
from typing import Any

from peers.common import Result, resident_bytes, timed_bounded, timed_each, tune_garbage_collector
from place import Place, add_place, again, run_work

from romancy import App, Status, WorkflowContext, WorkflowHandle, workflow

EVENT = "payment.completed"
LONGEST_PAUSE_S = 0.05
LOOK_EVERY_S = 0.002
WARM_UP = 20
FEW_EARLIER = 10
SENT_AT_A_TIME = 512
FIRST_MARK = 1_000

resident_at: dict[int, int] = {}


@workflow
async def order(ctx: WorkflowContext, key: str) -> int:
    event = await ctx.wait_event(EVENT, key=key)
    amount: int = event.data["amount"]
    return amount


@workflow
async def double(ctx: WorkflowContext, number: int) -> int:
    return 2 * number


@workflow
async def fan_out(ctx: WorkflowContext, count: int) -> int:
    return sum(await asyncio.gather(*(ctx.execute_child(double, number) for number in range(count))))


@workflow
async def counter(ctx: WorkflowContext, number: int, last: int) -> int:
    if number in (FIRST_MARK, last):
        resident_at[number] = resident_bytes()
    if number < last:
        await ctx.recur(number + 1, last)
    return number


async def waiting_order(app: App, key: str) -> WorkflowHandle[int]:
    """A workflow that durably waits for its event."""
    handle = await app.start_workflow(order, key)
    while await handle.status() is not Status.WAITING_FOR_EVENT:
        await asyncio.sleep(LOOK_EVERY_S)
    return handle


async def send(app: App, key: str) -> None:
    await app.send_event(EVENT, {"amount": 17}, key=key)


class Pauses:
    """What passes before each event is sent.

    Args:
        idle_s: so long; 0: up to 50 ms, by chance, but the same in each run.
    """

    def __init__(self, idle_s: float) -> None:
        self._idle_s = idle_s
        self._random = Random(1)

    async def pass_by(self) -> None:
        await asyncio.sleep(self._idle_s or self._random.uniform(0, LONGEST_PAUSE_S))


def percentiles(seconds: list[float]) -> Result:
    """Nearest rank, in milliseconds."""
    ordered = sorted(seconds)
    ranks = {"p50_ms": 50, "p95_ms": 95, "p99_ms": 99}
    return {name: round(ordered[max(0, -(-len(ordered) * rank // 100) - 1)] * 1000, 3) for name, rank in ranks.items()}


# -- events ------------------------------------------------------------------------------------------


async def events(args: argparse.Namespace, place: Place) -> Result:
    if args.phase == "work":
        return await answer_the_sender(place)
    return await (events_of_others(args, place) if args.sender == "other" else events_of_its_own(args, place))


async def events_of_its_own(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address) as app:

        async def take(key: str, pauses: Pauses) -> float:
            handle = await waiting_order(app, key)
            await pauses.pass_by()
            sent = time.monotonic()
            await send(app, key)
            assert await handle.result() == 17
            return time.monotonic() - sent

        for number in range(WARM_UP):
            await take(f"warm-{number}", Pauses(0.001))
        tune_garbage_collector()
        pauses = Pauses(args.idle_seconds)
        taken = [await take(f"key-{number}", pauses) for number in range(args.count)]
        return percentiles(taken) | watch.durability(app)


async def events_of_others(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address, worker=False) as client:
        worker = subprocess.Popen(
            again("events", "work", place), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert worker.stdin is not None
        assert worker.stdout is not None
        stdin, stdout = worker.stdin, worker.stdout

        async def take(key: str, pauses: Pauses) -> float:
            print(key, file=stdin, flush=True)
            if (said := await asyncio.to_thread(stdout.readline)) != "waiting\n":
                raise RuntimeError(f"the worker said {said!r}")
            await pauses.pass_by()
            sent = time.monotonic()
            await send(client, key)
            return float(await asyncio.to_thread(stdout.readline)) - sent

        for number in range(WARM_UP):
            await take(f"warm-{number}", Pauses(0.001))
        tune_garbage_collector()
        pauses = Pauses(args.idle_seconds)
        taken = [await take(f"key-{number}", pauses) for number in range(args.count)]
        stdin.close()
        worker.wait()
        return percentiles(taken) | watch.durability(client)


async def answer_the_sender(place: Place) -> Result:
    """Start a workflow for each key that is read, and say when it waits, and the time at which it has ended."""
    async with App(place.address) as app:
        tune_garbage_collector()
        while key := (await asyncio.to_thread(sys.stdin.readline)).strip():
            handle = await waiting_order(app, key)
            print("waiting", flush=True)
            assert await handle.result() == 17
            print(time.monotonic(), flush=True)
    return {}


async def earlier(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address) as app:

        async def take_kept(number: int) -> None:
            handle = await app.start_workflow(order, f"{there}-kept-{number}")
            assert await handle.result() == 17

        async def measure() -> Result:
            await timed_bounded(lambda number: send(app, f"{there}-kept-{number}"), args.count, SENT_AT_A_TIME)
            kept = await timed_each(take_kept, args.count)
            sent = []
            for number in range(args.count):
                handle = await waiting_order(app, f"{there}-sent-{number}")
                began = time.monotonic()
                await send(app, f"{there}-sent-{number}")
                assert await handle.result() == 17
                sent.append(time.monotonic() - began)
            return {"kept_ms": kept["p50_ms"], "sent_ms": percentiles(sent)["p50_ms"]}

        there = 0  # warm up; its figures are dropped
        await measure()
        there = FEW_EARLIER
        await timed_bounded(lambda number: send(app, f"other-{number}"), there, there)
        few = await measure()
        seconds = await timed_bounded(
            lambda number: send(app, f"another-{number}"), args.earlier - there, SENT_AT_A_TIME
        )
        rate = (args.earlier - there) / seconds
        there = args.earlier
        many = await measure()
        return {
            "few": few,
            "many": many,
            "kept_ratio": round(many["kept_ms"] / few["kept_ms"], 3),
            "sent_ratio": round(many["sent_ms"] / few["sent_ms"], 3),
            "events_per_s": round(rate, 1),
        } | watch.durability(app)


# -- children and runs -------------------------------------------------------------------------------


async def children(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address) as app:

        async def run(count: int) -> float:
            tune_garbage_collector()
            started = time.perf_counter()
            handle = await app.start_workflow(fan_out, count)
            assert await handle.result() == count * (count - 1)
            return time.perf_counter() - started

        await run(WARM_UP)
        cpu = time.process_time()
        seconds = await run(args.count)
        cpu = time.process_time() - cpu
        ended = place.ask("SELECT count(*) FROM romancy_instances WHERE status = 'completed'")
        if ended != args.count + WARM_UP + 2:
            raise RuntimeError(f"{ended} workflows were completed")
        return {"seconds": round(seconds, 4), "cpu_seconds": round(cpu, 4)} | watch.durability(app)


async def runs(args: argparse.Namespace, place: Place) -> Result:
    watch = place.watch()
    async with App(place.address) as app:
        await (await app.start_workflow(counter, 1, 100)).result()
        resident_at.clear()
        tune_garbage_collector()
        started = time.perf_counter()
        handle = await app.start_workflow(counter, 1, args.count)
        assert await handle.result() == args.count
        seconds = time.perf_counter() - started
        grown: Any = resident_at[args.count] - resident_at[FIRST_MARK]
        result = {"seconds": round(seconds, 4), "runs_per_s": round(args.count / seconds, 1)}
        return result | {"grown_kib": round(grown / 1024)} | watch.durability(app)


def main() -> None:
    works = {work.__name__: work for work in (events, earlier, children, runs)}
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=works)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--sender", choices=["own", "other"], default="own")
    parser.add_argument("--idle-seconds", type=float, default=0.0)
    parser.add_argument("--earlier", type=int, default=100_000)
    parser.add_argument("--phase", choices=["work"], help=argparse.SUPPRESS)
    add_place(parser)
    run_work(parser.parse_args(), works)


if __name__ == "__main__":
    main()
