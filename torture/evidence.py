"""What a run has left behind, as records: rows of the database, lines of files."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.databases import Database, rows

from torture.folder import Folder, read


@dataclass(frozen=True, slots=True)
class InstanceRow:
    """An instance as the database has it; ``result`` is JSON text."""

    instance_id: str
    run: int
    workflow: str
    status: str
    owner: str | None
    result: str | None
    error: str | None = None
    completed_at: int | None = None
    patches: str | None = None


@dataclass(frozen=True, slots=True)
class EventRow:
    """A row of history; what is received, JSON text, is in ``result``."""

    instance_id: str
    run: int
    seq: int
    kind: str
    operation_id: str | None
    name: str | None
    attempt: int = 0
    input: str | None = None
    result: str | None = None
    error: str | None = None

    @property
    def token(self) -> str:
        """The activity's token: its idempotency key."""
        return f"{self.instance_id}/{self.run}/{self.operation_id}"


@dataclass(frozen=True, slots=True)
class Stranger:
    """A row of history that was written by a process which did not own the instance, or was dead to the others."""

    instance_id: str
    run: int
    seq: int
    writer: int
    owner: int | None


@dataclass(frozen=True, slots=True)
class Evidence:
    """All of it.

    Attributes:
        history: by instance, run and ``seq``.
        ledger: tokens, in the order in which they were inserted.
        lines: tokens of the attempts that ran.
        acknowledged: what the client has noted.
        strangers: rows of history by the wrong process.
        unfinished: ids of instances that had not ended in time, each with how late it was, if it ended at all.
        complaints: lines of the logs that should not be there.
        parked: how often an instance of ``changing`` was parked, for the process had other code.
    """

    instances: list[InstanceRow] = field(default_factory=list)
    history: list[EventRow] = field(default_factory=list)
    ledger: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    acknowledged: list[dict[str, Any]] = field(default_factory=list)
    strangers: list[Stranger] = field(default_factory=list)
    unfinished: dict[str, float | None] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    parked: int = 0


FORBIDDEN_IN_LOGS = ("unforeseen", "never retrieved", " ERROR asyncio ", " is suspended: ")
NOT_OURS = ("_terminate_graceful_close",)
"""SQLAlchemy gives up closing a connection of aiosqlite after 2 s, when its cancelled statement waits for a lock."""
LINES_OF_AN_END = 12
"""Enough for the last frames of a traceback and its exception."""
FORESEEN = re.compile(r" of workflow changing is suspended: .*the history expects")
"""Its code differs from process to process, on purpose."""


def gather(database: Database, folder: Folder, unfinished: dict[str, float | None], logs: list[str]) -> Evidence:
    """Read everything; the processes have ended."""
    journal = folder.journal.read_text().splitlines() if folder.journal.exists() else []
    return Evidence(
        instances=[
            InstanceRow(*row)
            for row in rows(
                database,
                "SELECT instance_id, run, workflow_name, status, owner, result, error, completed_at, patches "
                "FROM romancy_instances",
            )
        ],
        history=[
            EventRow(*row)
            for row in rows(
                database,
                "SELECT instance_id, run, seq, kind, operation_id, name, attempt, input, result, error "
                "FROM romancy_history "
                "ORDER BY instance_id, run, seq",
            )
        ],
        ledger=[token for (token,) in rows(database, "SELECT token FROM ledger ORDER BY id")],
        lines=[line.rsplit(" ", 3)[0] for line in journal],
        acknowledged=read(folder.acknowledged),
        strangers=[Stranger(*row) for row in rows(database, "SELECT * FROM torture_audit")],
        unfinished=unfinished,
        complaints=[f"{name}: {entry}" for name in logs for entry in complaints_in(folder.log(name))],
        parked=sum(len(FORESEEN.findall(_text_of(folder.log(name)))) for name in logs),
    )


def _text_of(log: Path) -> str:
    return log.read_text() if log.exists() else ""


def complaints_in(log: Path) -> list[str]:
    """What should not be in a log: of each entry the first line, and of one that tells more also its end."""
    entries = re.split(r"\n(?=\d{4}-\d\d-\d\d )", _text_of(log))
    return [
        _in_short(entry.rstrip().split("\n"))
        for entry in entries
        if any(words in entry for words in FORBIDDEN_IN_LOGS)
        and not any(words in entry for words in NOT_OURS)
        and not FORESEEN.search(entry)
    ]


def _in_short(lines: list[str]) -> str:
    shown = lines if len(lines) <= 1 + LINES_OF_AN_END else [lines[0], "…", *lines[-LINES_OF_AN_END:]]
    return "\n    ".join(shown)


def decoded(text: str | None) -> Any:
    """A stored value."""
    return None if text is None else json.loads(text)
