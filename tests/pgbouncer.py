"""A PgBouncer of the test's own, in transaction mode, before the tests' PostgreSQL server."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import URL, make_url

UNPRIVILEGED = "nobody"
LONGEST_START_S = 10.0


@contextmanager
def pgbouncer(url: str, *, mode: str = "transaction", pool_size: int = 8) -> Iterator[str]:
    """The address of a pooler before this database; skips the test where PgBouncer is missing.

    Each transaction of a client gets the server connection that has rested longest, so that no two follow each other
    on the same one.
    """
    program = _program()
    parts = make_url(url)
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="pgbouncer-") as folder:
        Path(folder).chmod(0o755)
        config = Path(folder) / "pgbouncer.ini"
        config.write_text(_config(parts, port, mode, pool_size))
        log = Path(folder) / "log"
        # It refuses to run as root.
        user = UNPRIVILEGED if os.getuid() == 0 else None
        with log.open("wb") as output:
            process = subprocess.Popen([program, str(config)], stdout=output, stderr=output, user=user)
        try:
            pooled = parts.set(host="127.0.0.1", port=port).render_as_string(hide_password=False)
            _wait_until_it_answers(pooled, process, log)
            yield pooled
        finally:
            process.kill()
            process.wait()


def _program() -> str:
    found = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if found is None:
        reason = "no pgbouncer here, so NOTHING IS TESTED behind a pooler; install it: apt-get install pgbouncer"
        if os.environ.get("ROMANCY_TEST_ALL_DATABASES"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def _config(server: URL, port: int, mode: str, pool_size: int) -> str:
    password = f" password={server.password}" if server.password else ""
    return (
        "[databases]\n"
        f"* = host={server.host or '127.0.0.1'} port={server.port or 5432} user={server.username}{password}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {mode}\ndefault_pool_size = {pool_size}\nmin_pool_size = {pool_size}\nmax_client_conn = 500\n"
        "server_round_robin = 1\n"
    )


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    error: psycopg.Error | None = None
    for _ in range(round(LONGEST_START_S / 0.05)):
        try:
            psycopg.connect(url).close()
        except psycopg.Error as caught:
            error = caught
            if process.poll() is not None:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.05)
        else:
            return
    pytest.fail(f"PgBouncer does not answer: {error}\n{log.read_text(errors='replace')}")
