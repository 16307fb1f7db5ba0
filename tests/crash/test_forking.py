"""A process forks while its app runs: the child can't use that app, and does it no harm, not even by ending."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.databases import Database, kind_of, rows

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")


def forked(database: Database, *arguments: str) -> list[str]:
    """What parent and child print; neither may log a warning, such as of a lost connection."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash.forking", str(database), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert lines[-1] == "done", done.stderr
    warnings = [line for line in done.stderr.splitlines() if line.startswith(("WARNING:romancy", "ERROR"))]
    assert not warnings, done.stderr
    return lines


async def test_app_from_before_the_fork_is_refused_in_the_child_and_goes_on_in_the_parent(
    any_database: Database,
) -> None:
    lines = forked(any_database, "refused")
    said = [line for line in lines if line.startswith("child")]
    assert len(said) == 5
    assert all(
        line.startswith("child AppNotRunningError") and "make an App of its own here" in line for line in said
    ), said
    assert [line for line in lines if line not in said] == ["before 5", "ended 0", "after 5", "done"]


async def test_app_in_memory_survives_the_childs_end(tmp_path: Path) -> None:
    assert forked(":memory:", "elsewhere", str(tmp_path / "other.db")) == [
        "before 5", "child 5", "ended 0", "after 5", "done",
    ]  # fmt: skip


async def test_new_app_works_in_the_child(any_database: Database, tmp_path: Path) -> None:
    if kind_of(any_database) == "sqlite":
        other = tmp_path / "other.db"
        assert "child 5" in forked(any_database, "elsewhere", str(other))
        assert rows(other, "SELECT count(*) FROM romancy_instances WHERE status = 'completed'") == [(1,)]
        return
    assert forked(any_database, "app") == ["before 5", "child 5", "ended 0", "after 5", "done"]
    assert rows(any_database, "SELECT count(*) FROM romancy_instances WHERE status = 'completed'") == [(3,)]
    # Each of the two apps was a worker of its own.
    assert rows(any_database, "SELECT count(DISTINCT pid) FROM romancy_workers") in ([(2,)], [(0,)])


async def test_sqlite_file_that_the_parent_has_open_is_refused_in_the_child(tmp_path: Path) -> None:
    path = tmp_path / "romancy.db"
    command = [sys.executable, "-W", "ignore", "-m", "tests.crash.forking", str(path), "app"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert done.stdout.splitlines() == ["before 5", "ended 1", "after 5", "done"], done.stderr
    assert "DatabaseUnsafeError" in done.stderr
    assert "fork before any app has started" in done.stderr
