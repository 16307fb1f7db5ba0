"""A process killed with -9 at commit after commit, whose workflows send, wait, have children, undo and recur."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path
from typing import Any

from tests.crash.fork import with_mail
from tests.crash.test_kill import FRESH
from tests.databases import Database, rows
from tests.ledger import create_ledger

FOUND = ["a question, answered", {"of": "k"}, 5, "failed", "helped the-one", 7, "nothing"]
ENTRIES = ["hold room 1", "hold room 2", "ping k", "release room 1", "release room 2"]
EMPTY = ("waits", "mail", "deliveries", "subscriptions")


def run(database: Database, when: str, at: int) -> tuple[int, list[Any] | None]:
    receiver, sender = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=with_mail, args=(database, when, at, sender))
    process.start()
    sender.close()
    process.join(50)
    code = process.exitcode
    assert code in (0, -signal.SIGKILL), code
    return code, receiver.recv() if code == 0 else None


def test_killed_after_each_commit(database: Database) -> None:
    kill_until_it_is_through(database, "after", 1)


def test_killed_before_each_second_commit(tmp_path: Path) -> None:
    kill_until_it_is_through(tmp_path / "romancy.db", "before", 2)


def kill_until_it_is_through(database: Database, when: str, at: int) -> None:
    create_ledger(database)
    kills, code, found = 0, -1, None
    while code != 0:
        code, found = run(database, when, at)
        kills += code != 0
        assert kills < 100
    assert found == FOUND
    assert kills > 15
    assert sorted(token for (token,) in rows(database, "SELECT token FROM ledger")) == ENTRIES
    assert [rows(database, f"SELECT count(*) FROM romancy_{name}") for name in EMPTY] == [[(0,)]] * len(EMPTY)
    statuses = rows(database, "SELECT instance_id, run, status FROM romancy_instances ORDER BY instance_id")
    assert statuses == [("helper", 1, "completed"), ("the-one", 2, "completed"), ("the-one/child:2", 1, "failed")]
    events = rows(database, "SELECT instance_id, run, operation_id, kind FROM romancy_history WHERE operation_id <> ''")
    outcomes = Counter((instance_id, run, operation_id) for instance_id, run, operation_id, _ in events)
    assert {key: count for key, count in outcomes.items() if count != 1} == {}
    # Each thing that was sent, received or begun is there once.
    kinds = Counter(kind for *_, kind in events)
    assert kinds == {
        "ActivityCompleted": 4,
        "ActivityFailed": 1,
        "ChannelMessageReceived": 3,
        "ChannelMessageSent": 2,
        "ChannelSubscribed": 1,
        "ChildEnded": 2,
        "ChildStarted": 2,
        "CompensationExecuted": 2,
        "EventReceived": 2,
        "EventSent": 1,
        "TimerExpired": 1,
    }
