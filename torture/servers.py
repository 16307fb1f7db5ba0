"""Database servers of the torture's own, on ports and in folders of their own, which may be killed."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Protocol

from tests.databases import connect

LONGEST_START_S = 60.0
NAME = "torture"


class Server(Protocol):
    """A server that the torture has started.

    Attributes:
        url: of the run's database on it.
        hint: how to start it again, to look at what was left.
    """

    url: str
    hint: str

    def start(self) -> None:
        """Start it and wait until it answers."""
        ...

    def kill(self) -> None:
        """End it with ``kill -9``."""
        ...

    def stop(self) -> None:
        """End it in good order."""
        ...


def own_server(kind: str, folder: Path) -> Server | None:
    """A new server of this kind, with an empty database; ``None`` where its programs are not installed."""
    made = _postgresql(folder) if kind == "postgresql" else _mariadb(folder)
    if made is not None:
        made.start()
        made.create_database()
    return made


class _Server:
    """A server process.

    Args:
        command: starts it in the foreground.
        log: where it writes to.
        url: of its database.
        administration: the URL of a database that is there from the start.
        gentle: the signal that ends it in good order.
    """

    def __init__(
        self, command: Sequence[str], log: Path, url: str, administration: str, gentle: signal.Signals
    ) -> None:
        self._command = list(command)
        self._log = log
        self._administration = administration
        self._gentle = gentle
        self._process: subprocess.Popen[bytes] | None = None
        self.url = url
        self.hint = " ".join(command)

    def start(self) -> None:
        """See :class:`Server`; a server that was killed may need some tries, until its children have noticed."""
        deadline = time.monotonic() + LONGEST_START_S
        while True:
            if self._process is None or self._process.poll() is not None:
                with self._log.open("ab") as log:
                    self._process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)
            try:
                connect(self._administration).close()
            except Exception:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
            else:
                return

    def kill(self) -> None:
        """See :class:`Server`."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """See :class:`Server`."""
        self._signal(self._gentle)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            # In a session of its own, so that nothing else is in its group.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait()

    def create_database(self) -> None:
        """Create the run's database."""
        with closing(connect(self._administration)) as connection:
            connection.autocommit = True if self._administration.startswith("postgresql") else None
            connection.cursor().execute(f"CREATE DATABASE {NAME}")


def _postgresql(folder: Path) -> _Server | None:
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres")) or [
        Path(found) for found in (shutil.which("postgres"),) if found
    ]
    if not programs:
        return None
    program, data, port = programs[-1], folder / "postgresql", free_port()
    _own(folder, "postgres")
    initdb = [str(program.with_name("initdb")), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"]
    subprocess.run([*_as_user("postgres"), *initdb], check=True, capture_output=True, cwd="/")
    command = [
        *_as_user("postgres"), str(program), "-D", str(data), "-p", str(port), "-k", str(folder),
        "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=16MB", "-c", "max_connections=200",
        "-c", "max_wal_size=256MB",
    ]  # fmt: skip
    base = f"postgresql://postgres@127.0.0.1:{port}"
    return _Server(
        command, folder / "postgresql.log", f"{base}/{NAME}?sslmode=disable", f"{base}/postgres", signal.SIGINT
    )


def _mariadb(folder: Path) -> _Server | None:
    program = shutil.which("mariadbd") or shutil.which("mariadbd", path="/usr/sbin:/usr/local/sbin")
    installer = shutil.which("mariadb-install-db")
    if program is None or installer is None:
        return None
    data, port = folder / "mariadb", free_port()
    _own(folder, "mysql")
    # Programs of MariaDB change the user by themselves.
    user = ["--user=mysql"] if os.geteuid() == 0 else []
    install = [installer, "--no-defaults", *user, f"--datadir={data}", "--auth-root-authentication-method=normal"]
    subprocess.run([*install, "--skip-test-db"], check=True, capture_output=True)
    command = [
        program, "--no-defaults", *user, f"--datadir={data}", f"--port={port}", "--bind-address=127.0.0.1",
        f"--socket={folder / 'mariadb.sock'}", f"--pid-file={folder / 'mariadb.pid'}",
        "--innodb-buffer-pool-size=32M", "--max-connections=200", "--skip-name-resolve",
    ]  # fmt: skip
    base = f"mysql://root@127.0.0.1:{port}"
    return _Server(command, folder / "mariadb.log", f"{base}/{NAME}", f"{base}/", signal.SIGTERM)


def _as_user(name: str) -> list[str]:
    """A prefix that changes to this user, where there is anything to change: PostgreSQL refuses to run as root."""
    return ["setpriv", f"--reuid={name}", f"--regid={name}", "--clear-groups"] if os.geteuid() == 0 else []


def _own(folder: Path, user: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(folder, user)
        for parent in folder.parents:
            if parent.stat().st_mode & 0o001 == 0 and parent.stat().st_uid == 0:
                parent.chmod(parent.stat().st_mode | 0o001)


def free_port() -> int:
    """A port that nobody listens at."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port
