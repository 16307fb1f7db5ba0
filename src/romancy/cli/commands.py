"""The commands and their options."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from romancy._version import __version__
from romancy.cli import database as db
from romancy.cli import documents, worker
from romancy.cli.details import instance_details, next_steps
from romancy.cli.tables import history_table, instance_table
from romancy.cli.text import command, printable
from romancy.errors import InstanceNotFoundError, RomancyError
from romancy.model import HistoryEvent, Instance, InstancePage, Status

app = typer.Typer(
    name="romancy",
    help="Look into a Romancy database, mend what is in it, run a worker.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

DatabaseOption = Annotated[
    str,
    typer.Option(
        "--database", metavar="DB", envvar="ROMANCY_DATABASE", help="A path such as orders.db, or sqlite:///orders.db."
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON document, for programs.")]
InstanceArgument = Annotated[str, typer.Argument(metavar="ID", help="The instance's id, whole.")]


def main() -> None:
    """Run the command line; the entry point ``romancy``."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a character gets its escape.
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    app()


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"romancy {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", metavar="", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    del version


# -- the commands ----------------------------------------------------------------------------------


@app.command("list")
def list_instances(
    database: DatabaseOption,
    workflow: Annotated[str | None, typer.Option(metavar="PART", help="A part of the workflow's name.")] = None,
    status: Annotated[str | None, typer.Option(metavar="STATUS", help=f"One of {', '.join(Status)}.")] = None,
    instance_id: Annotated[str | None, typer.Option("--id", metavar="PART", help="A part of the id.")] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="PATH=VALUE",
            help="Only instances whose input holds this value, such as order.id=17 or items.0.sku=A1. The value is "
            'JSON where it can be: 17 is a number, "17" (with the quotes) a text. May be repeated: all must match.',
        ),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", help="Instances a page, from 1 to 1000.")] = 50,
    page_token: Annotated[str | None, typer.Option(metavar="TOKEN", help="Go on where a page ended.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List instances, newest first."""
    filters = _read_filters(inputs or [])

    async def read() -> InstancePage:
        async with db.open_queries(database) as queries:
            return await queries.list_instances(
                workflow_name=workflow,
                status=status,
                instance_id=instance_id,
                input_filters=filters or None,
                limit=limit,
                page_token=page_token,
            )

    with _errors_shown(as_json):
        page = asyncio.run(read())
        if as_json:
            _print_json(documents.of_page(page))
            return
        again = {"--workflow": workflow, "--status": status, "--id": instance_id, "--limit": str(limit)}
        options = [word for name, value in again.items() if value is not None for word in (name, value)]
        options += [word for text in inputs or [] for word in ("--input", text)]
        _print_page(page, ["list", "--database", database, *options])


@app.command()
def show(instance_id: InstanceArgument, database: DatabaseOption, as_json: JsonOption = False) -> None:
    """Show all of one instance, and what to do next."""

    async def read() -> Instance:
        async with db.open_queries(database) as queries:
            return await db.read_instance(queries, instance_id, database)

    with _errors_shown(as_json):
        instance = asyncio.run(read())
        if as_json:
            _print_json(documents.of_record(instance))
        else:
            _print_instance(instance, database)


@app.command()
def history(
    instance_id: InstanceArgument,
    database: DatabaseOption,
    run: Annotated[int | None, typer.Option(metavar="N", min=1, max=2**31 - 1, help="Not the latest run.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is recorded of an instance, step by step."""

    async def read() -> tuple[Instance, int, list[HistoryEvent]]:
        async with db.open_queries(database) as queries:
            instance = await db.read_instance(queries, instance_id, database)
            wanted = instance.run if run is None else run
            if wanted > instance.run:
                raise InstanceNotFoundError(
                    f"instance {instance_id!r} has no run {wanted}; its latest is {instance.run}"
                )
            return instance, wanted, await queries.get_history(instance_id, wanted)

    with _errors_shown(as_json):
        instance, wanted, events = asyncio.run(read())
        if as_json:
            _print_json([documents.of_record(event) for event in events])
        else:
            _print_history(instance, wanted, events)


@app.command()
def resume(instance_id: InstanceArgument, database: DatabaseOption, as_json: JsonOption = False) -> None:
    """Let a suspended instance go on, from its history, with the code as it is now."""
    with _errors_shown(as_json):
        instance = asyncio.run(db.resume(database, instance_id))
        if as_json:
            _print_json(documents.of_record(instance))
        else:
            _print_line(f"resumed {instance.instance_id}: it goes on as soon as a worker is free ({instance.status})")


@app.command()
def migrate(database: DatabaseOption, as_json: JsonOption = False) -> None:
    """Create Romancy's tables in a database, or bring them up to date."""
    with _errors_shown(as_json):
        done = db.migrate(database)
        if as_json:
            _print_json(
                {
                    "database": done.database,
                    "action": done.action,
                    "from_version": done.from_version,
                    "to_version": done.to_version,
                }
            )
            return
        lines = {
            "created": f"created the tables, version {done.to_version}",
            "upgraded": f"upgraded the tables from version {done.from_version} to {done.to_version}",
            "none": f"already up to date, version {done.to_version}",
        }
        _print_line(f"{done.database}: {lines[done.action]}")


@app.command("worker")
def run_worker(
    target: Annotated[str, typer.Argument(metavar="MODULE:APP", help="Where the App is, such as shop.main:app.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document a line, for programs.")] = False,
) -> None:
    """Run an app's workflows until Ctrl+C or SIGTERM, then hand back what is unfinished.

    The argument names an App object, or a callable that returns one; the current directory comes first on the import
    path. A second signal ends the process at once, which is safe: others take its instances over.
    """
    with _errors_shown(as_json):
        found = worker.load_app(target)

        def tell(moment: worker.Moment) -> None:
            if as_json:
                event = {"event": moment, "at": _now().isoformat(timespec="microseconds"), "worker": found.name}
                _print_raw(
                    documents.to_json({**event, "database": str(found.address), "pid": os.getpid()}, indent=None)
                )
                return
            lines: dict[worker.Moment, str] = {
                "started": f"worker {found.name} runs on {found.address}; Ctrl+C or SIGTERM stops it",
                "stopping": f"worker {found.name} stops; running activities have {found.shutdown_grace_s:g} s; "
                f"once more to end at once",
                "stopped": f"worker {found.name} has stopped; what is unfinished was handed back",
            }
            _print_line(lines[moment])

        asyncio.run(worker.run_until_signal(found, tell))
    worker.leave(0)


# -- reading options -------------------------------------------------------------------------------


def _read_filters(inputs: list[str]) -> dict[str, Any]:
    """``order.id=17`` as ``{"order.id": 17}``."""
    filters: dict[str, Any] = {}
    for text in inputs:
        path, separator, value = text.partition("=")
        if not separator or not path:
            raise typer.BadParameter(f"{text!r} is no PATH=VALUE, such as order.id=17", param_hint="--input")
        if path in filters:
            raise typer.BadParameter(f"the path {path!r} is given twice: all must match", param_hint="--input")
        filters[path] = _read_value(value)
    return filters


def _read_value(text: str) -> Any:
    def refuse(name: str) -> None:
        raise ValueError(name)

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError):
        return text


# -- printing --------------------------------------------------------------------------------------


def _now() -> datetime:
    return datetime.now(UTC)


def _console(*, stderr: bool = False) -> Console:
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False)


def _print_line(text: str) -> None:
    """A line that only the terminal itself breaks, so that commands and paths can be copied."""
    _print_raw(printable(text))


def _print_raw(text: str) -> None:
    typer.echo(text)
    sys.stdout.flush()


def _print_json(document: Any) -> None:
    _print_raw(documents.to_json(document))


def _print_page(page: InstancePage, again: list[str]) -> None:
    console = _console()
    if not page.instances:
        console.print(
            "no instances match" if {"--workflow", "--status", "--id", "--input"} & {*again} else "no instances"
        )
        return
    console.print(instance_table(page.instances, console.width, _now()))
    if page.next_page_token is not None:
        console.print("\nThere are more:", style="dim")
        _print_line(command(*again, "--page-token", page.next_page_token))


def _print_instance(instance: Instance, database: str) -> None:
    console = _console()
    console.print(instance_details(instance, _now()))
    console.print("\nnext", style="bold")
    for step in next_steps(instance, database):
        # Broken by the terminal alone, so that commands can be copied.
        console.print(f"  {printable(step)}", soft_wrap=True)


def _print_history(instance: Instance, run: int, events: list[HistoryEvent]) -> None:
    console = _console()
    facts = f"  {printable(instance.workflow_name)}, run {run}, {instance.status}"
    console.print(Text.assemble((printable(instance.instance_id), "bold"), facts), end="\n\n", soft_wrap=True)
    if events:
        console.print(history_table(events, console.width, _now()))
    else:
        console.print("nothing is recorded yet")


@contextmanager
def _errors_shown(as_json: bool) -> Iterator[None]:
    """Errors that people can mend, in a line on stderr or as JSON on stdout; the exit code is 1."""
    try:
        yield
    except RomancyError as error:
        if as_json:
            _print_json(documents.of_error(error))
        else:
            _console(stderr=True).print(Text(f"error: {printable(str(error))}", style="red"), soft_wrap=True)
        raise typer.Exit(1) from None
