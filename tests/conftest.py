"""Fixtures for all tests: a fresh database each, and definitions that vanish with the test."""

from __future__ import annotations

import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from romancy.testing import VirtualClock, isolated_catalogue
from tests.databases import KINDS, NOTHING_TESTED, Database, clean, server_database
from tests.servers import lend

SHARED_MEMORY = Path("/dev/shm")
ROOM_BYTES = 1024**3


def pytest_configure(config: pytest.Config) -> None:
    """Servers that are missing are started for this run; the processes of xdist share them."""
    _keep_files_in_memory()
    lending = ExitStack()
    lending.enter_context(lend())
    config.add_cleanup(lending.close)


def _keep_files_in_memory() -> None:
    """Nobody waits for the disk: what a killed process has written is in the system's memory in any case."""
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free >= ROOM_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(SHARED_MEMORY))


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
    """Three a core for ``-n auto``: many tests wait for other processes and servers."""
    if config.option.dist in ("no", "load"):
        # Each begins with its share, and who is through early takes some from the others.
        config.option.dist = "worksteal"
    return 3 * (os.cpu_count() or 1)


LONG = (
    "test_order.py::test_killed_again",
    "test_kill_mail.py",
    "test_replay_property.py::test_crashed",
    "test_stalled_connections.py::test_connection_that_stalls",
    "test_poolers.py",
    "test_hints.py",
    "test_filters_everywhere.py::test_filters_find",
    "test_crew.py",
    "test_packets.py",
    "test_own_servers.py",
    "test_lost_connections.py",
    "test_forking.py",
    "test_order.py",
    "test_kill.py",
    "test_tls.py",
    "test_races.py",
)
"""What takes long begins first, so that nobody is waited for in the end."""

TOGETHER = ("test_tls.py", "test_packets.py", "test_kill.py", "test_zombie.py")
"""Modules among them that start something for all of their tests, which is too much to be done in each process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long ones first; among the processes of xdist, in the share of each."""
    units: dict[tuple[int, str], list[pytest.Item]] = {}
    for item in items:
        rank = next((n for n, name in enumerate(LONG) if name in item.nodeid), len(LONG))
        kind = next((kind for kind in KINDS if kind in item.name), "")
        # What a module has imported and compiled serves its other tests, too.
        is_alone = rank < len(LONG) and item.path.name not in TOGETHER
        units.setdefault((rank, item.nodeid if is_alone else f"{item.path} {kind}"), []).append(item)
    ordered = [units[key] for key in sorted(units, key=lambda key: (key[0], -len(units[key]), key[1]))]
    items[:] = _in_shares(ordered, int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))


def _in_shares(units: list[list[pytest.Item]], count: int) -> list[pytest.Item]:
    """The units, dealt out in turn to shares of equal size; one share after the other, as xdist will cut them."""
    shares: list[list[pytest.Item]] = [[] for _ in range(count)]
    for unit in units:
        min(shares, key=len).extend(unit)
    return [item for share in shares for item in share]


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
