"""What is measured: the cases, the command of each system, the lines of the table and the goals."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from databases import KINDS, Kind

ROMANCY = "romancy_works.py"
WORKER_PROCESSES = "romancy_workers.py"
MESSAGES = "romancy_messages.py"
FLOOR = "floor.py"
DBOS = "peers/dbos_peer.py"
EDDA = "peers/edda_peer.py"
FOOTPRINT = "footprint.py"
ALL_RUNS = 1_000

PEER_RUNS = 3
WORKERS = (1, 2, 4)

System = Literal["romancy", "floor", "dbos", "edda"]
SYSTEMS: tuple[System, ...] = ("romancy", "floor", "dbos", "edda")
PEERS: tuple[System, ...] = ("dbos", "edda")
WHERE: dict[System, tuple[Kind, ...]] = {"dbos": ("sqlite", "postgresql"), "edda": KINDS}
"""The databases that the peers support."""


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
        on: the kind of database; ``None``: it needs none.
        name: its name within the database's raw results.
        commands: script and options by system; ``{dir}`` stands for the folder of the databases, ``{database}`` for
            the URL of an empty one on a server.
        most_runs: for cases that take long.
        is_quiet: it waits, and needs no more than a moment of a processor: such cases may run side by side.
    """

    work: str
    on: Kind | None
    name: str
    commands: dict[System, list[str]]
    lines: tuple[Line, ...]
    most_runs: int = ALL_RUNS
    is_quiet: bool = False

    @property
    def key(self) -> str:
        """Its name in the raw results."""
        return self.name if self.on is None else f"{self.on}-{self.name}"

    def runs(self, system: System, wanted: int) -> int:
        """How often this system is measured; the peers are so slow, and so far away, that few runs will do."""
        return min(wanted, self.most_runs, PEER_RUNS if system in PEERS else ALL_RUNS)


def command(script: str, work: str, on: Kind = "sqlite", **options: object) -> list[str]:
    """``command("floor.py", "latency", count=5)`` as a list of arguments."""
    listed = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [script, work, *listed, *(("--dir", "{dir}") if on == "sqlite" else ("--database", "{database}"))]


def cases(*, is_quick: bool) -> list[Case]:
    """All that is measured, in the order of the tables."""

    def size(full: int, quick: int) -> int:
        return quick if is_quick else full

    found = []
    for on in KINDS:
        found += [*throughput(size, on), *latency(size, on)]
        if on == "sqlite":
            found += [*replay(size), growth(size), *memory(size), sleepers(size)]
        else:
            found += [sessions(size, on), *workers(size, on)]
        found += [*messages(size, on), restart(on), idle(size, on)]
    return [*found, footprint()]


Size = Callable[[int, int], int]


def throughput(size: Size, on: Kind) -> list[Case]:
    """The peers gain little from more than 64 workflows at a time; each one's best is compared."""
    found = []
    for concurrency in (1, 64, 512, 1_000) if on == "sqlite" else (1, 64, 128, 256, 512):
        count = size(500, 100) if concurrency == 1 else size(10_000, 2_000)
        few = size(200, 64)
        options = {"concurrency": concurrency, "count": count}
        commands: dict[System, list[str]] = {
            "romancy": command(ROMANCY, "throughput", on, **options),
            "floor": command(FLOOR, "throughput", on, **options),
        }
        if concurrency in (64, 512) and on in WHERE["dbos"]:
            commands["dbos"] = command(DBOS, "throughput", on, concurrency=concurrency, count=few)
        if concurrency == 64:
            commands["edda"] = command(EDDA, "throughput", on, concurrency=concurrency, count=few)
        line = Line(f"3 activities, {concurrency} at a time", "workflows_per_s", "workflows/s")
        found.append(Case("throughput", on, f"throughput-{concurrency}", commands, (line,)))
    return found


THROUGHPUT_GOALS: dict[Kind, tuple[Goal, ...]] = {
    "sqlite": (Goal("≥", 0.5, "floor"), Goal("≥", 50, "dbos")),
    "postgresql": (Goal("≥", 0.5, "floor"), Goal("≥", 30, "dbos")),
    "mysql": (Goal("≥", 0.5, "floor"), Goal("≥", 40, "edda")),
}
LINEAR_GOAL = Goal("≤", 1.2)
NO_LOSS_GOAL = Goal("≥", 1)


