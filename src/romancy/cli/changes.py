"""The commands that change what is in a database: instances told what to do, events and messages sent to them."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import click

from romancy.cli import database as db
from romancy.cli import documents
from romancy.cli.options import database_option, instance_argument, json_option
from romancy.cli.output import errors_shown, print_json, print_line
from romancy.errors import InstanceStateError
from romancy.model import Instance, Status

if TYPE_CHECKING:
    from romancy.app import App


def _read_json(_context: click.Context, _option: click.Parameter, given: str | None) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    if given is None:
        return None
    try:
        return json.loads(sys.stdin.read() if given == "-" else given, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(f"this is no JSON: {error}. A text needs quotes within: '\"a text\"'") from None


data_option = click.option(
    "--data",
    metavar="JSON",
    callback=_read_json,
    help="What it says, as JSON: 17, '\"a text\"', '{\"amount\": 17}'; - reads it from the standard input. "
    "By default null.",
)


# -- instances -------------------------------------------------------------------------------------


@click.command(short_help="Let a suspended instance go on.")
@instance_argument
@database_option
@json_option
def resume(instance_id: str, database: str, as_json: bool) -> None:
    """Let a suspended instance go on, from its history, with the code as it is now."""
    with errors_shown(as_json):
        instance = _change(database, instance_id, lambda app: app.resume(instance_id))
        words = f"resumed {instance.instance_id}: it goes on as soon as a worker is free ({instance.status})"
        _show(instance, words, as_json)


@click.command()
@instance_argument
@database_option
@json_option
def suspend(instance_id: str, database: str, as_json: bool) -> None:
    """Set an instance aside until it is resumed.

    What it waits for is kept for it.
    """
    with errors_shown(as_json):
        instance = _change(database, instance_id, lambda app: app.suspend(instance_id))
        words = f"asked to suspend {instance.instance_id}: a worker sees to it ({instance.status} now)"
        if instance.status is Status.SUSPENDED:
            words = f"suspended {instance.instance_id}: it stays so until it is resumed"
        _show(instance, words, as_json)


@click.command(short_help="Ask an instance to end, and to take back what it did.")
@instance_argument
@database_option
@click.option("--reason", metavar="TEXT", help="Why, for people; it ends up in the history.")
@json_option
def cancel(instance_id: str, database: str, reason: str | None, as_json: bool) -> None:
    """Ask an instance to end: what it did is compensated, and its status is cancelled then.

    The request is stored at once, and never waits for the worker that runs the instance.
    """

    async def ask(app: App) -> None:
        if not await app.cancel(instance_id, reason):
            instance = await app.get_instance(instance_id)
            status = "gone" if instance is None else instance.status
            raise InstanceStateError(f"instance {instance_id!r} is {status}: there is nothing to cancel")

    with errors_shown(as_json):
        instance = _change(database, instance_id, ask)
        words = f"asked to cancel {instance.instance_id}: a worker sees to it ({instance.status} now)"
        _show(instance, words, as_json)


@click.command(short_help="Let a failed instance go on from what failed.")
@instance_argument
@database_option
@json_option
def retry(instance_id: str, database: str, as_json: bool) -> None:
    """Let a failed instance go on from what made it fail.

    The activity is attempted anew, its retries included; what was recorded before is not done again.
    """

    async def again(app: App) -> None:
        await app.retry(instance_id)

    with errors_shown(as_json):
        instance = _change(database, instance_id, again)
        _show(instance, f"{instance.instance_id} goes on as soon as a worker is free ({instance.status})", as_json)


@click.command(short_help="Start a new instance with a part of another's history.")
@instance_argument
@database_option
@click.option(
    "--from-activity",
    metavar="ACTIVITY",
    required=True,
    help="The first that is done anew, and all after it, such as charge:1; romancy history names them.",
)
@click.option("--new-id", metavar="ID", help="The new instance's id; by default a new UUID.")
@json_option
def fork(instance_id: str, database: str, from_activity: str, new_id: str | None, as_json: bool) -> None:
    """Start a new instance with the history of another up to an activity.

    The other is left as it is.
    """

    async def run() -> Instance:
        async with db.open_app(database) as (app, queries):
            await db.read_instance(queries, instance_id, database)
            handle = await app.fork(instance_id, from_activity=from_activity, id=new_id)
            return await db.read_instance(queries, handle.instance_id, database)

    with errors_shown(as_json):
        instance = asyncio.run(run())
        _show(instance, f"started {instance.instance_id}, with the history of {instance_id}", as_json)


# -- events and messages ---------------------------------------------------------------------------


@click.command("send-event", short_help="Send an event to the workflows that wait for it.")
@click.argument("event_type", metavar="TYPE")
@database_option
@data_option
@click.option("--key", metavar="KEY", help="The event's key, for those who wait for this one.")
@click.option("--to", "instance_id", metavar="ID", help="The one instance that it is for.")
@click.option("--source", metavar="SOURCE", default="romancy", show_default=True, help="Who says so.")
@click.option("--event-id", metavar="ID", help="Unique within its source; sent again, it counts once.")
@json_option
def send_event(
    event_type: str,
    database: str,
    data: Any,
    key: str | None,
    instance_id: str | None,
    source: str,
    event_id: str | None,
    as_json: bool,
) -> None:
    """Send an event of this TYPE, such as payment.completed.

    With a key, or to one instance, it is kept until somebody waits for it, for 24 hours; without, it reaches those who
    wait now.
    """

    async def send() -> bool:
        async with db.open_app(database) as (app, queries):
            if instance_id is not None:
                await db.read_instance(queries, instance_id, database)
            return await app.send_event(event_type, data, key=key, instance_id=instance_id, source=source, id=event_id)

    with errors_shown(as_json):
        is_new = asyncio.run(send())
        if as_json:
            print_json({"event_type": event_type, "is_new": is_new})
        elif not is_new:
            print_line(f"event {event_id} of source {source} was sent before: it counts once")
        elif key is None and instance_id is None:
            print_line(f"sent event {event_type} to those who wait for it now")
        else:
            print_line(f"sent event {event_type}: it is kept until somebody waits for it, for 24 hours")


@click.command(short_help="Publish a message on a channel.")
@click.argument("channel", metavar="CHANNEL")
@database_option
@data_option
@click.option("--to", "instance_id", metavar="ID", help="Into this one instance's mailbox, on a direct channel.")
@json_option
def publish(channel: str, database: str, data: Any, instance_id: str | None, as_json: bool) -> None:
    """Publish a message on a CHANNEL, or send it to one instance."""

    async def send() -> None:
        async with db.open_app(database) as (app, queries):
            if instance_id is None:
                await app.publish(channel, data)
            else:
                await db.read_instance(queries, instance_id, database)
                await app.send_to(instance_id, channel, data)

    with errors_shown(as_json):
        asyncio.run(send())
        if as_json:
            print_json({"channel": channel, "instance_id": instance_id})
        elif instance_id is None:
            print_line(f"published on channel {channel}")
        else:
            print_line(f"sent to {instance_id} on channel {channel}")


COMMANDS = (resume, retry, fork, suspend, cancel, send_event, publish)


# -- what they share -------------------------------------------------------------------------------


def _change(database: str, instance_id: str, change: Callable[[App], Awaitable[None]]) -> Instance:
    """The instance as it is after the change."""

    async def run() -> Instance:
        async with db.open_app(database) as (app, queries):
            await db.read_instance(queries, instance_id, database)
            await change(app)
            return await db.read_instance(queries, instance_id, database)

    return asyncio.run(run())


def _show(instance: Instance, words: str, as_json: bool) -> None:
    if as_json:
        print_json(documents.of_record(instance))
    else:
        print_line(words)
