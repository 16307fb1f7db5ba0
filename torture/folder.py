"""The folder of one run: who writes what where."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Folder:
    """The files by which the processes of a run speak to each other, and to the checker."""

    path: Path

    @property
    def journal(self) -> Path:
        """A line for each attempt of an activity."""
        return self.path / "journal.txt"

    @property
    def acknowledged(self) -> Path:
        """What was acknowledged to the client, as JSON lines."""
        return self.path / "acknowledged.jsonl"

    @property
    def stop(self) -> Path:
        """While this file is there, the client begins nothing new."""
        return self.path / "stop"

    @property
    def deaf(self) -> Path:
        """While this file is there, hints from other processes are lost."""
        return self.path / "deaf"

    def mend(self, key: str, level: int) -> None:
        """Let ``flows.strain`` with this key succeed up to this level; what is mended stays so."""
        self.mended.mkdir(exist_ok=True)
        if level > self.mended_level(key):
            draft = self.mended / f"{key}.{os.getpid()}"
            draft.write_text(str(level))
            draft.replace(self.mended / key)

    def mended_level(self, key: str) -> int:
        """Up to which level something was mended."""
        file = self.mended / key
        return int(file.read_text()) if file.exists() else 0

    @property
    def mended(self) -> Path:
        """A folder with a file for each thing that was broken: up to which level it was mended."""
        return self.path / "mended"

    def log(self, name: str) -> Path:
        """What a process has to say."""
        return self.path / f"{name}.log"


def append(file: Path, record: dict[str, Any]) -> None:
    """Append a JSON line in one write."""
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(descriptor, (json.dumps(record) + "\n").encode())
    finally:
        os.close(descriptor)


def read(file: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file; none, if it is not there."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]
