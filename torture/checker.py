"""The rules of the torture. Pure: evidence in, violations out; each rule is one function."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from torture.evidence import EventRow, Evidence, InstanceRow, decoded
from torture.jobs import Expected, Start, expected, expected_of_job, job_of

UNBOOKED = frozenset({"add_unbooked", "is_early"})
"""Activities that leave no token in the ledger."""

DONE = frozenset({"ActivityCompleted", "CompensationExecuted"})
OUTCOMES = DONE | {"ActivityFailed", "CompensationFailed"}
RECEIPTS = frozenset({"EventReceived", "ChannelMessageReceived"})
TIMEOUTS = frozenset({"EventTimeout", "MessageTimeout"})
ENDED = frozenset({"completed", "failed", "cancelled"})
TAKEN_BACK = frozenset({"strain", "complain", None})
"""What a retry may take back: the activities that failed, what was done for that reason only, and the end."""


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
        rested,
        retried,
        forked,
        patched_for_good,
    )
    found = [violation for rule in rules for violation in rule(evidence)]
    return found + list(results_right(evidence, seed)) + list(results_told(evidence))


def effects_once(evidence: Evidence) -> Iterator[Violation]:
    """A recorded outcome and its row in the ledger come together, once; each outcome has run at least once."""
    rows = Counter(evidence.ledger)
    ran = Counter(evidence.lines)
    recorded: dict[str, list[EventRow]] = defaultdict(list)
    copies = _copies(evidence)
    for event in evidence.history:
        if event.name is None or not (event.kind in OUTCOMES or _is_superseded_outcome(event)):
            continue
        if (event.instance_id, event.seq) not in copies:
            recorded[event.token].append(event)
    for token, events in recorded.items():
        # What a retry has taken back was done all the same, and then once more.
        wanted = sum(_is_done(event) and event.name not in UNBOOKED for event in events)
        if rows[token] != wanted:
            kinds = ", ".join(event.kind for event in events)
            what = f"{token} ({kinds}) has {rows[token]} rows in the ledger instead of {wanted}"
            yield Violation("effect", events[0].instance_id, what)
        if ran[token] < len(events):
            what = f"{token} is recorded {len(events)} times but has run {ran[token]} times"
            yield Violation("effect", events[0].instance_id, what)
    for token in rows.keys() - recorded:
        yield Violation("effect", token.rsplit("/", 2)[0], f"{token} is in the ledger, but no outcome is recorded")


def _is_superseded_outcome(event: EventRow) -> bool:
    # The end of a run has no attempts; an attempt that another one followed has a time as its result.
    return event.kind == "Superseded" and event.attempt > 0 and not (event.error and event.result)


def _is_done(event: EventRow) -> bool:
    return event.kind in DONE or (event.kind == "Superseded" and event.error is None)


def _copies(evidence: Evidence) -> set[tuple[str, int]]:
    """What forks have taken over: instance and ``seq``."""
    cuts = {event.instance_id: event.seq for event in evidence.history if event.kind == "WorkflowForked"}
    return {
        (event.instance_id, event.seq)
        for event in evidence.history
        if event.run == 1 and event.seq < cuts.get(event.instance_id, 0)
    }


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
    """Attempts count up by one, over crashes, too, to the outcome; anew, where a retry has taken that back."""
    seen: Counter[str] = Counter()
    for event in evidence.history:
        if event.attempt and (event.kind in ("ActivityRetryScheduled", "Superseded") or event.kind in OUTCOMES):
            seen[event.token] += 1
            if event.attempt != seen[event.token]:
                what = f"{event.token} ({event.kind}) is attempt {event.attempt} instead of {seen[event.token]}"
                yield Violation("attempts", event.instance_id, what)
            if _is_superseded_outcome(event):
                seen[event.token] = 0


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
    elif wanted.reason not in (instance.error or ""):
        yield Violation("result", instance_id, f"{instance_id} has failed for another reason: {instance.error}")
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


def rested(evidence: Evidence) -> Iterator[Violation]:
    """Nothing is recorded of a suspended instance until its resume."""
    for record in evidence.acknowledged:
        if record["what"] == "rest" and record["after"] != record["before"]:
            what = f"{record['id']} was {record['before']} (status, events) and then {record['after']}, at rest"
            yield Violation("rest", record["id"], what)


def retried(evidence: Evidence) -> Iterator[Violation]:
    """What a retry was acknowledged for is in history; it takes back what failed and what came of that, no more."""
    taken: Counter[str] = Counter(record["id"] for record in evidence.acknowledged if record["what"] == "retry")
    compensated = {event.instance_id for event in evidence.history if event.kind == "CompensationExecuted"}
    there: Counter[str] = Counter()
    for event in evidence.history:
        there[event.instance_id] += event.kind == "WorkflowRetried"
        is_child = str(event.operation_id).startswith("child:")
        if event.kind == "Superseded" and event.name not in TAKEN_BACK and not is_child:
            what = f"{event.token} was done before anything failed, and was taken back"
            yield Violation("retry", event.instance_id, what)
    for instance_id, count in taken.items():
        if there[instance_id] < count:
            what = f"{instance_id} was retried {count} times, of which {there[instance_id]} are recorded"
            yield Violation("retry", instance_id, what)
        if instance_id in compensated:
            yield Violation("retry", instance_id, f"{instance_id} was retried though it is compensated")


def forked(evidence: Evidence) -> Iterator[Violation]:
    """A fork has its source's history up to the call, and the same chances; what comes then is its own."""
    by_instance: dict[str, list[EventRow]] = defaultdict(list)
    for event in evidence.history:
        by_instance[event.instance_id].append(event)
    there = {instance.instance_id: instance for instance in evidence.instances}
    for record in evidence.acknowledged:
        if record["what"] == "fork" and record["id"] not in there:
            yield Violation("fork", "", f"{record['id']} was acknowledged and is lost")
    for marker in [event for event in evidence.history if event.kind == "WorkflowForked"]:
        origin = decoded(marker.input)
        source, fork = there[origin["from"]], there[marker.instance_id]
        of_source = by_instance[source.instance_id]
        yield from _compare_prefix(by_instance[fork.instance_id], marker, of_source, origin["activity"])
        if fork.workflow == "line" and decoded(fork.result) != decoded(source.result):
            what = f"{fork.instance_id} gave {fork.result}, its source {source.result}"
            yield Violation("fork", fork.instance_id, what)


