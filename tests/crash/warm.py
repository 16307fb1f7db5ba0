"""Imported once by the process that children are forked from: what each of them would import and compile anew.

It runs the children's workflow to its end, in a database that vanishes; then it is as quiet as before.
"""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import sqlalchemy.dialects.mysql.asyncmy
import sqlalchemy.dialects.postgresql.psycopg  # noqa: F401

from romancy.storage.address import parse_address
from romancy.storage.stores import make_store
from tests.crash import child
from tests.ledger import create_ledger


def warm_up() -> None:
    """Run the workflow."""
    with TemporaryDirectory() as folder:
        database = Path(folder) / "romancy.db"
        create_ledger(database)
        child.tokens_file = Path(folder) / "tokens.txt"
        asyncio.run(child.finish(database))
    for address in ("postgresql://nowhere/none", "mysql://nowhere/none"):
        make_store(parse_address(address), [])
    assert threading.active_count() == 1, "a process that has threads must not fork"
    gc.collect()
    gc.freeze()


warm_up()
