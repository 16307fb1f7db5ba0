"""The benchmarks' floor fits the tables as they are, and statements are counted in what a client sends."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of that name, among the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import connections

    return connections


def test_floor_writes_rows_of_the_tables_as_they_are(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "floor.py"), "latency", "--count", "5", "--dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["p50_ms"] > 0


def postgresql_message(kind: bytes, body: bytes = b"") -> bytes:
    return kind + (len(body) + 4).to_bytes(4, "big") + body


def mysql_packet(number: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "little") + bytes([number]) + body


@pytest.mark.parametrize("size", [1, 3, 1_000])
def test_statements_are_counted_in_postgresqls_protocol(connections: Any, size: int) -> None:
    sent = postgresql_message(b"", b"\0\3\0\0user\0x\0\0") + b"".join(
        [
            postgresql_message(b"p", b"secret\0"),
            postgresql_message(b"Q", b"BEGIN\0"),
            *(postgresql_message(kind, b"E") for kind in (b"P", b"B", b"D", b"E", b"S")),
            postgresql_message(b"X"),
        ]
    )
    requests = connections.PostgresqlRequests()
    assert sum(requests.count_statements(sent[at : at + size]) for at in range(0, len(sent), size)) == 2


@pytest.mark.parametrize("size", [1, 3, 1_000])
def test_statements_are_counted_in_mysqls_protocol(connections: Any, size: int) -> None:
    sent = b"".join(
        [
            mysql_packet(1, b"\x03 a handshake's answer"),
            mysql_packet(0, b"\x03SELECT 1"),
            mysql_packet(0, b"\x0e"),
            mysql_packet(0, b"\x01"),
        ]
    )
    requests = connections.MysqlRequests()
    assert sum(requests.count_statements(sent[at : at + size]) for at in range(0, len(sent), size)) == 2
