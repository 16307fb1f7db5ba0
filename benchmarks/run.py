"""Run the benchmarks and print how Romancy compares with the floor, with its peers and with its goals.

    uv run python benchmarks/run.py [--quick] [--only WORK] [--runs N] [--no-peers]

See benchmarks/README.md for what each line means.
"""

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import psycopg
import pymysql
from peers.common import Result
from plan import PEERS, Case, System, cases
from report import Raw, markdown, plain_tables, tabulate

from databases import KINDS, USUAL, Server

HERE = Path(__file__).resolve().parent
BUILD = HERE.parent / "build"
RESULTS = HERE / "results"
JOB_TIMEOUT_S = 1_200
FLUSHES = 200
MEMORY_FILE_SYSTEMS = {"tmpfs", "ramfs", "devtmpfs"}


def main() -> None:
    args = parse_args()
    args.dir.mkdir(parents=True, exist_ok=True)
    refuse_memory(args.dir)
    peers_python = None if args.no_peers else args.peers_python or sync_peers()
    chosen = [
        case
        for case in cases(is_quick=args.quick)
        if (not args.only or case.work in args.only) and (not args.on or case.on in args.on)
    ]
    wanted = {case.on for case in chosen}
    servers = {kind: Server(url) for kind, url in args.urls.items() if kind in wanted}
    with tempfile.TemporaryDirectory(prefix="bench-", dir=args.dir, ignore_cleanup_errors=True) as made:
        environment = describe_machine(Path(made)) | describe_servers(servers)
        for kind, why in environment["missing"].items():
            print(f"NOT MEASURED: {why}", flush=True)
            chosen = [case for case in chosen if case.on != kind]
        raw = run_all(chosen, args.runs, Runner(Path(made), servers, peers_python))
    if not raw:
        raise SystemExit("nothing was measured")
    record = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "options": {
            "quick": args.quick,
            "only": args.only,
            "on": args.on,
            "runs": args.runs,
            "peers": peers_python is not None,
        },
        "environment": environment,
    }
    is_one_version = sources_digest() == environment["sources"]
    record["is_one_version"] = is_one_version
    sections = tabulate(chosen, raw)
    is_whole = not (args.quick or args.only or args.on or environment["missing"])
    save(record, raw, markdown(record, sections), is_complete=is_whole and is_one_version)
    print(plain_tables(record, sections))
    if not is_one_version:
        print("the sources changed during the run: these figures belong to no one version")


def parse_args() -> argparse.Namespace:
    works = list(dict.fromkeys(case.work for case in cases(is_quick=True)))
    parser = argparse.ArgumentParser(description="Run the benchmarks; see benchmarks/README.md.")
    parser.add_argument("--quick", action="store_true", help="smaller counts: to try it out, not to quote")
    parser.add_argument("--only", action="append", choices=works, default=[], help="this work (repeatable)")
    parser.add_argument("--on", action="append", choices=KINDS, default=[], help="this database (repeatable)")
    for kind, url in USUAL.items():
        parser.add_argument(f"--{kind}", metavar="URL", default=url, help=f"a server (default: {url})")
    parser.add_argument("--runs", type=int, default=5, help="runs of each; the median counts (default: 5)")
    parser.add_argument("--no-peers", action="store_true", help="without DBOS and Edda")
    parser.add_argument(
        "--peers-python",
        default=os.environ.get("ROMANCY_BENCH_PEERS_PYTHON"),
        help="an interpreter that has the peers; by default uv makes an environment in build/",
    )
    parser.add_argument("--dir", type=Path, default=BUILD, help="a folder on a real disk (default: build/)")
    args = parser.parse_args()
    args.urls = {kind: getattr(args, kind) for kind in USUAL}
    return args


def refuse_memory(folder: Path) -> None:
    """A flush to a file system in memory costs nothing, and would measure nothing."""
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return
    kinds = {line.split()[1]: line.split()[2] for line in mounts.read_text().splitlines()}
    mounted = next(str(part) for part in (folder.resolve(), *folder.resolve().parents) if str(part) in kinds)
    if kinds[mounted] in MEMORY_FILE_SYSTEMS:
        raise SystemExit(f"{folder} is in memory ({kinds[mounted]}): give a folder on a disk with --dir")


def sync_peers() -> str:
    """An environment of the peers' own, so that their requirements don't meet Romancy's."""
    folder = BUILD / "peers-venv"
    print("bringing the peers' environment up to date …")
    command = ["uv", "sync", "--quiet", "--no-default-groups", "--group", "peers"]
    subprocess.run(command, cwd=HERE.parent, env=os.environ | {"UV_PROJECT_ENVIRONMENT": str(folder)}, check=True)
    return str(folder / ("Scripts" if os.name == "nt" else "bin") / "python")


def describe_machine(folder: Path) -> Result:
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "sqlite": sqlite3.sqlite_version,
        "fsync_ms": flush_cost_ms(folder),
        "load": round(os.getloadavg()[0], 2),
        "commit": commit(),
        "sources": sources_digest(),
    }


