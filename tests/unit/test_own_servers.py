"""The servers that the tests start for themselves: one for all processes of a run, and gone with the run."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests import databases
from tests.drivers import connect

LENDER = """
import subprocess, sys
from tests.servers import borrow, lend
with lend():
    command = [sys.executable, "-c", "from tests.servers import borrow; print(borrow('postgresql'))"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    print(*[process.communicate()[0].strip() for process in both], borrow("postgresql"), flush=True)
    sys.stdin.read()
"""
LONGEST_END_S = 20


def start_lender(folder: Path) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name != "ROMANCY_TEST_SERVERS"}
    return subprocess.Popen(
        [sys.executable, "-c", LENDER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**environment, "TMPDIR": str(folder)},
        cwd=Path(__file__).parents[2],
    )


def wait_until_hung_up(connection: Any) -> None:
    ready, _, _ = select.select([connection.pgconn.socket], [], [], LONGEST_END_S)
    assert ready, "the server is still there"
    with pytest.raises(psycopg.OperationalError):
        connection.execute("SELECT 1")


@pytest.mark.parametrize("is_killed", [False, True])
def test_server_is_shared_by_all_processes_of_a_run_and_ends_with_it(tmp_path: Path, is_killed: bool) -> None:
    with start_lender(tmp_path) as lender:
        assert lender.stdin is not None
        assert lender.stdout is not None
        urls = lender.stdout.readline().split()
        assert len(urls) == 3
        assert len(set(urls)) == 1
        with connect(urls[0]) as connection:
            if is_killed:
                lender.send_signal(signal.SIGKILL)
            else:
                lender.stdin.close()
            wait_until_hung_up(connection)
            connection.close()


def test_missing_server_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = ("ROMANCY_TEST_NOTHING", "postgresql://postgres@127.0.0.1:1/postgres")
    monkeypatch.setitem(databases.ADDRESSES, "postgresql", nowhere)
    url = databases.server("postgresql")
    assert url.port != 1
    connect(url.render_as_string(hide_password=False)).close()


def test_server_that_was_asked_for_is_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROMANCY_TEST_POSTGRESQL_URL", "postgresql://postgres@127.0.0.1:1/postgres")
    monkeypatch.delenv("ROMANCY_TEST_ALL_DATABASES", raising=False)
    with pytest.raises(pytest.skip.Exception, match=r"NOTHING IS TESTED on PostgreSQL.*ROMANCY_TEST_POSTGRESQL_URL"):
        databases.server("postgresql")
    monkeypatch.setenv("ROMANCY_TEST_ALL_DATABASES", "1")
    with pytest.raises(pytest.fail.Exception, match="NOTHING IS TESTED"):
        databases.server("postgresql")
