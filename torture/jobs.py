"""What the client does, by number and seed, and what must come of it. Pure: no clock, no database, no processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Start:
    """An instance that the client starts: its id, its workflow and its input."""

    instance_id: str
    workflow: str
    arguments: Arguments


@dataclass(frozen=True, slots=True)
class Sending:
    """An event that the client sends, after so many seconds."""

    event_id: str
    key: str
    data: int
    delay_s: float


@dataclass(frozen=True, slots=True)
class Cancelling:
    """An instance that the client cancels, after so many seconds."""

    instance_id: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class Resting:
    """An instance that the client suspends after so many seconds, and resumes when it has been so for so many."""

    instance_id: str
    delay_s: float
    rest_s: float


@dataclass(frozen=True, slots=True)
class Retrying:
    """An instance that the client retries when it has failed, having mended it up to this level."""

    instance_id: str
    level: int


@dataclass(frozen=True, slots=True)
class Forking:
    """An instance that the client forks from this call, after so many seconds."""

    source_id: str
    activity_id: str
    fork_id: str
    delay_s: float


@dataclass(frozen=True, slots=True)
class Job:
    """One unit of the client's work: starts, then what else it asks of the instances; then it waits for all results.

    Attributes:
        retryings: one after the other, and then the forkings.
    """

    number: int
    starts: tuple[Start, ...]
    sendings: tuple[Sending, ...] = ()
    cancellings: tuple[Cancelling, ...] = ()
    restings: tuple[Resting, ...] = ()
    retryings: tuple[Retrying, ...] = ()
    forkings: tuple[Forking, ...] = ()


@dataclass(frozen=True, slots=True)
class Expected:
    """How an instance must end; ``result`` counts for completed ones, and for failed ones a part of the reason."""

    status: str
    result: Any = None
    reason: str = ""


KINDS = (
    "sequence", "fan", "race", "stubborn", "nap", "waiter", "late", "market", "crowd", "saga", "victim", "counter",
    "rest", "broken", "guardian", "line", "changing",
)  # fmt: skip


def job_of(seed: int, number: int) -> Job:
    """The job of this number; the same for the same seed, so that a client that was killed goes on with it."""
    random = Random(f"{seed}/{number}")
    kind = random.choice(KINDS)
    name = f"{kind}-{number}"
    n = random.randrange(1, 1_000)
    match kind:
        case "waiter":
            events = tuple(Sending(f"{name}/{i}", name, n + i, random.uniform(0, 0.3)) for i in range(2))
            return Job(number, (Start(name, "waiter", (name,)),), events)
        case "late":
            return Job(
                number, (Start(name, "late", (name,)),), (Sending(f"{name}/0", name, n, random.uniform(0.1, 0.4)),)
            )
        case "market":
            return Job(number, _market(name, random))
        case "victim":
            return Job(
                number,
                (Start(name, "victim", (random.randrange(4),)),),
                cancellings=(Cancelling(name, random.choice((0, random.uniform(0, 0.4)))),),
                restings=(Resting(name, random.uniform(0, 0.3), 0),) if random.random() < 0.3 else (),
            )
        case "rest":
            workflow = random.choice(("sequence", "fan", "nap", "saga", "counter", "line"))
            rests = [
                Resting(name, random.uniform(0, 0.3), random.uniform(0, 0.6)) for _ in range(random.randrange(1, 3))
            ]
            return Job(number, (Start(name, workflow, _SIMPLE[workflow](n, random)),), restings=tuple(rests))
        case "saga":
            # What is undone can't be retried; to ask for it changes nothing.
            retryings = (Retrying(name, 0),) if random.random() < 0.3 else ()
            return Job(number, (Start(name, kind, _SIMPLE[kind](n, random)),), retryings=retryings)
        case "broken" | "guardian":
            return _broken(number, name, kind, n, random)
        case "line":
            arguments = _SIMPLE[kind](n, random)
            return Job(number, (Start(name, kind, arguments),), forkings=_forks(name, arguments[1], random))
        case _:
            return Job(number, (Start(name, kind, _SIMPLE[kind](n, random)),))


_SIMPLE: dict[str, Callable[[int, Random], Arguments]] = {
    "sequence": lambda n, random: (n, random.randrange(1, 8)),
    "fan": lambda n, random: (n, random.randrange(1, 8)),
    "race": lambda n, random: (n,),
    "stubborn": lambda n, random: (random.randrange(4),),
    "nap": lambda n, random: (random.randrange(1, 5),),
    "crowd": lambda n, random: (random.randrange(1, 4), random.randrange(1, 5)),
    "saga": lambda n, random: (random.randrange(1, 5), random.random() < 0.7),
    "counter": lambda n, random: (n, random.randrange(1, 5)),
    "line": lambda n, random: (n, random.randrange(2, 6)),
    "changing": lambda n, random: (n,),
}


def _broken(number: int, name: str, kind: str, n: int, random: Random) -> Job:
    """Something that must be mended level by level; some retries come too early, and some never."""
    levels, steps = random.randrange(1, 4), random.randrange(4)
    mended = levels if random.random() < 0.8 else random.randrange(levels)
    plan = [level for level in range(1, mended + 1) for _ in range(random.choice((1, 1, 2)))]
    if random.random() < 0.3:
        plan.insert(0, 0)
    forkings: tuple[Forking, ...] = ()
    if kind == "broken" and random.random() < 0.5:
        calls = ["strain:1", "complain:1", f"strain:{min(levels, mended + 1)}"]
        forkings = (Forking(name, random.choice(calls), f"{name} fork", 0),)
    return Job(
        number,
        (Start(name, kind, (n, steps, levels, name)),),
        retryings=tuple(Retrying(name, level) for level in plan),
        forkings=forkings,
    )


def _forks(name: str, steps: int, random: Random) -> tuple[Forking, ...]:
    """A fork at any time, and sometimes a fork of the fork."""
    calls = [*(f"add:{step + 1}" for step in range(steps)), "add_in_thread:1", "add_unbooked:1", "timer:1"]
    first = Forking(name, random.choice(calls), f"{name} fork", random.uniform(0, 0.6))
    if random.random() < 0.7:
        return (first,)
    return (first, Forking(first.fork_id, random.choice(calls), f"{name} fork fork", random.uniform(0, 0.3)))


def _market(name: str, random: Random) -> tuple[Start, ...]:
    """Producers and consumers of one competing channel, in any order; there is as much as is consumed."""
    consumers = [random.randrange(1, 5) for _ in range(random.randrange(1, 4))]
    total = sum(consumers)
    half = random.randrange(total + 1)
    starts = [Start(f"{name}/c{i}", "consumer", (name, count)) for i, count in enumerate(consumers)]
    starts += [
        Start(f"{name}/p{i}", "producer", (name, first, count))
        for i, (first, count) in enumerate(((0, half), (half, total - half)))
    ]
    random.shuffle(starts)
    return tuple(starts)


def expected(workflow: str, arguments: Arguments) -> Expected | None:
    """What must come of an instance; ``None``: of a consumer's result only its length is known, see ``checker``."""
    match workflow, arguments:
        case "sequence", (total, steps):
            result: Any = total + sum(range(steps))
        case "fan", (total, width):
            result = width * total + sum(range(width)) + 2
        case "race", (total,):
            result = 3 * (total + 1) + 4
        case "stubborn", (times,):
            result = [times + 1, "RetryExhaustedError"]
        case "nap", _:
            result = 0
        case "producer", (_, _, count):
            result = count
        case "listener", (_, count, _):
            result = list(range(count))
        case "crowd", (listeners, count):
            result = [list(range(count))] * listeners
        case "saga", (steps, is_doomed):
            if is_doomed:
                return Expected("failed")
            result = steps
        case "victim", _:
            return Expected("cancelled")
        case "counter", (total, left):
            result = total + sum(range(left + 1))
        case "changing", (total,):
            result = total + 111
        case _:
            return None
    return Expected("completed", result)


def expected_of_job(job: Job) -> dict[str, Expected]:
    """What must come of a job's instances, as far as it is known for each alone."""
    known = {}
    for start in job.starts:
        found = expected(start.workflow, start.arguments)
        if start.workflow == "waiter":
            found = Expected("completed", [sending.data for sending in job.sendings])
        elif start.workflow == "late":
            found = Expected("completed", job.sendings[0].data)
        elif start.workflow in ("broken", "guardian"):
            found = _of_broken(start.arguments, max((retrying.level for retrying in job.retryings), default=0))
            known.update({forking.fork_id: found for forking in job.forkings})
        if found is not None:
            known[start.instance_id] = found
    return known


def _of_broken(arguments: Arguments, mended: int) -> Expected:
    total, steps, levels, key = arguments
    if mended < levels:
        return Expected("failed", reason=f"{key} is broken at level {mended + 1}")
    return Expected("completed", total + sum(range(steps)) + sum(range(1, levels + 1)) + 1)
