"""The checker of the torture sees each kind of broken promise in fabricated evidence; none where all is well."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torture.checker import check
from torture.evidence import EventRow, Evidence, InstanceRow, Stranger, complaints_in
from torture.jobs import KINDS, Job, expected_of_job, job_of

SEED = 7


def job(kind: str, *, suits: Any = lambda job: True) -> Job:
    """The first job of a kind."""
    return next(
        found
        for found in (job_of(SEED, number) for number in range(5_000))
        if found.starts[0].instance_id.startswith(f"{kind}-") and suits(found)
    )


def ended(name: str, workflow: str, result: Any, status: str = "completed", run: int = 1) -> InstanceRow:
    return InstanceRow(name, run, workflow, status, None, json.dumps(result), None, 1)


def done(name: str, seq: int, activity: str, **fields: Any) -> EventRow:
    event = EventRow(name, 1, seq, "ActivityCompleted", f"{activity}:{seq}", activity, 1, "{}", "0")
    return replace(event, **fields)


def received(name: str, seq: int, mail_id: str, channel: str = "market") -> EventRow:
    body = json.dumps([[mail_id, channel, None, 0], {}, 1])
    return EventRow(name, 1, seq, "ChannelMessageReceived", f"message:{seq}", channel, 0, None, body)


def undo(name: str, seq: int, number: int) -> EventRow:
    token = {"operation_id": f"give_back:{seq}", "input": json.dumps({"number": number})}
    return done(name, seq, "give_back", kind="CompensationExecuted", **token)


def take(name: str, seq: int, number: int) -> EventRow:
    return done(name, seq, "take", input=json.dumps({"number": number}))


def whole(name: str, workflow: str, result: Any, *events: EventRow, status: str = "completed", **more: Any) -> Evidence:
    """Evidence of one instance, in which each activity has left what it should."""
    tokens = [event.token for event in events if event.kind in ("ActivityCompleted", "CompensationExecuted")]
    return replace(
        Evidence([ended(name, workflow, result, status)], list(events), ledger=list(tokens), lines=list(tokens)), **more
    )


def rules(evidence: Evidence) -> set[str]:
    return {violation.rule for violation in check(evidence, SEED)}


A_JOB = job("sequence")
(A_START,) = A_JOB.starts
NAME = A_START.instance_id
RIGHT = expected_of_job(A_JOB)[NAME].result
TOLD = [
    {"what": "start", "id": NAME, "workflow": "sequence", "arguments": A_START.arguments},
    {"what": "result", "id": NAME, "status": "completed", "result": RIGHT},
    {"what": "done", "job": A_JOB.number},
]
GOOD = whole(NAME, "sequence", RIGHT, done(NAME, 1, "add"), done(NAME, 2, "add"), acknowledged=TOLD)
SAGA = ("saga-x", "saga", None)
TAKEN = (take("saga-x", 1, 0), take("saga-x", 2, 2), take("saga-x", 3, 10))


def test_evidence_without_faults_has_no_violations() -> None:
    assert rules(GOOD) == set()
    undone = (undo("saga-x", 4, 10), undo("saga-x", 5, 2), undo("saga-x", 6, 0))
    assert rules(whole(*SAGA, *TAKEN, *undone, status="failed")) == set()


@pytest.mark.parametrize(
    ("evidence", "rule"),
    [
        pytest.param(replace(GOOD, ledger=[*GOOD.ledger, GOOD.ledger[0]]), "effect", id="doubled effect"),
        pytest.param(replace(GOOD, ledger=GOOD.ledger[1:]), "effect", id="missing effect"),
        pytest.param(replace(GOOD, ledger=[*GOOD.ledger, f"{NAME}/1/add:9"]), "effect", id="effect without outcome"),
        pytest.param(replace(GOOD, lines=GOOD.lines[1:]), "effect", id="outcome without attempt"),
        pytest.param(
            replace(GOOD, history=[replace(GOOD.history[0], kind="ActivityFailed"), GOOD.history[1]]),
            "effect",
            id="effect of a failed activity",
        ),
        pytest.param(
            replace(GOOD, history=[*GOOD.history, replace(GOOD.history[0], seq=3)]), "outcome", id="two outcomes"
        ),
        pytest.param(
            whole(
                "c", "consumer", [1], received("c", 1, "m"), replace(received("c", 2, "m"), operation_id="message:1",
                kind="MessageTimeout", result=None),
            ),
            "outcome",
            id="message and timeout",
        ),
        pytest.param(
            replace(GOOD, history=[replace(GOOD.history[0], attempt=3), *GOOD.history[1:]]),
            "attempts",
            id="attempts lost",
        ),
        pytest.param(replace(GOOD, strangers=[Stranger(NAME, 1, 1, 11, 12)]), "fence", id="written by a zombie"),
        pytest.param(
            whole("c", "consumer", [1, 1], received("c", 1, "m"), received("c", 2, "m")),
            "delivery",
            id="received twice",
        ),
        pytest.param(
            whole("c", "consumer", [1], received("c", 1, "m"), received("d", 1, "m")), "delivery", id="two consumers"
        ),
        pytest.param(replace(GOOD, instances=[]), "start", id="lost start"),
        pytest.param(replace(GOOD, unfinished={NAME: None}), "time", id="never finished"),
        pytest.param(replace(GOOD, unfinished={NAME: 3.0}), "time", id="finished late"),
        pytest.param(
            replace(GOOD, instances=[ended(NAME, "sequence", RIGHT + 1)]), "result", id="wrong result"
        ),
        pytest.param(
            replace(GOOD, instances=[ended(NAME, "sequence", None, "failed")]), "result", id="wrong status"
        ),
        pytest.param(
            replace(GOOD, acknowledged=[TOLD[0], {**TOLD[1], "result": -1}, TOLD[2]]), "result", id="told otherwise"
        ),
        pytest.param(
            replace(GOOD, instances=[replace(GOOD.instances[0], owner="w")]), "ending", id="ended and still owned"
        ),
        pytest.param(replace(GOOD, complaints=["worker-1: unforeseen"]), "log", id="complaint in a log"),
        pytest.param(
            whole(*SAGA, *TAKEN, undo("saga-x", 4, 0), undo("saga-x", 5, 2), undo("saga-x", 6, 10), status="failed"),
            "compensation",
            id="undone in the wrong order",
        ),
        pytest.param(
            whole(*SAGA, *TAKEN, undo("saga-x", 4, 10), undo("saga-x", 5, 2), status="failed"),
            "compensation",
            id="not all undone",
        ),
        pytest.param(
            whole(*SAGA, *TAKEN, *(undo("saga-x", 4 + n, number) for n, number in enumerate((10, 2, 2, 0))),
                  status="failed"),
            "compensation",
            id="undone twice",
        ),
        pytest.param(
            whole(*SAGA, *TAKEN, undo("saga-x", 4, 10), status="completed"), "compensation", id="undone without need"
        ),
    ],
)  # fmt: skip
def test_planted_violation_is_seen(evidence: Evidence, rule: str) -> None:
    assert rule in rules(evidence)


BROKEN = job("broken", suits=lambda found: not found.forkings and any(r.level for r in found.retryings))
(BROKEN_START,) = BROKEN.starts
BROKE = BROKEN_START.instance_id
BROKEN_END = expected_of_job(BROKEN)[BROKE]
RETRY = {"what": "retry", "id": BROKE}


def row(seq: int, kind: str, operation_id: str | None = None, **fields: Any) -> EventRow:
    name = None if operation_id is None else operation_id.partition(":")[0]
    return replace(EventRow(BROKE, 1, seq, kind, operation_id, name, int(name is not None), "{}"), **fields)


AGAIN = (
    row(1, "ActivityCompleted", "add:1", result="1"),
    row(2, "ActivityRetryScheduled", "strain:1", result="5", error="{}"),
    row(3, "Superseded", "strain:1", attempt=2, error="{}"),
    row(4, "Superseded", "complain:1", result="null"),
    row(5, "Superseded", error="{}"),
    row(6, "WorkflowRetried"),
    row(7, "ActivityCompleted", "strain:1", result="0"),
    row(8, "ActivityCompleted", "add:2", result="2"),
)
"""An instance that has failed after a step, complained, and was retried."""
RAN = Counter({"add:1": 1, "strain:1": 3, "complain:1": 1, "add:2": 1})
BOOKED = Counter({"add:1": 1, "strain:1": 1, "complain:1": 1, "add:2": 1})


def retried(
    *events: EventRow, ran: Counter[str] = RAN, booked: Counter[str] = BOOKED, more: Any = (RETRY,), **end: Any
) -> Evidence:
    """Evidence of that instance: its history, the runs of its activities, and what they have booked."""
    wanted = BROKEN_END
    error = json.dumps({"message": wanted.reason}) if wanted.status == "failed" else None
    instance = replace(ended(BROKE, "broken", wanted.result, wanted.status), error=error)
    return Evidence(
        [replace(instance, **end)],
        list(events),
        ledger=[f"{BROKE}/1/{call}" for call in booked.elements()],
        lines=[f"{BROKE}/1/{call}" for call in ran.elements()],
        acknowledged=[*more, {"what": "done", "job": BROKEN.number}],
    )


def without(number: int) -> tuple[EventRow, ...]:
    return AGAIN[:number] + AGAIN[number + 1 :]


def with_row(number: int, **fields: Any) -> tuple[EventRow, ...]:
    return (*AGAIN[:number], replace(AGAIN[number], **fields), *AGAIN[number + 1 :])


def test_retried_instance_without_faults_has_no_violations() -> None:
    assert rules(retried(*AGAIN)) == set()
    complaint_again = Counter({"complain:1": 1})
    twice = (*AGAIN[:6], row(7, "Superseded", "complain:1", result="null"), row(8, "WorkflowRetried"))
    ran = Counter({"add:1": 1, "strain:1": 2, "complain:1": 2})
    booked = Counter({"add:1": 1, "complain:1": 1}) + complaint_again
    assert rules(retried(*twice, ran=ran, booked=booked)) == set()


@pytest.mark.parametrize(
    ("evidence", "rule"),
    [
        pytest.param(retried(*AGAIN, booked=BOOKED + Counter({"add:1": 1})), "effect", id="step done again"),
        pytest.param(retried(*AGAIN, booked=BOOKED + Counter({"strain:1": 1})), "effect", id="failed effect kept"),
        pytest.param(retried(*AGAIN, booked=BOOKED - Counter({"complain:1": 1})), "effect", id="effect taken back"),
        pytest.param(retried(*AGAIN, ran=RAN - Counter({"strain:1": 2})), "effect", id="outcome without an attempt"),
        pytest.param(retried(*with_row(6, attempt=3)), "attempts", id="attempts go on over the retry"),
        pytest.param(
            retried(*with_row(0, kind="Superseded"), row(9, "ActivityCompleted", "add:1", result="1"),
                    ran=RAN + Counter({"add:1": 1}), booked=BOOKED + Counter({"add:1": 1})),
            "retry", id="step taken back",
        ),
        pytest.param(retried(*without(5)), "retry", id="retry lost"),
        pytest.param(retried(*AGAIN, more=(RETRY, RETRY)), "retry", id="second retry lost"),
        pytest.param(
            retried(*AGAIN, row(9, "CompensationExecuted", "give_back:1", input='{"number": 1}'),
                    ran=RAN + Counter({"give_back:1": 1}), booked=BOOKED + Counter({"give_back:1": 1})),
            "retry", id="compensated and retried",
        ),
        pytest.param(retried(*AGAIN, status="cancelled"), "result", id="ended otherwise"),
        pytest.param(
            replace(GOOD, acknowledged=[*TOLD, {"what": "rest", "id": NAME, "before": ["suspended", 3],
                                               "after": ["suspended", 4]}]),
            "rest", id="recorded while suspended",
        ),
        pytest.param(
            replace(GOOD, acknowledged=[*TOLD, {"what": "rest", "id": NAME, "before": ["suspended", 3],
                                               "after": ["running", 3]}]),
            "rest", id="woken while suspended",
        ),
    ],
)  # fmt: skip
def test_planted_violation_of_a_rest_or_a_retry_is_seen(evidence: Evidence, rule: str) -> None:
    assert rule in rules(evidence)


def test_failure_for_another_reason_is_seen() -> None:
    hopeless = job("broken", suits=lambda found: expected_of_job(found)[found.starts[0].instance_id].status == "failed")
    name = hopeless.starts[0].instance_id
    rows = [
        replace(ended(start, "broken", None, "failed"), error=json.dumps(wanted.reason))
        for start, wanted in expected_of_job(hopeless).items()
    ]
    told = [{"what": "done", "job": hopeless.number}]
    assert rules(Evidence(rows, acknowledged=told)) == set()
    others = [replace(found, error='"another"') if found.instance_id == name else found for found in rows]
    assert rules(Evidence(others, acknowledged=told)) == {"result"}


FORK = "line-x fork"
ORIGIN = json.dumps({"from": "line-x", "run": 1, "activity": "add:2"})
SOURCE = (done("line-x", 1, "add", operation_id="add:1"), done("line-x", 2, "add", operation_id="add:2"))
FORKED = (
    replace(SOURCE[0], instance_id=FORK),
    EventRow(FORK, 1, 2, "WorkflowForked", None, None, 0, ORIGIN),
    replace(SOURCE[1], instance_id=FORK, seq=3),
)
FORKING = {"what": "fork", "id": FORK, "source": "line-x", "activity": "add:2"}


def forked(*events: EventRow, result: int = 5, **more: Any) -> Evidence:
    tokens = [*(event.token for event in SOURCE), f"{FORK}/1/add:2"]
    found = Evidence(
        [ended("line-x", "line", 5), ended(FORK, "line", result)],
        [*events, *SOURCE],
        ledger=tokens,
        lines=tokens,
        acknowledged=[FORKING],
    )
    return replace(found, **more)


def test_fork_that_is_not_what_it_should_be_is_seen() -> None:
    good = forked(*FORKED)
    assert rules(good) == set()
    assert rules(replace(good, instances=good.instances[:1], history=list(SOURCE))) >= {"fork"}
    assert rules(forked(replace(FORKED[0], result="9"), *FORKED[1:])) == {"fork"}
    assert rules(forked(*FORKED[1:])) == {"fork"}
    assert rules(forked(*FORKED, result=6)) == {"fork"}
    # What lies before the call was not done again; what comes after it was, once.
    assert rules(replace(good, ledger=[*good.ledger, f"{FORK}/1/add:1"])) == {"effect"}
    assert rules(replace(good, ledger=good.ledger[:-1])) == {"effect"}
    assert rules(replace(good, ledger=[*good.ledger, good.ledger[-1]])) == {"effect"}


def test_patch_that_has_changed_its_answer_is_seen() -> None:
    def went(*names: str, patches: str | None) -> set[str]:
        events = [done("changing-x", seq, name) for seq, name in enumerate(names, 1)]
        found = whole("changing-x", "changing", 5, *events)
        return rules(replace(found, ledger=[e.token for e in events if e.name != "add_unbooked"],
                             instances=[replace(found.instances[0], patches=patches)]))  # fmt: skip

    assert went("add", "add_in_thread", "add_in_thread", patches='["in thread"]') == set()
    assert went("add", "add_unbooked", "add_unbooked", patches=None) == set()
    assert went("add", "add_in_thread", "add_unbooked", patches='["in thread"]') == {"patch"}
    assert went("add", "add_unbooked", "add_in_thread", patches='["in thread"]') == {"patch"}
    assert went("add", "add_in_thread", "add_in_thread", patches=None) == {"patch"}


def test_messages_that_no_consumer_got_or_two_got_are_seen() -> None:
    market = job("market", suits=lambda found: sum(s.workflow == "consumer" for s in found.starts) > 1)
    consumers = [start for start in market.starts if start.workflow == "consumer"]
    numbers = iter(range(100))
    shares = {start.instance_id: [next(numbers) for _ in range(start.arguments[1])] for start in consumers}
    rows = [
        ended(start.instance_id, "producer", start.arguments[2]) for start in market.starts if start not in consumers
    ]
    acknowledged = [{"what": "done", "job": market.number}]

    def rules_with(shares: dict[str, list[int]]) -> set[str]:
        instances = [*rows, *(ended(name, "consumer", share) for name, share in shares.items())]
        return rules(Evidence(instances, acknowledged=acknowledged))

    assert rules_with(shares) == set()
    first = consumers[0].instance_id
    last = consumers[-1].instance_id
    for name in (first, last):
        assert rules_with({**shares, name: shares[name][:-1]}) == {"result"}
    assert rules_with({**shares, first: [*shares[first][:-1], shares[consumers[1].instance_id][0]]}) == {"result"}


def test_listener_that_has_missed_a_message_is_seen() -> None:
    crowd = job("crowd", suits=lambda found: found.starts[0].arguments[1] > 1)
    (start,) = crowd.starts
    _, count = start.arguments
    told = [{"what": "start", "id": start.instance_id, "workflow": "crowd", "arguments": start.arguments}]
    parent = ended(start.instance_id, "crowd", expected_of_job(crowd)[start.instance_id].result)
    for child_id in (f"{start.instance_id}/child:1", f"{start.instance_id} child 1"):
        whole_share = ended(child_id, "listener", list(range(count)))
        assert rules(Evidence([parent, whole_share], acknowledged=told)) == set()
        part = ended(child_id, "listener", list(range(1, count)))
        assert rules(Evidence([parent, part], acknowledged=told)) == {"result"}


def test_each_kind_of_job_comes_up_and_is_the_same_for_the_same_seed() -> None:
    for kind in KINDS:
        found = job(kind)
        assert found == job_of(SEED, found.number)
        is_all_known = len(expected_of_job(found)) == len(found.starts) + (kind == "broken") * len(found.forkings)
        assert is_all_known or kind in ("market", "line", "rest")


def test_complaints_in_logs_are_found_but_for_what_others_say(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    log.write_text(
        "2026-01-01 00:00:00 1 INFO romancy.worker all is well\n"
        "2026-01-01 00:00:01 1 ERROR romancy.storage a flush failed in an unforeseen way\n"
        "Traceback (most recent call last):\n"
        "2026-01-01 00:00:02 1 ERROR asyncio Task was destroyed but it is pending!\n"
        "task: <Task pending coro=<AsyncAdapt_aiosqlite_connection._terminate_graceful_close()>>\n"
        "2026-01-01 00:00:03 1 ERROR asyncio Task was destroyed but it is pending!\n"
        "task: <Task pending coro=<Worker._look_for_work()>>\n"
        "2026-01-01 00:00:04 1 ERROR romancy.engine instance changing-1 of workflow changing is suspended: instance "
        "changing-1: the history expects A, the code has B. Restore code\n"
        "2026-01-01 00:00:05 1 ERROR romancy.engine instance fan-1 of workflow fan is suspended: instance "
        "fan-1: the history expects A, the code has B. Restore code\n"
        "2026-01-01 00:00:06 1 ERROR romancy.engine instance changing-1 of workflow changing is suspended: poison\n"
    )
    found = complaints_in(log)
    assert [entry[18:19] for entry in found] == ["1", "3", "5", "6"]
    assert "Traceback" in found[0]
    assert complaints_in(tmp_path / "none.log") == []


def test_complaint_tells_how_a_long_entry_ends(tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    frames = "".join(f'  File "a.py", line {number}\n' for number in range(1, 60))
    log.write_text(
        "2026-01-01 00:00:01 1 ERROR romancy.engine an ending failed in an unforeseen way\n"
        f"Traceback (most recent call last):\n{frames}ValueError: this and that\n"
        "2026-01-01 00:00:02 1 INFO romancy.worker all is well\n"
    )
    (found,) = complaints_in(log)
    lines = [line.strip() for line in found.split("\n")]
    assert "an ending failed" in lines[0]
    assert lines[1] == "…"
    assert lines[-2:] == ['File "a.py", line 59', "ValueError: this and that"]