def latency(size: Size, on: Kind) -> list[Case]:
    """There is no goal for MySQL and MariaDB."""
    found = []
    for activities, full, few in ((1, 500, 60), (10, 200, 30)):
        mine = {"activities": activities, "count": size(full, 50)}
        theirs = {"activities": activities, "count": size(few, 20)}
        commands: dict[System, list[str]] = {
            "romancy": command(ROMANCY, "latency", on, **mine),
            "floor": command(FLOOR, "latency", on, **mine),
            "edda": command(EDDA, "latency", on, **theirs),
        }
        if on in WHERE["dbos"]:
            commands["dbos"] = command(DBOS, "latency", on, **theirs)
        title = "start → result, 1 activity" if activities == 1 else f"start → result, {activities} activities"
        lines = (
            Line(f"{title}, p50", "p50_ms", "ms", () if on == "mysql" else (Goal("≤", 2, "floor"),)),
            Line(f"{title}, p95", "p95_ms", "ms"),
            Line(f"{title}, p99", "p99_ms", "ms"),
        )
        found.append(Case("latency", on, f"latency-{activities}", commands, lines))
    return found


def sessions(size: Size, on: Kind) -> Case:
    goals = (Goal("≥", 0.4, "floor"),) if on == "postgresql" else ()
    options = {"concurrency": 64, "count": size(4_000, 500)}
    commands: dict[System, list[str]] = {
        "romancy": command(ROMANCY, "sessions", on, **options),
        "floor": command(FLOOR, "sessions", on, **options),
    }
    line = Line("activity with a session, 64 at a time", "workflows_per_s", "workflows/s", goals)
    return Case("sessions", on, "sessions", commands, (line,))


def workers(size: Size, on: Kind) -> list[Case]:
    """Instances stored beforehand, and while the workers run."""
    found = []
    for work, title in (("drain", "stored before"), ("feed", "stored meanwhile")):
        for number in WORKERS:
            heading = f"{number} worker process{'es' if number > 1 else ''}, {title}"
            lines = (
                Line(heading, "workflows_per_s", "workflows/s"),
                Line(f"{heading}: cores in use", "cores", "cores"),
                Line(f"{heading}: of these by the server", "cores_of_server", "cores"),
            )
            options = {"workers": number, "count": size(6_000, 1_000)}
            commands: dict[System, list[str]] = {"romancy": command(WORKER_PROCESSES, work, on, **options)}
            found.append(Case("workers", on, f"{work}-{number}", commands, lines, most_runs=3))
    return found


def messages(size: Size, on: Kind) -> list[Case]:
    own_goals = {"sqlite": (Goal("≤", 3),), "postgresql": (Goal("≤", 4),), "mysql": ()}
    other_goals = {"sqlite": (Goal("≤", 25),), "postgresql": (Goal("≤", 10),), "mysql": (Goal("≤", 60),)}
    found = []
    idle_s = size(20, 3)
    for sender, whose, goals in (("own", "the same", own_goals[on]), ("other", "another", other_goals[on])):
        title = f"event sent → completed, from {whose} process"
        often = command(MESSAGES, "events", on, sender=sender, count=size(100, 30))
        lines = (Line(f"{title}, p50", "p50_ms", "ms", goals), Line(f"{title}, p99", "p99_ms", "ms"))
        found.append(Case("messages", on, f"event-{sender}", {"romancy": often}, lines, most_runs=3))
        # Those that wait are measured side by side; they shall not all come to their end at the same moment.
        stagger_s = 2 * KINDS.index(on) + (sender == "other")
        once = command(MESSAGES, "events", on, sender=sender, count=1, idle_seconds=idle_s + stagger_s)
        line = Line(f"{title}, after {idle_s} s of idleness", "p50_ms", "ms", goals)
        commands: dict[System, list[str]] = {"romancy": once}
        if sender == "own":
            commands["floor"] = command(FLOOR, "latency", on, count=1, idle_seconds=idle_s + stagger_s)
        found.append(Case("messages", on, f"event-{sender}-idle", commands, (line,), most_runs=3, is_quiet=True))
    many = size(100_000, 2_000)
    lines = (
        Line(
            f"wait for an event that is there, after {many:,} other events ÷ after 10", "kept_ratio", "", (SAME_GOAL,)
        ),
        Line(f"event sent → completed, after {many:,} other events ÷ after 10", "sent_ratio", "", (SAME_GOAL,)),
        Line("events sent and kept, 512 at a time", "events_per_s", "events/s"),
    )
    earlier = command(MESSAGES, "earlier", on, earlier=many, count=size(200, 30))
    children = command(MESSAGES, "children", on, count=size(1_000, 200))
    runs = command(MESSAGES, "runs", on, count=size(10_000, 2_000))
    few = size(1_000, 200)
    last = size(10_000, 2_000)
    run_lines = (
        Line(f"{last:,} runs in a row by recur", "seconds", "s"),
        Line(f"… growth of the process from run 1,000 to {last:,}", "grown_kib", "KiB"),
    )
    return [
        *found,
        Case("messages", on, "earlier", {"romancy": earlier}, lines, most_runs=2),
        Case(
            "messages",
            on,
            "children",
            {"romancy": children},
            (Line(f"{few:,} children gathered", "seconds", "s"),),
            most_runs=3,
        ),
        Case("messages", on, "runs", {"romancy": runs}, run_lines, most_runs=3),
    ]


