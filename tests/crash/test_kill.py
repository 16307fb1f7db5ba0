"""A process killed with -9 at every commit in turn: nothing lost, nothing doubled."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.support import rows

ROOT = Path(__file__).parents[2]
LEDGER = ["four", "one", "three", "two"]
FOUND = ["a", "one", "b", "two", "c", "three", 3, "d"]


def run(database: Path, kill: str = "never:0") -> tuple[int, dict[str, Any] | None]:
    """Run the child; returns its exit code and, if it came to the end, what it printed."""
    command = [sys.executable, "-m", "tests.crash.child", str(database), str(database.with_suffix(".txt")), kill]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=50, check=False)
    if done.returncode == -signal.SIGKILL:
        return done.returncode, None
    assert done.returncode == 0, done.stderr
    return 0, json.loads(done.stdout)


def check(database: Path, printed: dict[str, Any], kills: int) -> None:
    """Join result, ledger, history and the file of tokens."""
    assert printed["result"]["found"] == FOUND
    assert sorted(token for (token,) in rows(database, "SELECT token FROM ledger")) == LEDGER
    events = rows(database, "SELECT operation_id, kind FROM romancy_history ORDER BY seq")
    outcomes = Counter(operation for operation, kind in events if kind == "ActivityCompleted")
    assert outcomes == Counter(
        ["plain:1", "book:1", "plain:2", "book:2", "plain:3", "book_in_thread:1", "flaky:1", "plain:4"]
    )
    tokens = Counter(database.with_suffix(".txt").read_text().split("\n")[:-1])
    assert set(tokens) == {
        "a plain:1", "b plain:2", "c plain:3", "d plain:4", "book one", "book two", "book three"
    }  # fmt: skip
    # At least once, and again only because of a kill.
    assert sum(tokens.values()) - len(tokens) <= 4 * kills
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("completed", None)]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("at", range(1, 12))
def test_killed_at_one_commit_and_started_again(database: Path, when: str, at: int) -> None:
    code, printed = run(database, f"{when}:{at}")
    if code == 0:
        assert printed is not None
        assert printed["commits"] < at or at >= 8
        check(database, printed, 0)
        return
    code, printed = run(database)
    assert printed is not None
    check(database, printed, 1)


@pytest.mark.parametrize("kill", ["after:2", "before:3"])
def test_killed_again_and_again_until_it_is_through(database: Path, kill: str) -> None:
    for kills in range(60):  # noqa: B007  (counted for what comes after)
        code, printed = run(database, kill)
        if code == 0:
            break
    assert printed is not None
    assert kills >= 3
    code, printed = run(database)
    assert printed is not None
    check(database, printed, kills)
