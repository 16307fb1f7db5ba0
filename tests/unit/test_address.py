"""What ``App(database)`` takes, and what it says of what it doesn't take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from romancy.errors import DatabaseURLError
from romancy.storage.address import ServerAddress, SqliteAddress, parse_address


@pytest.mark.parametrize("database", [":memory:", "sqlite:///:memory:"])
def test_memory(database: str) -> None:
    address = parse_address(database)
    assert isinstance(address, SqliteAddress)
    assert address.is_memory
    assert str(address) == ":memory:"


@pytest.mark.parametrize(
    ("database", "path"),
    [
        ("orders.db", "{here}/orders.db"),
        ("sub/orders.db", "{here}/sub/orders.db"),
        (Path("orders.db"), "{here}/orders.db"),
        ("sqlite:///orders.db", "{here}/orders.db"),
        ("SQLite:///orders.db", "{here}/orders.db"),
        ("sqlite:////srv/orders.db", "/srv/orders.db"),
        ("/srv/orders.db", "/srv/orders.db"),
        ("sqlite:///a%20b.db", "{here}/a b.db"),
        ("a%20b.db", "{here}/a%20b.db"),
        ("what?.db", "{here}/what?.db"),
        ("a#b.db", "{here}/a#b.db"),
        ("Ä.db", "{here}/Ä.db"),
        ("~/orders.db", "{home}/orders.db"),
        ("file:orders.db", "{here}/file:orders.db"),
    ],
)
def test_file(database: Any, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    address = parse_address(database)
    assert isinstance(address, SqliteAddress)
    assert not address.is_memory
    assert address.path == path.format(here=tmp_path, home="/home/somebody")
    assert str(address) == address.path


@pytest.mark.parametrize(
    ("database", "says"),
    [
        ("", "the database is empty"),
        ("  ", "the database is empty"),
        ("a\0b", "NUL"),
        (None, "of type NoneType"),
        (5, "of type int"),
        (b"orders.db", "of type bytes"),
        ("mongodb://host/db", "mongodb:// is not supported"),
        ("sqlite://orders.db", "three slashes"),
        ("sqlite://", "three slashes"),
        ("sqlite:///orders.db?mode=ro", "has options"),
        ("sqlite:///orders.db#x", "has options"),
        ("~no-such-user-here/orders.db", "is unknown"),
    ],
)
def test_bad_address_is_a_value_error_that_shows_the_forms(database: Any, says: str) -> None:
    with pytest.raises(DatabaseURLError, match=says) as caught:
        parse_address(database)
    assert isinstance(caught.value, ValueError)


def test_folder_is_refused_with_an_example(tmp_path: Path) -> None:
    for database in (tmp_path, str(tmp_path), f"sqlite:///{tmp_path}"):
        with pytest.raises(DatabaseURLError, match=r"is a folder: name a file in it, such as .*romancy\.db"):
            parse_address(database)


@pytest.mark.parametrize(
    ("database", "kind", "shown"),
    [
        ("postgresql://ann:secret@db.example/shop", "postgresql", "postgresql://ann:***@db.example/shop"),
        ("postgres://db.example:5433/shop", "postgresql", "postgresql://db.example:5433/shop"),
        ("POSTGRESQL://db.example/shop?sslmode=require", "postgresql", "postgresql://db.example/shop?sslmode=require"),
        ("mysql://root@127.0.0.1/shop", "mysql", "mysql://root@127.0.0.1/shop"),
        ("mariadb://root:p%40ss@127.0.0.1:3307/shop", "mysql", "mysql://root:***@127.0.0.1:3307/shop"),
    ],
)
def test_server(database: str, kind: str, shown: str) -> None:
    address = parse_address(database)
    assert isinstance(address, ServerAddress)
    assert (address.kind, str(address)) == (kind, shown)


@pytest.mark.parametrize(
    ("database", "says"),
    [
        ("postgresql://ann:secret@db.example", "names no database"),
        ("postgresql+asyncpg://ann:secret@db.example/shop", "brings its own"),
        ("mysql://ann:secret@db.example:port/shop", "can't be understood"),
    ],
)
def test_refused_server_is_named_without_its_password(database: str, says: str) -> None:
    with pytest.raises(DatabaseURLError, match=says) as caught:
        parse_address(database)
    assert "secret" not in str(caught.value)
    assert caught.value.__cause__ is None
