"""A MariaDB server of the test's own, with options that the shared one can't be given."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pymysql
import pytest

UNPRIVILEGED = "nobody"
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin"
LONGEST_START_S = 30.0


@contextmanager
def mariadb(*options: str) -> Iterator[str]:
    """The address of an empty database on a server with these options; skips the test where MariaDB is missing."""
    server, installer = shutil.which("mariadbd", path=SEARCH), shutil.which("mariadb-install-db", path=SEARCH)
    if server is None or installer is None:
        reason = "no mariadbd here, so nothing is tested on a server with other options: apt-get install mariadb-server"
        if os.environ.get("ROMANCY_TEST_ALL_DATABASES"):
            pytest.fail(reason)
        pytest.skip(reason)
    # It refuses to run as root.
    user = UNPRIVILEGED if os.getuid() == 0 else None
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="mariadb-", ignore_cleanup_errors=True) as folder:
        data = Path(folder) / "data"
        data.mkdir()
        if user is not None:
            shutil.chown(folder, user)
            shutil.chown(data, user)
        install = [installer, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal"]
        subprocess.run([*install, "--skip-test-db"], check=True, capture_output=True, user=user, timeout=60)
        command = [
            server, "--no-defaults", f"--datadir={data}", f"--socket={folder}/socket", f"--pid-file={folder}/pid",
            "--bind-address=127.0.0.1", f"--port={port}", *options,
        ]  # fmt: skip
        log = Path(folder) / "log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, user=user)
        try:
            _create_database(port, process, log)
            yield f"mysql://root@127.0.0.1:{port}/romancy"
        finally:
            process.kill()
            process.wait()


def _create_database(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    error: pymysql.Error | None = None
    for _ in range(round(LONGEST_START_S / 0.1)):
        try:
            with closing(pymysql.connect(host="127.0.0.1", port=port, user="root")) as connection:
                connection.cursor().execute("CREATE DATABASE romancy")
        except pymysql.Error as caught:
            error = caught
            if process.poll() is not None:
                break
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.1)
        else:
            return
    pytest.fail(f"MariaDB does not answer: {error}\n{log.read_text(errors='replace')}")
