"""A table of the user's own that the tests write to: tokens, and nothing that keeps out doubles."""

from __future__ import annotations

from sqlalchemy import text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from tests.databases import Database, execute, kind_of

INSERT = text("INSERT INTO ledger (token) VALUES (:token)")
SERIAL = {
    "sqlite": "INTEGER PRIMARY KEY",
    "postgresql": "SERIAL PRIMARY KEY",
    "mysql": "INT AUTO_INCREMENT PRIMARY KEY",
}


class Base(DeclarativeBase):
    pass


class Entry(Base):
    """A token, numbered in the order in which they were written."""

    __tablename__ = "ledger"
    id: Mapped[int] = mapped_column(primary_key=True)
    token: Mapped[str]


def create_ledger(database: Database) -> None:
    """Create the table."""
    execute(database, f"CREATE TABLE ledger (id {SERIAL[kind_of(database)]}, token VARCHAR(200) NOT NULL)")
