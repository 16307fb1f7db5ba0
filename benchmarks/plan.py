"""What is measured: the cases, the command of each system, the lines of the table and the goals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

ROMANCY = "romancy_works.py"
FLOOR = "floor.py"
DBOS = "peers/dbos_peer.py"
EDDA = "peers/edda_peer.py"
FOOTPRINT = "footprint.py"
ALL_RUNS = 1_000

System = Literal["romancy", "floor", "dbos", "edda"]
SYSTEMS: tuple[System, ...] = ("romancy", "floor", "dbos", "edda")


@dataclass(frozen=True, slots=True)
class Goal:
    """A limit for Romancy's figure, or for its ratio to another system's in the same run.

    Attributes:
        of: whose figure to divide by; ``None``: the limit is for the figure itself.
    """

    relation: Literal["≥", "≤"]
    limit: float
    of: System | None = None

    def is_met(self, figure: float) -> bool:
        """``figure`` is the ratio where the goal is for one."""
        return figure >= self.limit if self.relation == "≥" else figure <= self.limit

    def __str__(self) -> str:
        suffix = "" if self.of is None else f" x {self.of}"
        return f"{self.relation} {self.limit:g}{suffix}"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: one figure out of the results of a case.

    Attributes:
        metric: its name in the results.
        elsewhere: its name in the results of a system that calls it otherwise.
    """

    title: str
    metric: str
    unit: str
    goals: tuple[Goal, ...] = ()
    elsewhere: dict[System, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing that is measured, for each system in a fresh process.

    Attributes:
        work: what ``--only`` calls it.
        key: its name in the raw results.
        commands: script and options by system; ``{dir}`` stands for the folder of the databases.
        most_runs: for cases that take long.
    """

    work: str
    key: str
    commands: dict[System, list[str]]
    lines: tuple[Line, ...]
    most_runs: int = ALL_RUNS


def command(script: str, work: str, **options: object) -> list[str]:
    """``command("floor.py", "latency", count=5)`` as a list of arguments."""
    listed = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [script, work, *listed, "--dir", "{dir}"]


def cases(*, is_quick: bool) -> list[Case]:
    """All that is measured, in the order of the table."""

    def size(full: int, quick: int) -> int:
        return quick if is_quick else full

    return [
        *throughput(size),
        *latency(size),
        *replay(size),
        growth(size),
        *memory(size),
        restart(),
        sleepers(size),
        idle(size),
        footprint(),
    ]


Size = Callable[[int, int], int]


def throughput(size: Size) -> list[Case]:
    """The peers gain little from more than 64 workflows at a time; each one's best is compared."""
    found = []
    for concurrency in (1, 64, 512, 1_000):
        count = size(500, 200) if concurrency == 1 else size(20_000, 5_000)
        few = size(300, 100)
        options = {"concurrency": concurrency, "count": count}
        commands: dict[System, list[str]] = {
            "romancy": command(ROMANCY, "throughput", **options),
            "floor": command(FLOOR, "throughput", **options),
        }
        if concurrency in (64, 512):
            commands["dbos"] = command(DBOS, "throughput", concurrency=concurrency, count=few)
        if concurrency == 64:
            commands["edda"] = command(EDDA, "throughput", concurrency=concurrency, count=few)
        line = Line(f"3 activities, {concurrency} at a time", "workflows_per_s", "workflows/s")
        found.append(Case("throughput", f"throughput-{concurrency}", commands, (line,)))
    return found


THROUGHPUT_GOALS = (Goal("≥", 0.5, "floor"), Goal("≥", 50, "dbos"))
LINEAR_GOAL = Goal("≤", 1.2)


def latency(size: Size) -> list[Case]:
    found = []
    for activities, full, few in ((1, 500, 100), (10, 200, 50)):
        mine = {"activities": activities, "count": size(full, few)}
        theirs = {"activities": activities, "count": size(few, 20)}
        commands: dict[System, list[str]] = {
            "romancy": command(ROMANCY, "latency", **mine),
            "floor": command(FLOOR, "latency", **mine),
            "dbos": command(DBOS, "latency", **theirs),
            "edda": command(EDDA, "latency", **theirs),
        }
        title = "start → result, 1 activity" if activities == 1 else f"start → result, {activities} activities"
        lines = (
            Line(f"{title}, p50", "p50_ms", "ms", (Goal("≤", 2, "floor"),)),
            Line(f"{title}, p95", "p95_ms", "ms"),
            Line(f"{title}, p99", "p99_ms", "ms"),
        )
        found.append(Case("latency", f"latency-{activities}", commands, lines))
    return found


def replay(size: Size) -> list[Case]:
    """Romancy's history is recorded once and then resumed many times; the peers record theirs each time."""
    found = []
    for activities in (1_000, 5_000, size(10_000, 5_000)):
        if any(case.key == f"replay-{activities}" for case in found):
            continue
        kept = f"{{dir}}/recorded-{activities}"
        commands: dict[System, list[str]] = {
            "romancy": command(ROMANCY, "replay", activities=activities, recorded=kept),
            "floor": command(FLOOR, "replay", activities=activities),
        }
        if activities == 1_000:
            commands["dbos"] = command(DBOS, "replay", activities=activities)
            commands["edda"] = command(EDDA, "replay", activities=activities)
        goals = (Goal("≤", 0.5),) if activities == 10_000 else ()
        line = Line(f"replay of {activities:,} activities", "replay_seconds", "s", goals)
        found.append(Case("replay", f"replay-{activities}", commands, (line,), most_runs=5))
    return found


def growth(size: Size) -> Case:
    line = Line("time per activity, last tenth of 5,000 ÷ a fresh one", "last_to_first", "", (Goal("≤", 1.1),))
    commands: dict[System, list[str]] = {"romancy": command(ROMANCY, "growth", activities=size(5_000, 2_000))}
    return Case("growth", "growth", commands, (line,))


def memory(size: Size) -> list[Case]:
    hot = Line("a hot waiting instance", "bytes_per_instance", "bytes", (Goal("≤", 12 * 1024),))
    cold = Line("a cold waiting instance", "bytes_per_instance", "bytes", (Goal("≤", 100),))
    few = size(1_000, 300)
    commands: dict[System, list[str]] = {
        "romancy": command(ROMANCY, "memory", count=size(5_000, 2_000)),
        "dbos": command(DBOS, "memory", count=few),
        "edda": command(EDDA, "memory", count=few),
    }
    cold_command = command(ROMANCY, "memory", count=size(50_000, 5_000), max_hot=500)
    return [
        Case("memory", "memory-hot", commands, (hot,)),
        Case("memory", "memory-cold", {"romancy": cold_command}, (cold,), most_runs=3),
    ]


def restart() -> Case:
    title = "kill -9 with 200 in flight, until all are complete"
    line = Line(title, "seconds", "s", (Goal("≤", 1.75),))
    return Case("restart", "restart", {"romancy": command(ROMANCY, "restart", count=200)}, (line,))


def sleepers(size: Size) -> Case:
    count = size(100_000, 5_000)
    lines = (
        Line(f"{count:,} sleepers due within 1 s, until all are woken", "seconds", "s", (Goal("≤", 60),)),
        Line(f"{count:,} sleepers, woken early", "early", "", (Goal("≤", 0),)),
        Line(f"{count:,} sleepers, commits for each start", "commits_per_start", "", (Goal("≤", 1),)),
    )
    commands: dict[System, list[str]] = {"romancy": command(ROMANCY, "sleepers", count=count)}
    return Case("sleepers", "sleepers", commands, lines, most_runs=3)


def idle(size: Size) -> Case:
    line = Line("SQL statements of an idle worker", "statements_per_minute", "/minute", (Goal("≤", 30),))
    commands: dict[System, list[str]] = {"romancy": command(ROMANCY, "idle", seconds=size(60, 15))}
    return Case("idle", "idle", commands, (line,), most_runs=1)


def footprint() -> Case:
    """Here the floor is SQLAlchemy alone, which all of them need."""
    commands: dict[System, list[str]] = {
        "romancy": [FOOTPRINT, "romancy"],
        "floor": [FOOTPRINT, "sqlalchemy"],
        "dbos": [FOOTPRINT, "dbos"],
        "edda": [FOOTPRINT, "edda-framework", "--module", "edda"],
    }
    lines = (
        Line("import (floor: SQLAlchemy)", "import_seconds", "s", (Goal("≤", 0.5),)),
        Line("installed (floor: SQLAlchemy)", "megabytes", "MB", (Goal("≤", 35),)),
    )
    return Case("footprint", "footprint", commands, lines)
