"""Fixtures for all tests: a fresh database each, and definitions that vanish with the test."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from romancy.testing import VirtualClock, isolated_catalogue
from tests.databases import KINDS, NOTHING_TESTED, Database, clean, server_database
from tests.servers import lend


def pytest_configure(config: pytest.Config) -> None:
    """Servers that are missing are started for this run; the processes of xdist share them."""
    lending = ExitStack()
    lending.enter_context(lend())
    config.add_cleanup(lending.close)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What was not tested for want of a server is the last thing that is said."""
    reasons = Counter(
        report.longrepr[2].removeprefix("Skipped: ")
        for report in terminalreporter.getreports("skipped")
        if isinstance(report.longrepr, tuple) and NOTHING_TESTED in report.longrepr[2]
    )
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"WARNING: {reason} ({count} tests skipped)", red=True, bold=True)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two a core for ``-n auto``: many tests wait for other processes and servers."""
    del config
    return 2 * (os.cpu_count() or 1)


LONG = (
    "test_order.py::test_killed_again",
    "test_replay_property.py::test_crashed",
    "test_stalled_connections.py::test_connection_that_stalls",
    "test_filters_everywhere.py::test_filters_find",
    "test_kill_mail.py",
    "test_kill.py::test_killed_again",
    "test_hints.py",
    "test_crew.py",
    "test_races.py",
    "test_poolers.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long begins first, so that nobody is waited for in the end."""
    items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if name in item.nodeid), len(LONG)))


@pytest.fixture(autouse=True)
def _own_definitions() -> Iterator[None]:
    with isolated_catalogue():
        yield


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A database file of this test's own."""
    return tmp_path / "romancy.db"


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A database on a PostgreSQL server, for all tests of this process."""
    with server_database("postgresql") as url:
        yield url


@pytest.fixture(scope="session")
def mysql_url() -> Iterator[str]:
    """A database on a MySQL or MariaDB server, for all tests of this process."""
    with server_database("mysql") as url:
        yield url


@pytest.fixture(params=KINDS)
def any_database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """An empty database, on each kind in turn."""
    if request.param == "sqlite":
        yield tmp_path / "romancy.db"
        return
    url: str = request.getfixturevalue(f"{request.param}_url")
    yield url
    clean(url)


@pytest.fixture
async def clock() -> VirtualClock:
    """A clock that the test moves."""
    return VirtualClock()


@pytest.fixture
def romancy_log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """What Romancy logs, from debug on."""
    caplog.set_level(logging.DEBUG, "romancy")
    return caplog
