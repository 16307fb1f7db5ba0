"""What both peer benchmarks share: options, durability, measurement and the one JSON line they print.

A peer script defines one function per kind of work and hands them to `main`. Everything a peer prints
while it runs goes to stderr, so that stdout holds exactly one JSON object.
"""

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy

Result = dict[str, Any]
Work = Callable[[argparse.Namespace, "Path | str"], Coroutine[Any, Any, Result]]


def force_durability() -> None:
    """Give every SQLite connection opened in this process WAL and synchronous=FULL.

    Neither peer has a setting for this. A listener on the Engine class reaches the engines that the peers
    create for themselves, synchronous and asynchronous alike.
    """

    @sqlalchemy.event.listens_for(sqlalchemy.engine.Engine, "connect")
    def configure(connection: Any, _record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()


def durability(journal_mode: str, synchronous: int) -> Result:
    """Report what the peer's own connection answered; refuse to report a weaker run."""
    if (journal_mode, synchronous) != ("wal", 2):
        raise RuntimeError(f"not WAL with synchronous=FULL: {journal_mode}, {synchronous}")
    return {"journal_mode": journal_mode, "synchronous": synchronous}


SETTINGS = {
    "postgresql": ("server_version", "fsync", "synchronous_commit", "full_page_writes", "wal_sync_method"),
    "mysql": ("version", "innodb_flush_log_at_trx_commit", "innodb_doublewrite", "log_bin", "sync_binlog"),
}
QUESTIONS = {
    "postgresql": "SELECT " + ", ".join(f"current_setting('{name}')" for name in SETTINGS["postgresql"]),
    "mysql": "SELECT " + ", ".join(f"@@{name}" for name in SETTINGS["mysql"]),
}


def server_settings(kind: str, fetch: Callable[[str], Any]) -> Result:
    """What a connection to a server answers; refuse to report a run that could lose what was acknowledged.

    Args:
        kind: ``postgresql`` or ``mysql``.
        fetch: asks one question on that connection and gives the first row.
    """
    found = dict(zip(SETTINGS[kind], fetch(QUESTIONS[kind]), strict=True))
    if kind == "postgresql":
        is_durable = found["fsync"] == found["full_page_writes"] == "on" and found["synchronous_commit"] != "off"
    else:
        is_durable = found["innodb_flush_log_at_trx_commit"] == 1
    if not is_durable:
        raise RuntimeError(f"the server would lose what it has acknowledged: {found}")
    return {"server": found}


def tune_garbage_collector() -> None:
    """What `romancy worker` does at its start (`romancy.tuning`), here for the floor and all peers alike."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


async def timed_bounded(run_one: Callable[[int], Awaitable[Any]], count: int, concurrency: int) -> float:
    """Seconds from first start to last result of `run_one(0..count-1)`, at most `concurrency` in flight."""
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await run_one(number)

    tune_garbage_collector()
    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(min(concurrency, count))))
    return time.perf_counter() - started


async def timed_each(run_one: Callable[[int], Awaitable[Any]], count: int) -> Result:
    """Run one at a time; the percentiles (nearest rank) of the single durations in milliseconds."""
    tune_garbage_collector()
    durations = []
    for number in range(count):
        started = time.perf_counter()
        await run_one(number)
        durations.append((time.perf_counter() - started) * 1000)
    durations.sort()

    def rank(percent: int) -> float:
        return round(durations[max(0, -(-count * percent // 100) - 1)], 3)

    return {"p50_ms": rank(50), "p95_ms": rank(95), "p99_ms": rank(99)}


def throughput_result(count: int, seconds: float) -> Result:
    return {"count": count, "seconds": round(seconds, 4), "workflows_per_s": round(count / seconds, 2)}


def resident_bytes() -> int:
    """This process's resident set, after a full collection."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class ReplayClock:
    """Times a recovery: launch -> the workflow's code is entered again -> activity N+1 runs."""

    def __init__(self) -> None:
        self.launched = self.entered = self.past = 0.0
        self.executed = 0  # activities really run in this process

    def result(self) -> Result:
        if self.executed:
            raise RuntimeError(f"{self.executed} recorded activities ran again")
        return {
            "seconds": round(self.past - self.launched, 4),
            "entry_seconds": round(self.entered - self.launched, 4),
            "replay_seconds": round(self.past - self.entered, 4),
        }


def crash_then_recover(args: argparse.Namespace, directory: Path) -> Result:
    """Run this same script twice on one database: once until SIGKILL after activity N, once recovering."""
    options = ["replay", "--activities", str(args.activities), "--dir", str(directory), "--phase"]
    command = [sys.executable, sys.argv[0], *options]
    crashed = subprocess.run([*command, "crash"], stdout=subprocess.PIPE, check=False)
    if crashed.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the first process ended with {crashed.returncode}, not SIGKILL")
    recovered = subprocess.run([*command, "recover"], stdout=subprocess.PIPE, check=True, timeout=600)
    result: Result = json.loads(recovered.stdout.splitlines()[-1])
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def die() -> None:
    """End this process as a crash would: no handlers, no flushing, no clean-up."""
    os.kill(os.getpid(), signal.SIGKILL)


def parse_args() -> argparse.Namespace:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--dir", type=Path, help="where to put a SQLite database (default: the system's temp)")
    options.add_argument("--database", help="instead: an empty database on a server, as postgresql://… or mysql://…")
    parser = argparse.ArgumentParser()
    works = parser.add_subparsers(dest="work", required=True)
    throughput = works.add_parser("throughput", parents=[options])
    throughput.add_argument("--concurrency", type=int, default=64)
    throughput.add_argument("--count", type=int, default=200)
    latency = works.add_parser("latency", parents=[options])
    latency.add_argument("--count", type=int, default=100)
    latency.add_argument("--activities", type=int, default=1)
    replay = works.add_parser("replay", parents=[options])
    replay.add_argument("--activities", type=int, default=1000)
    replay.add_argument("--phase", choices=["crash", "recover"], help=argparse.SUPPRESS)
    memory = works.add_parser("memory", parents=[options])
    memory.add_argument("--count", type=int, default=1000)
    return parser.parse_args()


def finish(result: Result) -> NoReturn:
    """Print the one JSON object and end at once: no still waiting workflow shall hold up the end."""
    sys.stderr.flush()
    print(json.dumps(result), file=sys.__stdout__, flush=True)
    os._exit(0)


def main(
    system: str,
    package: str,
    works: dict[str, Work],
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> NoReturn:
    """Do the work that the command line names and print its JSON object; errors are reported in it."""
    args = parse_args()
    head = {"system": system, "version": importlib.metadata.version(package), "work": args.work}
    head |= {key: value for key, value in vars(args).items() if key in ("concurrency", "activities", "count")}
    if args.dir is not None:
        args.dir.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        if getattr(args, "phase", None):
            place = args.dir  # both phases share the directory that their parent made
        elif args.database is not None:
            place = args.database
        else:
            made = tempfile.TemporaryDirectory(prefix=f"{system}-", dir=args.dir, ignore_cleanup_errors=True)
            place = Path(stack.enter_context(made)).resolve()
        if args.database is None:
            force_durability()
        runner = asyncio.Runner(loop_factory=loop_factory)  # never closed: `finish` ends the process
        try:
            result = runner.run(works[args.work](args, place))
        except Exception as error:
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:300]}
    finish(head | result)
