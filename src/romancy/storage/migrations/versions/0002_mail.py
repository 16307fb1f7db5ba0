"""Events, messages, children: waits, mail, deliveries, channels; and what instances need for them."""

from typing import Any

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.mysql import LONGTEXT

revision = "0002"
down_revision = "0001"

TEXT = sa.Text().with_variant(LONGTEXT(), "mysql", "mariadb")
TABLE: dict[str, Any] = {
    "mysql_engine": "InnoDB",
    "mariadb_engine": "InnoDB",
    "mysql_default_charset": "utf8mb4",
    "mariadb_default_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_0900_bin",
    "mariadb_collate": "utf8mb4_nopad_bin",
}
SLOTS = 64


def name_type(length: int) -> sa.String:
    """The type of a column that holds a name or an id."""
    return sa.String(length).with_variant(sa.String(length, collation="C"), "postgresql")


def upgrade() -> None:
    """Create them; on servers without transactions for DDL, go on where an interrupted attempt ended."""
    connection = op.get_bind()
    inspector = sa.inspect(connection)
    there = set(inspector.get_table_names())
    columns = {column["name"] for column in inspector.get_columns("romancy_instances")}

    def table(name: str, *items: Any) -> None:
        if name not in there:
            op.create_table(name, *items, **TABLE)

    def index(name: str, of: str, fields: list[str]) -> None:
        if of not in there or name not in {known["name"] for known in inspector.get_indexes(of)}:
            op.create_index(name, of, fields)

    if "parent_id" not in columns:
        op.add_column("romancy_instances", sa.Column("parent_id", name_type(200)))
    if "patches" not in columns:
        op.add_column("romancy_instances", sa.Column("patches", TEXT))
    if "seed" not in columns:
        op.add_column("romancy_instances", sa.Column("seed", name_type(220)))
    table(
        "romancy_waits",
        sa.Column("instance_id", name_type(200), primary_key=True),
        sa.Column("run", sa.Integer, primary_key=True),
        sa.Column("operation_id", name_type(400), primary_key=True),
        sa.Column("kind", name_type(8), nullable=False),
        sa.Column("name", name_type(200), nullable=False),
        sa.Column("subject", name_type(200), nullable=False),
        sa.Column("since", sa.BigInteger, nullable=False),
    )
    index("romancy_waits_topic", "romancy_waits", ["kind", "name", "subject", "instance_id"])
    table(
        "romancy_mail",
        sa.Column("to_id", name_type(200), primary_key=True),
        sa.Column("mail_id", name_type(36), primary_key=True),
        sa.Column("kind", name_type(8), nullable=False),
        sa.Column("name", name_type(200), nullable=False),
        sa.Column("subject", name_type(200), nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    index("romancy_mail_expires", "romancy_mail", ["expires_at"])
    index("romancy_mail_name", "romancy_mail", ["to_id", "kind", "name", "mail_id"])
    # The last, which PostgreSQL prefers as long as it has no statistics.
    index("romancy_mail_subject", "romancy_mail", ["to_id", "kind", "name", "subject", "mail_id"])
    table(
        "romancy_deliveries",
        sa.Column("instance_id", name_type(200), primary_key=True),
        sa.Column("run", sa.Integer, primary_key=True),
        sa.Column("operation_id", name_type(400), primary_key=True),
        sa.Column("to_id", name_type(200), nullable=False),
        sa.Column("mail_id", name_type(36), nullable=False),
        sa.Column("kind", name_type(8), nullable=False),
        sa.Column("name", name_type(200), nullable=False),
        sa.Column("subject", name_type(200), nullable=False),
        sa.Column("body", TEXT, nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    table(
        "romancy_channels",
        sa.Column("name", name_type(200), primary_key=True),
        sa.Column("mode", name_type(12), nullable=False),
    )
    table(
        "romancy_subscriptions",
        sa.Column("channel", name_type(200), primary_key=True),
        sa.Column("instance_id", name_type(200), primary_key=True),
    )
    index("romancy_subscriptions_instance", "romancy_subscriptions", ["instance_id"])
    table(
        "romancy_seen",
        sa.Column("digest", name_type(64), primary_key=True),
        sa.Column("mail_id", name_type(36), nullable=False),
        sa.Column("expires_at", sa.BigInteger, nullable=False),
    )
    index("romancy_seen_expires", "romancy_seen", ["expires_at"])
    table("romancy_slots", sa.Column("slot", sa.Integer, primary_key=True, autoincrement=False))
    if connection.dialect.name != "sqlite":
        slots = sa.table("romancy_slots", sa.column("slot", sa.Integer))
        filled = set(connection.execute(sa.select(slots.c.slot)).scalars())
        missing = [{"slot": slot} for slot in range(SLOTS) if slot not in filled]
        if missing:
            connection.execute(sa.insert(slots), missing)
