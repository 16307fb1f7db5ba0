"""One instance, for a reader: what is known of it, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

from rich.console import Group, RenderableType
from rich.highlighter import JSONHighlighter
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from romancy.cli.tables import STATUS_STYLES, took
from romancy.cli.text import command, duration, exact_time, printable, printable_lines
from romancy.model import ErrorInfo, Instance, Status

INDENT = 2


def instance_details(instance: Instance, now: datetime) -> RenderableType:
    """All of an instance, top to bottom: facts, input, result or error."""
    parts: list[RenderableType] = [Text(printable(instance.instance_id), style="bold"), _facts(instance, now)]
    parts += [_heading("input"), _payload(instance.input)]
    if instance.status is Status.COMPLETED:
        parts += [_heading("result"), _payload(instance.result)]
    if instance.error is not None:
        parts += [_heading("error"), _error(instance.error)]
    return Group(*parts)


def next_steps(instance: Instance, database: str) -> Iterator[str]:
    """What one may do about an instance, a line each: sentences, and commands to copy."""
    match instance.status:
        case Status.SUSPENDED:
            yield "Mend the cause of the error, then let it go on from its history:"
            yield command("resume", instance.instance_id, "--database", database)
        case Status.FAILED:
            yield "A failed instance stays failed: mend the cause, and start another under a new id."
        case Status.PENDING:
            yield f"It waits for a worker that has the workflow {instance.workflow_name}:"
            yield command("worker", "module:app")
        case _:
            pass
    yield "Each step it has taken:"
    yield command("history", instance.instance_id, "--database", database)


def _facts(instance: Instance, now: datetime) -> RenderableType:
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, fact in _list_facts(instance, now):
        style = STATUS_STYLES.get(instance.status, "") if name == "status" else ""
        facts.add_row(name, Text(printable(fact), style=style))
    return _indented(facts)


def _list_facts(instance: Instance, now: datetime) -> Iterator[tuple[str, str]]:
    yield "workflow", instance.workflow_name
    yield "status", instance.status
    yield "run", str(instance.run)
    yield "created", _moment(instance.created_at, now)
    if instance.started_at is not None:
        yield "started", _moment(instance.started_at, now)
    if instance.completed_at is None:
        yield "updated", _moment(instance.updated_at, now)
    else:
        yield "ended", _moment(instance.completed_at, now)
        yield "took", took(instance, now)
    if instance.next_wake_at is not None and instance.completed_at is None:
        yield "goes on", _moment(instance.next_wake_at, now)
    if instance.worker_id is not None:
        yield "worker", instance.worker_id
    if instance.claims:
        yield "taken over", f"{instance.claims} x from dead workers, since it last came forward"
    if instance.source_hash is not None:
        yield "code hash", instance.source_hash


def _moment(time: datetime, now: datetime) -> str:
    away = f"in {duration(time - now)}" if time > now else f"{duration(now - time)} ago"
    return f"{exact_time(time)} {time.astimezone():%z} ({away})"


def _heading(name: str) -> Text:
    return Text(f"\n{name}", style="bold")


def _payload(value: object) -> RenderableType:
    text = Text(printable_lines(json.dumps(value, indent=2, ensure_ascii=False)), overflow="fold")
    JSONHighlighter().highlight(text)
    return _indented(text)


def _error(error: ErrorInfo) -> RenderableType:
    name = error.type.removeprefix("builtins.")
    summary = Text(printable_lines(f"{name}: {error.message}"), style="red", overflow="fold")
    frames = _frames(error)
    if not frames:
        return _indented(summary)
    return _indented(Group(summary, Text(), Text(printable_lines(frames), style="dim", overflow="fold")))


def _frames(error: ErrorInfo) -> str:
    """The traceback without its last line, which says again what the error is."""
    text = error.traceback.rstrip()
    message = error.message.rstrip()
    return text.removesuffix(message).rpartition("\n")[0] if text.endswith(message) else text


def _indented(part: RenderableType) -> Padding:
    return Padding(part, (0, 0, 0, INDENT), expand=False)
