"""Measure N worker processes that share one database on a server, and a client that only starts.

    python benchmarks/romancy_workers.py drain --workers 2 --count 8000 --database URL
    python benchmarks/romancy_workers.py feed --workers 2 --count 8000 --database URL

Each prints one JSON object. `drain`: the client has stored all instances before the workers begin. `feed`: it stores
them while they run. Workflows of three activities, as everywhere; each worker is a process with an `App` of default
options, the client an `App(worker=False)`.

The processes are ready, their imports done and their apps started, before time is taken; for `drain` the apps begin
with it. Time ends when no instance is left. Then it is checked that nothing was lost or done twice: each instance is
completed, with three rows of history, and the workers have run three activities for each. Processor time is user and
system seconds of the workers, of the client, and of the server's processes (all that the server did meanwhile).
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from typing import Any

from peers.common import Result, timed_bounded, tune_garbage_collector
from place import Place, add_place, again, run_work

from databases import server_cpu_seconds
from romancy import App, WorkflowContext, activity, workflow

LOOK_EVERY_S = 0.02
STARTS_AT_A_TIME = 512
LEFT = "SELECT count(*) FROM romancy_instances WHERE completed_at IS NULL"

executed = 0


@activity
async def step(name: str, number: int) -> dict[str, Any]:
    global executed
    executed += 1
    return {"name": name, "number": number}


@workflow
async def chain(ctx: WorkflowContext, name: str, activities: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for number in range(activities):
        result = await step(name, number)
    return result


class WorkerProcess:
    """One of the N.

    Args:
        work: what it is for; it begins its app when told to.
        place: the database.
    """

    def __init__(self, work: str, place: Place) -> None:
        self._process = subprocess.Popen(
            again(work, "work", place), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._expect("loaded")

    def tell(self, what: str) -> None:
        assert self._process.stdin is not None
        print(what, file=self._process.stdin, flush=True)

    def begin(self) -> None:
        """Start the app, and wait until it has."""
        self.tell("begin")
        self._expect("begun")

    def end(self) -> Result:
        """What it has done."""
        self.tell("end")
        assert self._process.stdout is not None
        result: Result = json.loads(self._process.stdout.readline())
        self._process.wait()
        return result

    def _expect(self, said: str) -> None:
        assert self._process.stdout is not None
        if (line := self._process.stdout.readline().strip()) != said:
            raise RuntimeError(f"a worker process said {line!r}, not {said!r}")


async def be_a_worker(place: Place, *, is_fed: bool) -> Result:
    print("loaded", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    cpu = time.process_time()
    tune_garbage_collector()
    async with App(place.address):
        if is_fed:
            cpu = time.process_time()
        print("begun", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        return {"cpu_s": time.process_time() - cpu, "executed": executed}


async def drain(args: argparse.Namespace, place: Place) -> Result:
    return await measure(args, place, is_fed=False)


async def feed(args: argparse.Namespace, place: Place) -> Result:
    return await measure(args, place, is_fed=True)


async def measure(args: argparse.Namespace, place: Place, *, is_fed: bool) -> Result:
    if args.phase == "work":
        return await be_a_worker(place, is_fed=is_fed)
    watch = place.watch()
    async with App(place.address, worker=False) as client:

        async def start(_: int) -> None:
            await client.start_workflow(chain, "bench", 3)

        processes = [WorkerProcess(args.work, place) for _ in range(args.workers)]
        if is_fed:
            for process in processes:
                process.begin()
        else:
            await timed_bounded(start, args.count, STARTS_AT_A_TIME)
        connection = place.connection
        server_cpu, client_cpu = server_cpu_seconds(connection), time.process_time()
        started = time.perf_counter()
        if is_fed:
            await timed_bounded(start, args.count, STARTS_AT_A_TIME)
        else:
            for process in processes:
                process.tell("begin")
        starting_s = time.perf_counter() - started
        await place.until(LEFT, 0, LOOK_EVERY_S)
        seconds = time.perf_counter() - started
        client_cpu = time.process_time() - client_cpu
        server_cpu = None if server_cpu is None else (server_cpu_seconds(connection) or 0) - server_cpu
        if not is_fed:
            for process in processes:
                process._expect("begun")
        ended = [process.end() for process in processes]
        check(place, args.count, [worker["executed"] for worker in ended])
        worker_cpu = sum(worker["cpu_s"] for worker in ended)
        all_cpu = worker_cpu + client_cpu + (server_cpu or 0)
        return (
            {
                "workflows_per_s": round(args.count / seconds, 2),
                "seconds": round(seconds, 4),
                "starting_seconds": round(starting_s, 4),
                "executed_by_worker": [worker["executed"] for worker in ended],
                "workers_cpu_s": round(worker_cpu, 3),
                "client_cpu_s": round(client_cpu, 3),
                "server_cpu_s": None if server_cpu is None else round(server_cpu, 3),
                "cores_of_workers": round(worker_cpu / seconds, 3),
                "cores_of_client": round(client_cpu / seconds, 3),
                "cores": round(all_cpu / seconds, 3),
            }
            | ({} if server_cpu is None else {"cores_of_server": round(server_cpu / seconds, 3)})
            | watch.durability(client)
        )


def check(place: Place, count: int, executed_by_worker: list[int]) -> None:
    """Nothing was lost, and nothing done twice."""
    found = {
        "instances": place.ask("SELECT count(*) FROM romancy_instances"),
        "completed": place.ask("SELECT count(*) FROM romancy_instances WHERE status = 'completed'"),
        "a third of the outcomes": place.ask("SELECT count(*) FROM romancy_history") / 3,
        "a third of the activities": sum(executed_by_worker) / 3,
    }
    if set(found.values()) != {count}:
        raise RuntimeError(f"lost or done twice: of {count} there are {found}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", choices=["drain", "feed"])
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--count", type=int, default=8_000)
    parser.add_argument("--phase", choices=["work"], help=argparse.SUPPRESS)
    add_place(parser)
    run_work(parser.parse_args(), {"drain": drain, "feed": feed})


if __name__ == "__main__":
    main()