def _compare_prefix(
    events: list[EventRow], marker: EventRow, of_source: list[EventRow], call: str
) -> Iterator[Violation]:
    cut = next((n for n, event in enumerate(of_source) if event.operation_id == call), None)
    if cut is None:
        yield Violation("fork", marker.instance_id, f"{marker.instance_id}: its source has no {call}")
        return
    wanted = [replace(event, instance_id=marker.instance_id) for event in of_source[:cut]]
    found = [event for event in events if event.seq < marker.seq]
    if found != wanted:
        what = f"{marker.instance_id} does not have the history of its source up to {call}"
        yield Violation("fork", marker.instance_id, what)


def patched_for_good(evidence: Evidence) -> Iterator[Violation]:
    """An instance goes one way for good: the newer one only if that is noted."""
    ways: dict[str, list[str]] = defaultdict(list)
    for event in evidence.history:
        if event.kind == "ActivityCompleted" and event.name in ("add_in_thread", "add_unbooked"):
            ways[event.instance_id].append(event.name)
    for instance in evidence.instances:
        if instance.workflow != "changing" or instance.status != "completed":
            continue
        way = ways[instance.instance_id]
        is_noted = "in thread" in (decoded(instance.patches) or ())
        if len(way) != 2 or len(set(way)) != 1 or ("add_in_thread" in way and not is_noted):
            what = f"{instance.instance_id} went {way}, with the patches {instance.patches}"
            yield Violation("patch", instance.instance_id, what)
