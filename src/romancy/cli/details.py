"""One instance, for a reader: what is known of it, and what to do next."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime

from romancy.cli.screen import Screen
from romancy.cli.tables import NARROWEST, STATUS_STYLES, took
from romancy.cli.text import command, duration, exact_time, printable, printable_lines, wrap
from romancy.model import ErrorInfo, Instance, PendingActivity, Status

INDENT = 2


def instance_details(instance: Instance, screen: Screen, now: datetime) -> str:
    """All of an instance, top to bottom: facts, input, result or error."""
    lines = [screen.paint(screen.show(printable(instance.instance_id)), "bold")]
    lines += _facts(instance, screen, now)
    for activity in instance.pending:
        name = f"activity {activity.activity_id}"
        lines += _section(name, "\n".join(_pending(activity, now)), screen)
    lines += _section("input", _payload(instance.input), screen)
    if instance.status is Status.COMPLETED:
        lines += _section("result", _payload(instance.result), screen)
    if instance.error is not None:
        name = instance.error.type.removeprefix("builtins.")
        lines += _section("error", f"{name}: {instance.error.message}", screen, "red")
        frames = _frames(instance.error)
        if frames:
            lines += ["", *_body(frames, screen, "dim")]
    return "\n".join(lines)


def next_steps(instance: Instance, database: str) -> Iterator[str]:
    """What one may do about an instance, a line each: sentences, and commands to copy."""
    match instance.status:
        case Status.SUSPENDED:
            yield "Mend the cause of the error, then let it go on from its history:"
            yield command("resume", instance.instance_id, "--database", database)
        case Status.FAILED:
            yield "Mend the cause of the error, then let it go on from what failed:"
            yield command("retry", instance.instance_id, "--database", database)
        case Status.PENDING:
            yield f"It waits for a worker that has the workflow {instance.workflow_name}:"
            yield command("worker", "module:app")
        case _:
            pass
    yield "Each step it has taken:"
    yield command("history", instance.instance_id, "--database", database)


def _facts(instance: Instance, screen: Screen, now: datetime) -> Iterator[str]:
    facts = list(_list_facts(instance, now))
    longest = max(len(name) for name, _ in facts)
    start = INDENT + longest + 2
    for name, fact in facts:
        style = STATUS_STYLES.get(instance.status, "") if name == "status" else ""
        lines = wrap(screen.show(printable(fact)), max(screen.width - start, NARROWEST))
        label = " " * INDENT + screen.paint(name, "dim") + " " * (longest + 2 - len(name))
        for n, line in enumerate(lines):
            yield (" " * start if n else label) + screen.paint(line, style)


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


def _pending(activity: PendingActivity, now: datetime) -> Iterator[str]:
    if activity.next_attempt_at is not None:
        times = "attempt has" if activity.attempts == 1 else "attempts have"
        is_due = activity.next_attempt_at <= now
        due = "the next one runs" if is_due else f"next {_moment(activity.next_attempt_at, now)}"
        yield f"{activity.attempts} {times} failed, {due}"
    if activity.last_error is not None:
        yield f"{activity.last_error.type.removeprefix('builtins.')}: {activity.last_error.message}"
    if activity.heartbeat_at is not None:
        told = json.dumps(activity.heartbeat, ensure_ascii=False)
        yield f"last heartbeat {_moment(activity.heartbeat_at, now)}: {told}"


def _moment(time: datetime, now: datetime) -> str:
    away = f"in {duration(time - now)}" if time > now else f"{duration(now - time)} ago"
    return f"{exact_time(time)} {time.astimezone():%z} ({away})"


def _section(name: str, text: str, screen: Screen, style: str = "") -> list[str]:
    return ["", screen.paint(name, "bold"), *_body(text, screen, style)]


def _body(text: str, screen: Screen, style: str) -> Iterator[str]:
    """The text's lines, indented, and broken where the screen ends."""
    for line in screen.show(printable_lines(text)).split("\n"):
        for part in wrap(line, max(screen.width - INDENT, NARROWEST)):
            yield " " * INDENT + screen.paint(part, style) if part else ""


def _payload(value: object) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _frames(error: ErrorInfo) -> str:
    """The traceback without its last line, which says again what the error is."""
    text = error.traceback.rstrip()
    message = error.message.rstrip()
    return text.removesuffix(message).rpartition("\n")[0] if text.endswith(message) else text
