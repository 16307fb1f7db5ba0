"""Where processes begin; what they need is imported there only, for its definitions are not for the torture itself."""

from __future__ import annotations

from tests.databases import Database

from torture.folder import Folder


def worker(database: Database, folder: Folder, name: str) -> None:
    """Run a worker."""
    from torture.worker import main

    main(database, folder, name)


def client(database: Database, folder: Folder, seed: int) -> None:
    """Run the client."""
    from torture.client import main

    main(database, folder, seed)