SAME_GOAL = Goal("≤", 1.2)


def replay(size: Size) -> list[Case]:
    """Romancy's history is recorded once and then resumed many times; the peers record theirs each time."""
    found = []
    for activities in (1_000, 5_000, size(10_000, 5_000)):
        if any(case.name == f"replay-{activities}" for case in found):
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
        found.append(Case("replay", "sqlite", f"replay-{activities}", commands, (line,), most_runs=3))
    return found


def growth(size: Size) -> Case:
    line = Line("time per activity, last tenth of 5,000 ÷ a fresh one", "last_to_first", "", (Goal("≤", 1.1),))
    commands: dict[System, list[str]] = {"romancy": command(ROMANCY, "growth", activities=size(5_000, 2_000))}
    return Case("growth", "sqlite", "growth", commands, (line,), most_runs=3)


def memory(size: Size) -> list[Case]:
    hot = Line("a hot waiting instance", "bytes_per_instance", "bytes", (Goal("≤", 12 * 1024),))
    cold = Line("a cold waiting instance", "bytes_per_instance", "bytes", (Goal("≤", 100),))
    few = size(1_000, 300)
    commands: dict[System, list[str]] = {
        "romancy": command(ROMANCY, "memory", count=size(5_000, 2_000)),
        "dbos": command(DBOS, "memory", count=few),
        "edda": command(EDDA, "memory", count=few),
    }
    cold_command = command(ROMANCY, "memory", count=size(30_000, 5_000), max_hot=500)
    return [
        Case("memory", "sqlite", "memory-hot", commands, (hot,), most_runs=3),
        Case("memory", "sqlite", "memory-cold", {"romancy": cold_command}, (cold,), most_runs=2),
    ]


def restart(on: Kind) -> Case:
    title = "kill -9 with 200 in flight, until all are complete"
    line = Line(title, "seconds", "s", (Goal("≤", 1.75),))
    return Case("restart", on, "restart", {"romancy": command(ROMANCY, "restart", on, count=200)}, (line,), most_runs=3)


def sleepers(size: Size) -> Case:
    count = size(100_000, 5_000)
    lines = (
        Line(f"{count:,} sleepers due within 1 s, until all are woken", "seconds", "s", (Goal("≤", 60),)),
        Line(f"{count:,} sleepers, woken early", "early", "", (Goal("≤", 0),)),
        Line(f"{count:,} sleepers, commits for each start", "commits_per_start", "", (Goal("≤", 1),)),
    )
    commands: dict[System, list[str]] = {"romancy": command(ROMANCY, "sleepers", count=count)}
    return Case("sleepers", "sqlite", "sleepers", commands, lines, most_runs=1)


def idle(size: Size, on: Kind) -> Case:
    line = Line("SQL statements of an idle worker", "statements_per_minute", "/minute", (Goal("≤", 30),))
    commands: dict[System, list[str]] = {"romancy": command(ROMANCY, "idle", on, seconds=size(60, 15))}
    return Case("idle", on, "idle", commands, (line,), most_runs=1, is_quiet=True)


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
    return Case("footprint", None, "footprint", commands, lines, most_runs=3)
