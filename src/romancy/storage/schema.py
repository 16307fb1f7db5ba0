"""The tables, defined once for all databases.

All times are microseconds since the epoch, by the database's clock where workers share it. Tables are named
``romancy_*``, for they live in the user's database.

``romancy_instances.ready_at`` says when an instance without an owner may be claimed: 0 at once, a time for
sleepers, NULL never (suspended or ended).
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Index, Integer, MetaData, String, Table, Text

metadata = MetaData()

instances = Table(
    "romancy_instances",
    metadata,
    Column("instance_id", String(200), primary_key=True),
    Column("run", Integer, nullable=False),
    Column("workflow_name", String(200), nullable=False),
    Column("status", String(24), nullable=False),
    Column("owner", String(36)),
    Column("ready_at", BigInteger),
    Column("claims", Integer, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("started_at", BigInteger),
    Column("updated_at", BigInteger, nullable=False),
    Column("completed_at", BigInteger),
    Column("source_hash", String(16)),
    Column("input", Text, nullable=False),
    Column("result", Text),
    Column("error", Text),
)

Index("romancy_instances_created", instances.c.created_at, instances.c.instance_id)
Index(
    "romancy_instances_active",
    instances.c.owner,
    instances.c.ready_at,
    sqlite_where=instances.c.completed_at.is_(None),
    postgresql_where=instances.c.completed_at.is_(None),
)

history = Table(
    "romancy_history",
    metadata,
    Column("instance_id", String(200), primary_key=True),
    Column("run", Integer, primary_key=True),
    Column("seq", Integer, primary_key=True),
    Column("kind", String(40), nullable=False),
    Column("operation_id", String(400)),
    Column("name", String(200)),
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
    Column("worker_id", String(36), primary_key=True),
    Column("name", String(200), nullable=False),
    Column("state", String(8), nullable=False),
    Column("host", String(120), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("process_started", BigInteger, nullable=False),
    Column("started_at", BigInteger, nullable=False),
    Column("lease_until", BigInteger, nullable=False),
)

SCHEMA_VERSION = "0001"
VERSION_TABLE = "romancy_schema_version"
