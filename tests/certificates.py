"""Certificates that the tests make themselves: two CAs, and a server's from the first of them."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]


@dataclass(frozen=True)
class Certificates:
    """Where they lie.

    Attributes:
        ca: signed the others.
        other_ca: signed nothing.
        cert, key: the server's, for 127.0.0.1 only.
        client_cert, client_key: a client's, named root.
    """

    ca: Path
    other_ca: Path
    cert: Path
    key: Path
    client_cert: Path
    client_key: Path


def make_certificates(folder: Path, owner: str | None) -> Certificates:
    """Make them, the server's key for this user; skips the test where OpenSSL is missing."""
    if shutil.which("openssl") is None:
        reason = "no openssl here, so nothing is tested with TLS: apt-get install openssl"
        if os.environ.get("ROMANCY_TEST_ALL_DATABASES"):
            pytest.fail(reason)
        pytest.skip(reason)
    for name in ("ca", "other"):
        _openssl(folder, *_KEY, "-keyout", f"{name}.key", "-out", f"{name}.pem", "-subj", f"/CN=Romancy's {name}")
    signed = ["-CA", "ca.pem", "-CAkey", "ca.key"]
    server = ["-keyout", "server.key", "-out", "server.pem", "-subj", "/CN=server"]
    leaf = ["-addext", "basicConstraints=critical,CA:FALSE"]
    _openssl(folder, *_KEY, *signed, *server, *leaf, "-addext", "subjectAltName=IP:127.0.0.1")
    _openssl(folder, *_KEY, *signed, "-keyout", "client.key", "-out", "client.pem", "-subj", "/CN=root", *leaf)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    (folder / "server.key").chmod(0o600)
    (folder / "client.key").chmod(0o600)
    if owner is not None:
        shutil.chown(folder / "server.key", owner)
    return Certificates(
        *(folder / name for name in ("ca.pem", "other.pem", "server.pem", "server.key", "client.pem", "client.key"))
    )


def _openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", "req", "-x509", *arguments], check=True, capture_output=True, cwd=folder, timeout=30)
