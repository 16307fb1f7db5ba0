"""The rules of the torture. Pure: evidence in, violations out; each rule is one function."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torture.evidence import EventRow, Evidence, InstanceRow, decoded
from torture.jobs import Expected, Start, expected, expected_of_job, job_of

UNBOOKED = frozenset({"add_unbooked", "is_early"})
"""Activities that leave no token in the ledger."""

DONE = frozenset({"ActivityCompleted", "CompensationExecuted"})
OUTCOMES = DONE | {"ActivityFailed", "CompensationFailed"}
RECEIPTS = frozenset({"EventReceived", "ChannelMessageReceived"})
TIMEOUTS = frozenset({"EventTimeout", "MessageTimeout"})
ENDED = frozenset({"completed", "failed", "cancelled"})


@dataclass(frozen=True, slots=True)
class Violation:
    """A promise that was not kept.

    Attributes:
        rule: which.
        instance_id: whose history tells more; empty: nobody's.
    """

    rule: str
    instance_id: str
    what: str


def check(evidence: Evidence, seed: int) -> list[Violation]:
    """All violations.

    Args:
        evidence: what the run has left behind.
        seed: of the client's jobs.
    """
    rules: tuple[Callable[[Evidence], Iterable[Violation]], ...] = (
        effects_once,
        one_outcome_each,
        attempts_counted,
        written_by_owners,
        delivered_once,
        undone_in_reverse,
        starts_kept,
        finished_in_time,
        nothing_left,
        no_complaints,
    )
    found = [violation for rule in rules for violation in rule(evidence)]
    return found + list(results_right(evidence, seed)) + list(results_told(evidence))


def effects_once(evidence: Evidence) -> Iterator[Violation]:
    """A recorded outcome and its row in the ledger come together, once; each outcome has run at least once."""
    rows = Counter(evidence.ledger)
    ran = set(evidence.lines)
    recorded: set[str] = set()
    for event in evidence.history:
        if event.kind not in OUTCOMES or event.name is None:
            continue
        token = event.token
        wanted = int(event.kind in DONE and event.name not in UNBOOKED)
        recorded.add(token)
        if rows[token] != wanted:
            what = f"{token} ({event.kind}) has {rows[token]} rows in the ledger instead of {wanted}"
            yield Violation("effect", event.instance_id, what)
        if token not in ran:
            yield Violation("effect", event.instance_id, f"{token} is recorded but has never run")
    for token in rows.keys() - recorded:
        yield Violation("effect", token.rsplit("/", 2)[0], f"{token} is in the ledger, but no outcome is recorded")


def one_outcome_each(evidence: Evidence) -> Iterator[Violation]:
    """An activity, a wait and a timer have one outcome: never two of a kind, never a message and its timeout."""
    kinds = OUTCOMES | RECEIPTS | TIMEOUTS | {"TimerExpired", "ChildEnded"}
    outcomes = defaultdict(list)
    for event in evidence.history:
        if event.kind in kinds:
            outcomes[event.token].append(event)
    for token, events in outcomes.items():
        if len(events) > 1:
            what = f"{token} has {len(events)} outcomes: {', '.join(event.kind for event in events)}"
            yield Violation("outcome", events[0].instance_id, what)


def attempts_counted(evidence: Evidence) -> Iterator[Violation]:
    """Attempts count up by one, over crashes, too, to the outcome."""
    seen: Counter[str] = Counter()
    for event in evidence.history:
        if event.kind == "ActivityRetryScheduled" or event.kind in OUTCOMES:
            seen[event.token] += 1
            if event.attempt != seen[event.token]:
                what = f"{event.token} ({event.kind}) is attempt {event.attempt} instead of {seen[event.token]}"
                yield Violation("attempts", event.instance_id, what)


def written_by_owners(evidence: Evidence) -> Iterator[Violation]:
    """History is written by the living process that owns the instance."""
    for row in evidence.strangers:
        owner = "a dead worker" if row.owner is None or row.owner == row.writer else f"process {row.owner}"
        what = f"event {row.seq} of run {row.run} was written by process {row.writer}; the owner was {owner}"
        yield Violation("fence", row.instance_id, what)


def delivered_once(evidence: Evidence) -> Iterator[Violation]:
    """One event or message is received once; on broadcast channels once by each instance."""
    takers: dict[str, list[EventRow]] = defaultdict(list)
    for event in evidence.history:
        if event.kind in RECEIPTS:
            takers[_mail_id(event)].append(event)
    for mail_id, events in takers.items():
        is_broadcast = str(events[0].name).startswith("news of ") and not str(events[0].name).endswith("-ready")
        by_instance = Counter(event.instance_id for event in events)
        if max(by_instance.values()) > 1 or (len(events) > 1 and not is_broadcast):
            what = f"{mail_id} was received {len(events)} times: {', '.join(event.token for event in events)}"
            yield Violation("delivery", events[0].instance_id, what)


def _mail_id(event: EventRow) -> str:
    attributes = decoded(event.result)[0]
    # CloudEvents are named by source and id; a message by its id.
    return f"{attributes[1]} {attributes[2]}" if event.kind == "EventReceived" else str(attributes[0])


def undone_in_reverse(evidence: Evidence) -> Iterator[Violation]:
    """What was done is undone once, the last first, when the instance has failed or was cancelled; else not at all."""
    by_run: dict[tuple[str, int], list[EventRow]] = defaultdict(list)
    for event in evidence.history:
        by_run[event.instance_id, event.run].append(event)
    for instance in evidence.instances:
        if instance.workflow not in ("saga", "victim") or instance.status not in ENDED:
            continue
        events = by_run[instance.instance_id, instance.run]
        wanted = list(reversed(_to_undo(instance, events))) if instance.status != "completed" else []
        undone = [decoded(event.input)["number"] for event in events if event.kind.startswith("Compensation")]
        if undone != wanted:
            what = f"{instance.instance_id} ({instance.status}) has undone {undone} instead of {wanted}"
            yield Violation("compensation", instance.instance_id, what)


def _to_undo(instance: InstanceRow, events: Iterable[EventRow]) -> list[int]:
    """The numbers of what was done, in the order of their undos' registration."""
    numbers: list[int] = []
    for event in events:
        if event.name == "take" and event.kind == "ActivityCompleted":
            number = decoded(event.input)["number"]
            numbers.append(number)
            if instance.workflow == "saga" and number % 2 and number < 10:
                numbers.append(100 + number)
    return numbers


