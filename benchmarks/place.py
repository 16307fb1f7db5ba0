"""Where a measurement of Romancy keeps its data: a SQLite file in a fresh folder, or an empty database on a server."""

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import connections
from peers.common import Result

import databases
import romancy

FILE = "romancy.db"
Work = Callable[[argparse.Namespace, "Place"], Awaitable[Result]]


class Place:
    """A database, before and while an app uses it.

    Args:
        folder: where the SQLite file is.
        url: a database on a server; instead of the folder.

    Attributes:
        address: what to give to ``App``.
    """

    def __init__(self, folder: Path | None, url: str | None) -> None:
        self._folder = folder
        self._url = url
        self.address: Path | str = url if url is not None else self.folder / FILE
        self._connection: Any = None

    @property
    def folder(self) -> Path:
        """The folder of the SQLite file."""
        if self._folder is None:
            raise RuntimeError("this work is for SQLite: give --dir")
        return self._folder

    @property
    def is_server(self) -> bool:
        return self._url is not None

    @property
    def options(self) -> list[str]:
        """What makes another process of the same script use the same database."""
        return ["--dir", str(self.folder)] if self._url is None else ["--database", self._url]

    def ask(self, query: str) -> Any:
        """Ask the database on a connection of the benchmark's own; the first value of the answer."""
        return databases.fetch(self.connection, query)[0]

    @property
    def connection(self) -> Any:
        """A connection of the benchmark's own."""
        if self._connection is None:
            self._connection = databases.connect(self._url or self.folder / FILE)
        return self._connection

    async def until(self, query: str, wanted: int, every_s: float) -> None:
        """Wait until the answer is so much."""
        while self.ask(query) != wanted:
            await asyncio.sleep(every_s)

    def watch(self, *, is_traced: bool = False) -> connections.Watch:
        """Watch the connections that apps of this process open from now on; traced, ``address`` is another one."""
        if self._url is None:
            return connections.watch_sqlite(is_traced=is_traced)
        watching = connections.ServerWatch(self._url, is_traced)
        self.address = watching.address
        return watching


def add_place(parser: argparse.ArgumentParser) -> None:
    """The options that say where."""
    parser.add_argument("--dir", type=Path, help="where to put a SQLite database (default: the system's temp)")
    parser.add_argument("--database", help="instead: an empty database on a server, as postgresql://… or mysql://…")


def run_work(args: argparse.Namespace, works: Mapping[str, Work]) -> None:
    """Do the work that was asked for, in a fresh place unless another process made it, and print its result."""
    work = works[args.work]
    if args.database is not None:
        result = asyncio.run(work(args, Place(None, args.database)))
    elif args.phase:
        result = asyncio.run(work(args, Place(args.dir, None)))
    else:
        with tempfile.TemporaryDirectory(prefix="romancy-", dir=args.dir, ignore_cleanup_errors=True) as made:
            result = asyncio.run(work(args, Place(Path(made), None)))
    head = {} if args.phase else {"system": "romancy", "version": romancy.__version__, "work": args.work}
    print(json.dumps(head | result), flush=True)


def again(work: str, phase: str, place: Place, **options: object) -> list[str]:
    """The command that runs another phase of this script's work in a process of its own."""
    listed = [part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    return [sys.executable, sys.argv[0], work, *listed, *place.options, "--phase", phase]
