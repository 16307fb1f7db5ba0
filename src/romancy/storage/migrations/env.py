"""Alembic's entry: runs on the connection that ``romancy.storage.migrate`` hands over, in its transaction."""

from alembic import context

from romancy.storage.schema import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
    transactional_ddl=False,
)
context.run_migrations()
