"""What belongs to a start: its id, the row of a new instance, and whether an old one of that id was started alike."""

from __future__ import annotations

from typing import Any

from romancy.definitions import Workflow
from romancy.errors import InstanceConflictError, SerializationError
from romancy.model import Status
from romancy.storage.rows import StartRow


def pending_row(instance_id: str, definition: Workflow[..., Any], text: str, now: int) -> StartRow:
    """A new instance that any worker may take."""
    return StartRow(
        instance_id, 1, definition.name, Status.PENDING.value, None, 0, 0, now, None, now,
        definition.source_hash, text,
    )  # fmt: skip


def check_same(instance_id: str, definition: Workflow[..., Any], text: str, found: tuple[str, str]) -> None:
    """Whether the instance that has this id already was started alike.

    Args:
        found: its workflow's name and its stored input.

    Raises:
        InstanceConflictError: it was not.
    """
    name, stored = found
    if name != definition.name:
        raise InstanceConflictError(
            f"instance {instance_id!r} is of workflow {name!r}, not {definition.name!r}: choose another id"
        )
    if not _same_input(definition, stored, text):
        raise InstanceConflictError(
            f"instance {instance_id!r} was started with another input: choose another id, or take "
            f"app.get_handle({instance_id!r}) for the one that runs"
        )


def _same_input(definition: Workflow[..., Any], stored: str, text: str) -> bool:
    if stored == text:
        return True
    try:
        return definition.signature.decode_input(stored) == definition.signature.decode_input(text)
    except SerializationError:
        return False