def starts_kept(evidence: Evidence) -> Iterator[Violation]:
    """What was acknowledged as started is there, as the workflow that was asked for."""
    there = {instance.instance_id: instance for instance in evidence.instances}
    for record in evidence.acknowledged:
        if record["what"] == "start":
            found = there.get(record["id"])
            if found is None:
                yield Violation("start", "", f"{record['id']} was acknowledged and is lost")
            elif found.workflow != record["workflow"]:
                yield Violation("start", record["id"], f"{record['id']} is a {found.workflow}")


def finished_in_time(evidence: Evidence) -> Iterator[Violation]:
    """All has ended soon after the faults stopped."""
    for instance_id, late_s in evidence.unfinished.items():
        how = "not at all" if late_s is None else f"{late_s:.1f} s too late"
        yield Violation("time", instance_id, f"{instance_id} has ended {how}")


def nothing_left(evidence: Evidence) -> Iterator[Violation]:
    """What has ended has no owner."""
    for instance in evidence.instances:
        if instance.status in ENDED and (instance.owner is not None or instance.completed_at is None):
            yield Violation("ending", instance.instance_id, f"{instance.instance_id} is {instance.status}, yet owned")


def no_complaints(evidence: Evidence) -> Iterator[Violation]:
    """The library has met nothing unforeseen."""
    for line in evidence.complaints:
        yield Violation("log", "", line)


def results_right(evidence: Evidence, seed: int) -> Iterator[Violation]:
    """Each result is what follows from the input."""
    there = {instance.instance_id: instance for instance in evidence.instances}
    for number in sorted({record["job"] for record in evidence.acknowledged if record["what"] == "done"}):
        job = job_of(seed, number)
        for instance_id, wanted in expected_of_job(job).items():
            yield from _compare(there.get(instance_id), instance_id, wanted)
        consumers = [start for start in job.starts if start.workflow == "consumer"]
        if consumers:
            yield from _shared_out(there, consumers)
    for instance in evidence.instances:
        if instance.workflow == "listener" and instance.status in ENDED:
            yield from _compare(instance, instance.instance_id, _of_listener(evidence, instance))


def _of_listener(evidence: Evidence, listener: InstanceRow) -> Expected:
    parent_id = listener.instance_id.removesuffix(f" child {listener.instance_id[-1]}").split("/", 1)[0]
    for record in evidence.acknowledged:
        if record["what"] == "start" and record["id"] == parent_id:
            found = expected("listener", ("", record["arguments"][1], ""))
            assert found is not None
            return found
    return Expected("completed", decoded(listener.result))


def _compare(instance: InstanceRow | None, instance_id: str, wanted: Expected) -> Iterator[Violation]:
    if instance is None:
        yield Violation("result", "", f"{instance_id} is not there")
    elif instance.status != wanted.status:
        what = f"{instance_id} is {instance.status} instead of {wanted.status}: {instance.error}"
        yield Violation("result", instance_id, what)
    elif wanted.status == "completed" and decoded(instance.result) != wanted.result:
        what = f"{instance_id} gave {instance.result} instead of {wanted.result}"
        yield Violation("result", instance_id, what)


def _shared_out(there: dict[str, InstanceRow], consumers: list[Start]) -> Iterator[Violation]:
    """What was published on a competing channel has each come to one consumer, and each has got its share."""
    found = [there[start.instance_id] for start in consumers if start.instance_id in there]
    got = sorted(number for instance in found for number in decoded(instance.result) or ())
    total = sum(start.arguments[1] for start in consumers)
    if got != list(range(total)) or any(instance.status != "completed" for instance in found):
        what = f"the consumers of {consumers[0].arguments[0]} have got {got} instead of {total} messages, each once"
        yield Violation("result", consumers[0].instance_id, what)


def results_told(evidence: Evidence) -> Iterator[Violation]:
    """What the client was told is what the database says."""
    there = {instance.instance_id: instance for instance in evidence.instances}
    for record in evidence.acknowledged:
        if record["what"] != "result":
            continue
        found = there.get(record["id"])
        told = (record["status"], record["result"])
        if found is None or told != (found.status, decoded(found.result) if found.status == "completed" else None):
            yield Violation(
                "result", record["id"], f"the client was told {told} of {record['id']}, the database differs"
            )
