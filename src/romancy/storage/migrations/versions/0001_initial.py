"""The first tables: instances, history, workers."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0001"
down_revision = None

TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")
TABLE: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mariadb_engine": "InnoDB",
    "mysql_default_charset": "utf8mb4",
    "mariadb_default_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_0900_bin",
    "mariadb_collate": "utf8mb4_nopad_bin",
}


def name_type(length: int) -> sa.String:
    """The type of a column that holds a name or an id."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    """Create them."""
    op.create_table(
        "romancy_instances",
        sa.Column("instance_id", name_type(200), primary_key=True),
        sa.Column("run", sa.Integer, nullable=False),
        sa.Column("workflow_name", name_type(200), nullable=False),
        sa.Column("status", name_type(24), nullable=False),
        sa.Column("owner", name_type(36)),
        sa.Column("ready_at", sa.BigInteger),
        sa.Column("claims", sa.Integer, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("updated_at", sa.BigInteger, nullable=False),
        sa.Column("completed_at", sa.BigInteger),
        sa.Column("source_hash", name_type(16)),
        sa.Column("input", TEXT, nullable=False),
        sa.Column("result", TEXT),
        sa.Column("error", TEXT),
        **TABLE,
    )
    op.create_index("romancy_instances_created", "romancy_instances", ["created_at", "instance_id"])
    op.create_index(
        "romancy_instances_active",
        "romancy_instances",
        ["owner", "ready_at"],
        sqlite_where=sa.text("completed_at IS NULL"),
        postgresql_where=sa.text("completed_at IS NULL"),
    )
    op.create_table(
        "romancy_history",
        sa.Column("instance_id", name_type(200), primary_key=True),
        sa.Column("run", sa.Integer, primary_key=True),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("kind", name_type(40), nullable=False),
        sa.Column("operation_id", name_type(400)),
        sa.Column("name", name_type(200)),
        sa.Column("position", sa.Integer),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("due_at", sa.BigInteger),
        sa.Column("input", TEXT),
        sa.Column("result", TEXT),
        sa.Column("error", TEXT),
        sqlite_with_rowid=False,
        **TABLE,
    )
    op.create_table(
        "romancy_workers",
        sa.Column("worker_id", name_type(36), primary_key=True),
        sa.Column("name", name_type(200), nullable=False),
        sa.Column("state", name_type(8), nullable=False),
        sa.Column("host", name_type(120), nullable=False),
        sa.Column("pid", sa.Integer, nullable=False),
        sa.Column("process_started", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger, nullable=False),
        sa.Column("lease_until", sa.BigInteger, nullable=False),
        **TABLE,
    )
