"""Encrypted connections to servers: all of Romancy's are, or none comes about, with an error that says why."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text

from romancy import (
    App,
    DatabaseUnavailableError,
    DatabaseURLError,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from tests.certificates import Certificates, make_certificates
from tests.databases import execute, server_with
from tests.servers import MYSQL_FOLDER, UNPRIVILEGED
from tests.support import RESULT_TIMEOUT_S

KINDS = ("postgresql", "mysql")
OPTIONS = {
    "postgresql": {"ca": "sslrootcert", "cert": "sslcert", "key": "sslkey", "full": {"sslmode": "verify-full"},
                   "ca_only": {"sslmode": "verify-ca"}},
    "mysql": {"ca": "ssl_ca", "cert": "ssl_cert", "key": "ssl_key", "full": {"ssl_verify_cert": "true"},
              "ca_only": {"ssl_verify_cert": "true", "ssl_verify_identity": "false"}},
}  # fmt: skip
PROTOCOL = {
    "postgresql": "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
    "mysql": "SHOW SESSION STATUS LIKE 'Ssl_version'",
}


@pytest.fixture(scope="module")
def certificates() -> Iterator[Certificates]:
    # Not in pytest's own folder, into which the servers' user can't look.
    folder = Path(tempfile.mkdtemp(prefix="romancy-tls-"))
    try:
        yield make_certificates(folder, UNPRIVILEGED if os.getuid() == 0 else None)
    finally:
        shutil.rmtree(folder)


@contextmanager
def _server(kind: str, certificates: Certificates) -> Iterator[str]:
    files = certificates
    if kind == "postgresql":
        # Nobody gets in without TLS.
        rules = files.ca.with_name("pg_hba.conf")
        rules.write_text("hostssl all all 127.0.0.1/32 trust\n")
        named = {"ssl_cert_file": files.cert, "ssl_key_file": files.key, "ssl_ca_file": files.ca, "hba_file": rules}
        options = ["-c", "ssl=on", *(part for name, path in named.items() for part in ("-c", f"{name}={path}"))]
    else:
        options = [f"--ssl-cert={files.cert}", f"--ssl-key={files.key}", f"--ssl-ca={files.ca}"]
    with server_with(kind, *options, with_tls=True) as url:
        yield url


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, certificates: Certificates) -> Iterator[str]:
    with _server(request.param, certificates) as url:
        yield url


def _with(url: str, mode: str | None, *, host: str | None = None, **files: Path) -> str:
    options: Any = OPTIONS[make_url(url).get_backend_name()]
    query = {} if mode is None else dict(options[mode])
    query |= {options[name]: str(path) for name, path in files.items()}
    found = make_url(url).update_query_dict(query)
    return (found if host is None else found.set(host=host)).render_as_string(hide_password=False)


async def test_every_connection_is_encrypted_and_the_certificate_checked(
    server: str, certificates: Certificates
) -> None:
    kind = make_url(server).get_backend_name()
    query = text(PROTOCOL[kind])

    @activity
    async def by_async() -> str:
        return str((await current_activity().session.execute(query)).one()[-1])

    @activity
    def by_sync() -> str:
        return str(current_activity().sync_session.execute(query).one()[-1])

    @workflow
    async def flow(ctx: WorkflowContext) -> list[str]:
        return [await by_async(), await by_sync()]

    async with App(_with(server, "full", ca=certificates.ca)) as app:
        handle = await app.start_workflow(flow)
        found = await handle.result(RESULT_TIMEOUT_S)
        assert await app.get_history(handle.instance_id)
        for submit in (app._life.store._write, app._life.store._read):
            found.append(submit(lambda link: link.execute(PROTOCOL[kind]).fetchone()[-1]).result(RESULT_TIMEOUT_S))
        async with app._life.queries._connect() as connection:
            found.append(str((await connection.execute(query)).one()[-1]))
    assert len(found) == 5
    assert all(version.startswith("TLSv1.") for version in found), found


@pytest.mark.parametrize("mode", ["full", "ca_only"])
async def test_server_with_a_certificate_from_another_ca_is_refused(
    server: str, certificates: Certificates, mode: str
) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r"(?i)names the CA of its certificate.*verify.?failed"):
        await App(_with(server, mode, ca=certificates.other_ca)).start()


async def test_certificate_for_another_host_is_refused_unless_that_is_not_asked(
    server: str, certificates: Certificates
) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r"the certificate is for this host.*localhost"):
        await App(_with(server, "full", host="localhost", ca=certificates.ca)).start()
    async with App(_with(server, "ca_only", host="localhost", ca=certificates.ca)):
        pass


async def test_ca_alone_is_enough_for_the_check(server: str, certificates: Certificates) -> None:
    if make_url(server).get_backend_name() == "postgresql":
        pytest.skip("its own rule: sslmode says what is checked")
    with pytest.raises(DatabaseUnavailableError, match="names the CA"):
        await App(_with(server, None, ca=certificates.other_ca)).start()
    with pytest.raises(DatabaseUnavailableError, match="names the CA"):
        await App(f"{server}?ssl_verify_cert=true").start()
    async with App(f"{server}?ssl_verify_cert=false"):
        pass


async def test_client_certificate_is_presented(server: str, certificates: Certificates) -> None:
    kind = make_url(server).get_backend_name()
    files = {"ca": certificates.ca, "cert": certificates.client_cert, "key": certificates.client_key}
    if kind == "mysql":
        execute(server, "CREATE USER certified@'127.0.0.1' REQUIRE X509")
        execute(server, "GRANT ALL ON fresh.* TO certified@'127.0.0.1'")
        execute(server, "CREATE DATABASE fresh")
        url = make_url(server).set(username="certified", database="fresh").render_as_string()
        with pytest.raises(DatabaseUnavailableError, match="refuses user or password"):
            await App(_with(url, "full", ca=certificates.ca)).start()
        # The tables are made by such a connection, too.
        async with App(_with(url, "full", **files)):
            return
    query = "SELECT client_dn FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
    async with App(_with(server, "full", **files)) as app:
        found = app._life.store._write(lambda link: link.execute(query).fetchone()[0]).result(RESULT_TIMEOUT_S)
    assert found == "/CN=root"


@pytest.mark.parametrize("kind", KINDS)
async def test_server_without_tls_is_refused(kind: str, certificates: Certificates) -> None:
    of_mysql = "--tls-version=" if MYSQL_FOLDER in os.environ else "--skip-ssl"
    without = ["-c", "ssl=off"] if kind == "postgresql" else [of_mysql]
    with (
        server_with(kind, *without) as url,
        pytest.raises(DatabaseUnavailableError, match=r"that the server offers TLS"),
    ):
        await App(_with(url, "full", ca=certificates.ca)).start()


async def test_server_that_demands_tls_says_so(server: str) -> None:
    if make_url(server).get_backend_name() == "mysql":
        pytest.skip("its driver takes TLS by itself where the server offers it")
    with pytest.raises(DatabaseUnavailableError, match="no encryption"):
        await App(f"{server}?sslmode=disable").start()


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("ssl_ca=/no/such/file", r"ssl_ca='/no/such/file'.* can't be read"),
        ("ssl_cert=/no/such/file", r"ssl_cert='/no/such/file'.* can't be read"),
        ("ssl_key=/no/such/file", "without ssl_cert"),
        ("ssl_verify_cert=maybe", "ssl_verify_cert='maybe': give true or false"),
        ("ssl_verify_cert=false&ssl_verify_identity=true", "checks nothing"),
        ("ssl_cipher=none-such", "ssl_cipher='none-such'"),
        ("ssl_mode=REQUIRED", "ssl_mode is no option"),
        ("ssl_ca=a&ssl_ca=b", "given 2 times"),
    ],
)
async def test_wrong_option_of_a_mysql_address(query: str, says: str) -> None:
    with pytest.raises(DatabaseURLError, match=says):
        await App(f"mysql://127.0.0.1:1/shop?{query}").start()


async def test_root_certificate_that_is_not_there_is_named(server: str) -> None:
    with pytest.raises((DatabaseUnavailableError, DatabaseURLError), match="/no/such/file"):
        await App(_with(server, "full", ca=Path("/no/such/file"))).start()
