"""A process killed with -9 at every commit in turn: nothing lost, nothing doubled."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.crash.fork import in_child
from tests.databases import Database, rows
from tests.ledger import create_ledger

# Each child is forked from a process that has imported everything, and holds nothing open.
FRESH = multiprocessing.get_context("forkserver")
FRESH.set_forkserver_preload(["tests.crash.warm"])

LEDGER = ["four", "one", "three", "two"]
FOUND = ["a", "one", "b", "two", "c", "three", 3, "d"]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Where plain activities leave a token, outside any database."""
    return tmp_path / "tokens.txt"


@pytest.fixture(autouse=True)
def _ledger(database: Database) -> None:
    create_ledger(database)


def run(database: Database, tokens: Path, kill: str = "never:0") -> tuple[int, dict[str, Any] | None]:
    """Run the child; returns its exit code and, if it came to the end, what it found."""
    when, _, at = kill.partition(":")
    receiver, sender = FRESH.Pipe(duplex=False)
    process = FRESH.Process(target=in_child, args=(database, tokens, when, int(at), sender))
    process.start()
    sender.close()
    process.join(50)
    code = process.exitcode
    assert code in (0, -signal.SIGKILL), code
    return code, receiver.recv() if code == 0 else None


def check(database: Database, tokens: Path, printed: dict[str, Any], kills: int) -> None:
    """Join result, ledger, history and the file of tokens."""
    assert printed["result"]["found"] == FOUND
    assert sorted(token for (token,) in rows(database, "SELECT token FROM ledger")) == LEDGER
    events = rows(database, "SELECT operation_id, kind FROM romancy_history ORDER BY seq")
    outcomes = Counter(operation for operation, kind in events if kind == "ActivityCompleted")
    assert outcomes == Counter(
        ["plain:1", "book:1", "plain:2", "book:2", "plain:3", "book_in_thread:1", "flaky:1", "plain:4"]
    )
    written = Counter(tokens.read_text().split("\n")[:-1])
    assert set(written) == {
        "a plain:1", "b plain:2", "c plain:3", "d plain:4", "book one", "book two", "book three"
    }  # fmt: skip
    # At least once, and again only because of a kill.
    assert sum(written.values()) - len(written) <= 4 * kills
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("completed", None)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 12))
def test_killed_at_one_commit_and_started_again(database: Database, tokens: Path, when: str, at: int) -> None:
    code, printed = run(database, tokens, f"{when}:{at}")
    if code == 0:
        assert printed is not None
        assert printed["commits"] < at or at >= 8
        check(database, tokens, printed, 0)
        return
    code, printed = run(database, tokens)
    assert printed is not None
    check(database, tokens, printed, 1)


@pytest.mark.parametrize("kill", ["after:2", "before:3"])
def test_killed_again_and_again_until_it_is_through(database: Database, tokens: Path, kill: str) -> None:
    for kills in range(60):  # noqa: B007  (counted for what comes after)
        code, printed = run(database, tokens, kill)
        if code == 0:
            break
    assert printed is not None
    assert kills >= 3
    code, printed = run(database, tokens)
    assert printed is not None
    check(database, tokens, printed, kills)
