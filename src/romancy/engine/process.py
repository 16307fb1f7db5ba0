"""Who this process is, and whether another process of the same host still lives."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from romancy.storage.rows import WorkerRow


@cache
def host_identity() -> str:
    """The same for processes that can see each other's process ids, and for no others.

    Containers on one machine share its boot id, but not the namespace of process ids.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()
    return f"{boot}/{namespace}"


def process_started(pid: int) -> int | None:
    """When the process began, in ticks since boot; 0 where that can't be told; ``None`` when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return None if Path("/proc/self/stat").exists() else _probe(pid)
    except OSError:
        return 0
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def _probe(pid: int) -> int | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return 0
    return 0


def is_gone(worker: WorkerRow) -> bool:
    """Whether the worker's process is known to have ended. ``False`` also when that can't be known."""
    if worker.host != host_identity():
        return False
    started = process_started(worker.pid)
    return started is None or started != worker.process_started
