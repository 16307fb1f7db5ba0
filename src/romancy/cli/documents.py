"""Records as JSON, for programs."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from typing import Any

from romancy.model import ErrorInfo, HistoryEvent, Instance, InstancePage, PendingActivity


def to_json(document: Any, *, indent: int | None = 2) -> str:
    """One JSON document in ASCII, so that no terminal obeys what payloads hold."""
    return json.dumps(document, indent=indent).replace("\x7f", "\\u007f")


def of_record(record: Instance | HistoryEvent | PendingActivity | ErrorInfo) -> dict[str, Any]:
    """An object with the record's own names; times in ISO 8601, in UTC, with microseconds."""
    return {field.name: _plain(getattr(record, field.name)) for field in dataclasses.fields(record)}


def of_page(page: InstancePage) -> dict[str, Any]:
    """A page with ``instances``, ``has_more`` and ``next_page_token``."""
    instances = [of_record(instance) for instance in page.instances]
    return {"instances": instances, "has_more": page.has_more, "next_page_token": page.next_page_token}


def of_error(error: Exception) -> dict[str, Any]:
    """What every command prints when it fails."""
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat(timespec="microseconds")
    if isinstance(value, ErrorInfo | PendingActivity):
        return of_record(value)
    return [_plain(part) for part in value] if isinstance(value, tuple) else value
