"""A PostgreSQL server of the test's own, with options that the shared one can't be given."""

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

UNPRIVILEGED = "nobody"
LONGEST_START_S = 30.0


@contextmanager
def postgresql(*options: str, hba: str = "host all all 127.0.0.1/32 trust") -> Iterator[str]:
    """The address of an empty database on a server with these options; skips the test where PostgreSQL is missing."""
    server, installer = _program("postgres"), _program("initdb")
    if server is None or installer is None:
        reason = "no postgres here, so nothing is tested on a server with other options: apt-get install postgresql"
        if os.environ.get("ROMANCY_TEST_ALL_DATABASES"):
            pytest.fail(reason)
        pytest.skip(reason)
    # It refuses to run as root.
    user = UNPRIVILEGED if os.getuid() == 0 else None
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="postgresql-", ignore_cleanup_errors=True) as folder:
        if user is not None:
            shutil.chown(folder, user)
        data = Path(folder) / "data"
        install = [installer, "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync", "--no-instructions"]
        subprocess.run(install, check=True, capture_output=True, user=user, cwd=folder, timeout=60)
        (data / "pg_hba.conf").write_text(f"local all all trust\n{hba}\n")
        # What a server that is killed leaves behind goes with its folder.
        settings = ["listen_addresses=127.0.0.1", f"port={port}", f"unix_socket_directories={folder}"]
        settings += ["dynamic_shared_memory_type=mmap", *options]
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [server, "-D", str(data), *(part for setting in settings for part in ("-c", setting))],
                stdout=output, stderr=output, user=user, cwd=folder,
            )  # fmt: skip
        try:
            _wait_until_it_answers(folder, port, process, log)
            yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _program(name: str) -> str | None:
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return shutil.which(name, path=":".join([*map(str, folders), os.environ.get("PATH", "")]))


def _wait_until_it_answers(folder: str, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    error: psycopg.Error | None = None
    for _ in range(round(LONGEST_START_S / 0.1)):
        try:
            psycopg.connect(host=folder, port=port, user="postgres", dbname="postgres").close()
        except psycopg.Error as caught:
            error = caught
            if process.poll() is not None:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        else:
            return
    pytest.fail(f"PostgreSQL does not answer: {error}\n{log.read_text(errors='replace')}")