def describe_servers(servers: dict[str, Server]) -> Result:
    """What each server says of itself, or why it is not measured."""
    described: Result = {}
    why_missing: dict[str, str] = {}
    for kind, server in servers.items():
        try:
            described[kind] = server.describe()["server"]
        except (psycopg.Error, pymysql.Error, RuntimeError) as error:
            text = " ".join(str(error).split())
            why_missing[kind] = f"{server} ({text}); say where there is one with --{kind} URL"
    return {"servers": described, "missing": why_missing}


def sources_digest() -> str:
    """Changes whenever Romancy's sources do; a run that spans two versions measures neither."""
    digest = hashlib.sha256()
    for path in sorted((HERE.parent / "src").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def flush_cost_ms(folder: Path) -> float:
    """What it takes to append a page to a file and flush it to the disk; the median."""
    seconds = []
    with (folder / "flush").open("wb", buffering=0) as file:
        for _ in range(FLUSHES):
            started = time.perf_counter()
            file.write(b"\0" * 4096)
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return round(median(seconds) * 1000, 3)


class Runner:
    """Runs one measurement in a fresh process, with a fresh database.

    Args:
        folder: where SQLite's databases go.
        servers: where the others go, by kind.
        peers_python: the peers' interpreter; ``None``: they are left out.
    """

    def __init__(self, folder: Path, servers: dict[str, Server], peers_python: str | None) -> None:
        self._folder = folder
        self._servers = servers
        self._peers_python = peers_python
        # Compiled code is cached, as it is where a library is installed, but not among the sources.
        self._environment = os.environ | {"PYTHONPYCACHEPREFIX": str(BUILD / "bench-pycache")}
        self._environment.pop("PYTHONDONTWRITEBYTECODE", None)

    def can_run(self, system: System) -> bool:
        return self._peers_python is not None or system not in PEERS

    def run(self, case: Case, system: System) -> Result:
        """The JSON object that the measurement prints, or ``{"error": …}``; and how long it took in all."""
        server = None if case.on is None else self._servers.get(case.on)
        started = time.perf_counter()
        with contextlib.ExitStack() as stack:
            url = "" if server is None else stack.enter_context(server.fresh_database())
            result = self._run(system, case.commands[system], url)
        return result | {"job_seconds": round(time.perf_counter() - started, 1)}

    def _run(self, system: System, command: list[str], url: str) -> Result:
        python = self._peers_python if system in PEERS else sys.executable
        assert python is not None
        places = {"{dir}": str(self._folder), "{database}": url}
        script, *options = command
        for placeholder, place in places.items():
            options = [option.replace(placeholder, place) for option in options]
        try:
            done = subprocess.run(
                [python, str(HERE / script), *options],
                capture_output=True, text=True, timeout=JOB_TIMEOUT_S, env=self._environment, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"error": f"no end within {JOB_TIMEOUT_S} s"}
        if done.returncode != 0:
            return {"error": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}
        result: Result = json.loads(done.stdout.splitlines()[-1])
        return result


Job = tuple[Case, System, int]


def schedule(chosen: list[Case], runs: int, runner: Runner) -> Iterator[list[Job]]:
    """Case by case; within a case the systems take turns, so that a noisy minute hits all of them.

    What is in one list runs side by side: those that need no processor.
    """
    for case in chosen:
        if not case.is_quiet:
            yield from ([job] for job in turns([case], runs, runner))
    quiet = list(turns([case for case in chosen if case.is_quiet], runs, runner))
    for turn in range(runs):
        if side_by_side := [job for job in quiet if job[2] == turn]:
            yield side_by_side


def turns(some: list[Case], runs: int, runner: Runner) -> Iterator[Job]:
    for case in some:
        for turn in range(runs):
            for system in case.commands:
                if turn < case.runs(system, runs) and runner.can_run(system):
                    yield case, system, turn


def run_all(chosen: list[Case], runs: int, runner: Runner) -> Raw:
    raw: Raw = {}
    groups = list(schedule(chosen, runs, runner))
    count, number, started = sum(map(len, groups)), 0, time.perf_counter()
    with ThreadPoolExecutor(max(map(len, groups), default=1)) as threads:
        for group in groups:
            for (case, system, turn), result in zip(
                group, threads.map(lambda job: runner.run(job[0], job[1]), group), strict=True
            ):
                number += 1
                raw.setdefault(case.key, {}).setdefault(system, []).append(result)
                minutes, seconds = divmod(round(time.perf_counter() - started), 60)
                said = f"FAILED: {result['error']}" if "error" in result else f"{result['job_seconds']} s"
                head = f"[{number}/{count} {minutes}:{seconds:02}]"
                print(f"{head} {case.key}: {system}, run {turn + 1}: {said}", flush=True)
    return raw


def save(record: dict[str, Any], raw: Raw, table: str, *, is_complete: bool) -> None:
    """Keep the raw numbers; the tables too, if they are of all works and databases in full size."""
    RESULTS.mkdir(exist_ok=True)
    name = record["date"][:19].replace(":", "") + ".json"
    (RESULTS / name).write_text(json.dumps(record | {"results": raw}, indent=1) + "\n")
    if is_complete:
        (RESULTS / "latest.md").write_text(table)


if __name__ == "__main__":
    main()
