"""The tables, defined once for all databases.

All times are microseconds since the epoch, by the database's clock where workers share it. Tables are named
``romancy_*``, for they live in the user's database.

``romancy_instances.ready_at`` says when an instance without an owner may be claimed: 0 at once, a time for
sleepers, NULL never (suspended or ended).
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import BigInteger, Column, Connection, Index, Integer, MetaData, String, Table, event
from sqlalchemy import Text as AnyText

metadata = MetaData()

# On MySQL the least length that makes it a LONGTEXT.
Text = AnyText().with_variant(AnyText(1 << 24), "mysql", "mariadb")

# Texts are equal if their characters are, and sort by these: on MySQL by a collation without padding.
OPTIONS = {
    "mysql_engine": "InnoDB",
    "mariadb_engine": "InnoDB",
    "mysql_default_charset": "utf8mb4",
    "mariadb_default_charset": "utf8mb4",
    "mysql_collate": "utf8mb4_0900_bin",
    "mariadb_collate": "utf8mb4_nopad_bin",
}


def name_type(length: int) -> String:
    """The type of a column that holds a name or an id."""
    return String(length).with_variant(String(length, collation="C"), "postgresql")


instances = Table(
    "romancy_instances",
    metadata,
    Column("instance_id", name_type(200), primary_key=True),
    Column("run", Integer, nullable=False),
    Column("workflow_name", name_type(200), nullable=False),
    Column("status", name_type(24), nullable=False),
    Column("owner", name_type(36)),
    Column("ready_at", BigInteger),
    Column("claims", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("updated_at", BigInteger, nullable=False),
    Column("completed_at", BigInteger),
    Column("source_hash", name_type(16)),
    Column("input", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
    Column("parent_id", name_type(200)),
    Column("patches", Text),
    Column("seed", name_type(220)),
)

Index("romancy_instances_created", instances.c.created_at, instances.c.instance_id)
_active = Index(
    "romancy_instances_active",
    instances.c.owner,
    instances.c.ready_at,
    sqlite_where=instances.c.completed_at.is_(None),
)

history = Table(
    "romancy_history",
    metadata,
    Column("instance_id", name_type(200), primary_key=True),
    Column("run", Integer, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("kind", name_type(40), nullable=False),
    Column("operation_id", name_type(400)),
    Column("name", name_type(200)),
    Column("position", Integer),
    Column("attempt", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("due_at", BigInteger),
    Column("input", Text),
    Column("result", Text),
    Column("error", Text),
    sqlite_with_rowid=False,
)

workers = Table(
    "romancy_workers",
    metadata,
    Column("worker_id", name_type(36), primary_key=True),
    Column("name", name_type(200), nullable=False),
    Column("state", name_type(8), nullable=False),
    Column("host", name_type(120), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_started", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
)

# -- what is sent to instances: events, messages, outcomes of children, requests ---------------------
#
# A wait and a mail of the same kind, name and subject meet under the lock of their slot, and become a delivery: the
# wait and the mail go, the delivery stays until the instance has recorded it.

waits = Table(
    "romancy_waits",
    metadata,
    Column("instance_id", name_type(200), primary_key=True),
    Column("run", Integer, primary_key=True),
    Column("operation_id", name_type(400), primary_key=True),
    Column("kind", name_type(8), nullable=False),
    Column("name", name_type(200), nullable=False),
    Column("subject", name_type(200), nullable=False),
    Column("since", BigInteger, nullable=False),
)
Index("romancy_waits_topic", waits.c.kind, waits.c.name, waits.c.subject, waits.c.instance_id)

mail = Table(
    "romancy_mail",
    metadata,
    Column("to_id", name_type(200), primary_key=True),
    Column("mail_id", name_type(36), primary_key=True),
    Column("kind", name_type(8), nullable=False),
    Column("name", name_type(200), nullable=False),
    Column("subject", name_type(200), nullable=False),
    Column("body", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)
Index("romancy_mail_subject", mail.c.to_id, mail.c.kind, mail.c.name, mail.c.subject, mail.c.mail_id)
Index("romancy_mail_name", mail.c.to_id, mail.c.kind, mail.c.name, mail.c.mail_id)
Index("romancy_mail_expires", mail.c.expires_at)

deliveries = Table(
    "romancy_deliveries",
    metadata,
    Column("instance_id", name_type(200), primary_key=True),
    Column("run", Integer, primary_key=True),
    Column("operation_id", name_type(400), primary_key=True),
    Column("to_id", name_type(200), nullable=False),
    Column("mail_id", name_type(36), nullable=False),
    Column("kind", name_type(8), nullable=False),
    Column("name", name_type(200), nullable=False),
    Column("subject", name_type(200), nullable=False),
    Column("body", Text, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)

channels = Table(
    "romancy_channels",
    metadata,
    Column("name", name_type(200), primary_key=True),
    Column("mode", name_type(12), nullable=False),
)

subscriptions = Table(
    "romancy_subscriptions",
    metadata,
    Column("channel", name_type(200), primary_key=True),
    Column("instance_id", name_type(200), primary_key=True),
)
Index("romancy_subscriptions_instance", subscriptions.c.instance_id)

seen = Table(
    "romancy_seen",
    metadata,
    Column("digest", name_type(64), primary_key=True),
    Column("mail_id", name_type(36), nullable=False),
    Column("expires_at", BigInteger, nullable=False),
)
Index("romancy_seen_expires", seen.c.expires_at)

slots = Table("romancy_slots", metadata, Column("slot", Integer, primary_key=True, autoincrement=False))

SLOTS = 64
"""Rows of that table, on servers; whoever lets waits and mail meet locks the slot of their topic."""

SCHEMA_VERSION = "0002"
VERSION_TABLE = "romancy_schema_version"


@event.listens_for(metadata, "before_create")
def _give_options(_metadata: MetaData, connection: Connection, **_: Any) -> None:
    """What only one kind of server is told; each option makes SQLAlchemy load that server's dialect, so not earlier."""
    kind = connection.dialect.name
    for table in metadata.tables.values():
        table.dialect_kwargs.update({name: value for name, value in OPTIONS.items() if name.startswith(f"{kind}_")})
    if kind == "postgresql":
        _active.dialect_kwargs["postgresql_where"] = instances.c.completed_at.is_(None)
