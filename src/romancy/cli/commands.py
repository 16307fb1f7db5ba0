"""The commands and their options."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from romancy._version import __version__
from romancy.cli import changes, documents, worker
from romancy.cli import database as db
from romancy.cli.crew import Crew
from romancy.cli.details import instance_details, next_steps
from romancy.cli.lifeline import Lifeline
from romancy.cli.options import database_option, instance_argument, json_option
from romancy.cli.output import errors_shown, now, print_json, print_line, print_raw, tell
from romancy.cli.screen import Screen
from romancy.cli.tables import history_table, instance_table
from romancy.cli.text import command, printable
from romancy.errors import ConfigurationError, InstanceNotFoundError, RomancyError
from romancy.model import HistoryEvent, Instance, InstancePage, Status
from romancy.storage.address import SqliteAddress

if TYPE_CHECKING:
    from romancy.app import App


def run() -> None:
    """Run the command line of this process."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that can't show a character gets its escape.
        reconfigure: Callable[..., None] | None = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")
    app(prog_name="romancy")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="romancy %(version)s", help="Print the version.")
def app() -> None:
    """Look into a Romancy database, mend what is in it, run a worker."""


# -- the commands ----------------------------------------------------------------------------------


@app.command("list")
@database_option
@click.option("--workflow", metavar="PART", help="A part of the workflow's name.")
@click.option("--status", metavar="STATUS", help=f"One of {', '.join(Status)}.")
@click.option("--id", "instance_id", metavar="PART", help="A part of the id.")
@click.option(
    "--input",
    "inputs",
    metavar="PATH=VALUE",
    multiple=True,
    help="Only instances whose input holds this value, such as order.id=17 or items.0.sku=A1. The value is JSON where "
    'it can be: 17 is a number, "17" (with the quotes) a text. May be repeated: all must match.',
)
@click.option("--limit", metavar="N", type=int, default=50, show_default=True, help="Instances a page, up to 1000.")
@click.option("--page-token", metavar="TOKEN", help="Go on where a page ended.")
@json_option
def list_instances(
    database: str,
    workflow: str | None,
    status: str | None,
    instance_id: str | None,
    inputs: Sequence[str],
    limit: int,
    page_token: str | None,
    as_json: bool,
) -> None:
    """List instances, newest first."""
    filters = _read_filters(inputs)

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

    with errors_shown(as_json):
        page = asyncio.run(read())
        if as_json:
            print_json(documents.of_page(page))
            return
        again = {"--workflow": workflow, "--status": status, "--id": instance_id, "--limit": str(limit)}
        options = [word for name, value in again.items() if value is not None for word in (name, value)]
        options += [word for text in inputs for word in ("--input", text)]
        _print_page(page, ["list", "--database", database, *options])


@app.command()
@instance_argument
@database_option
@json_option
def show(instance_id: str, database: str, as_json: bool) -> None:
    """Show all of one instance, and what to do next."""

    async def read() -> Instance:
        async with db.open_queries(database) as queries:
            return await db.read_instance(queries, instance_id, database)

    with errors_shown(as_json):
        instance = asyncio.run(read())
        if as_json:
            print_json(documents.of_record(instance))
        else:
            _print_instance(instance, database)


@app.command()
@instance_argument
@database_option
@click.option("--run", metavar="N", type=click.IntRange(min=1), help="An earlier run; by default the latest.")
@json_option
def history(instance_id: str, database: str, run: int | None, as_json: bool) -> None:
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

    with errors_shown(as_json):
        instance, wanted, events = asyncio.run(read())
        if as_json:
            print_json([documents.of_record(event) for event in events])
        else:
            _print_history(instance, wanted, events)


@app.command()
@database_option
@json_option
def migrate(database: str, as_json: bool) -> None:
    """Create Romancy's tables in a database, or bring them up to date."""
    with errors_shown(as_json):
        done = db.migrate(database)
        if as_json:
            print_json(
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
        print_line(f"{done.database}: {lines[done.action]}")


@app.command("worker", short_help="Run an app's workflows until Ctrl+C or SIGTERM.")
@click.argument("target", metavar="MODULE:APP")
@click.option(
    "--processes",
    metavar="N",
    type=click.IntRange(min=1),
    help="Run N processes, replace those that die, and stop all together; by default this one process runs the app.",
)
@click.option("--process", metavar="K", type=int, hidden=True, help="The number of this process, one of several.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON document a line, for programs.")
def run_worker(target: str, processes: int | None, process: int | None, as_json: bool) -> None:
    """Run an app's workflows until Ctrl+C or SIGTERM, then hand back what is unfinished.

    MODULE:APP, such as shop.main:app, names an App object, or a callable that returns one; the current directory comes
    first on the import path. A second signal ends the process at once, which is safe: others take its instances over.
    """
    exit_code = 0
    with errors_shown(as_json):
        if processes is not None:
            exit_code = _run_crew(target, processes, as_json)
        elif process is not None:
            _run_as_one_of_several(target, process, as_json)
        else:
            _run_app(worker.load_app(target), as_json)
    if exit_code:
        raise click.exceptions.Exit(exit_code)
    worker.leave(0)


def _run_app(found: App, as_json: bool, process: int | None = None, lifeline: Lifeline | None = None) -> None:
    prefix = "" if process is None else f"process {process}: "
    number = {} if process is None else {"process": process}
    lines: dict[worker.Moment, str] = {
        "started": f"worker {found.name} runs on {found.address}; Ctrl+C or SIGTERM stops it",
        "stopping": f"worker {found.name} stops; running activities have {found.shutdown_grace_s:g} s; "
        f"once more to end at once",
        "stopped": f"worker {found.name} has stopped; what is unfinished was handed back",
    }
    if process is not None:
        lines["started"] = f"worker {found.name} runs on {found.address}, process id {os.getpid()}"
        lines["stopping"] = f"worker {found.name} stops; running activities have {found.shutdown_grace_s:g} s"

    def tell_of(moment: worker.Moment) -> None:
        facts = {"worker": found.name, "database": str(found.address), "pid": os.getpid()}
        tell(as_json, moment, prefix + lines[moment], **number, **facts)

    asyncio.run(worker.run_until_signal(found, tell_of, lifeline))


def _run_crew(target: str, processes: int, as_json: bool) -> int:
    if sys.platform == "win32":
        raise ConfigurationError("--processes needs Linux or macOS: start several romancy worker here")
    crew = Crew(target, processes, ["--json"] if as_json else [], partial(tell, as_json))
    return asyncio.run(crew.run())


def _run_as_one_of_several(target: str, process: int, as_json: bool) -> None:
    lifeline = Lifeline.of_stdin()
    try:
        found = worker.load_app(target)
        if isinstance(found.address, SqliteAddress) and found.address.is_memory:
            raise ConfigurationError(f"{target!r} has its database in memory, of each process its own: name a file")
        worker.number_process(found, process)
        _run_app(found, as_json, process, lifeline)
    except RomancyError:
        lifeline.tell("failed")
        raise


for changing in changes.COMMANDS:
    app.add_command(changing)


# -- reading options -------------------------------------------------------------------------------


def _read_filters(inputs: Sequence[str]) -> dict[str, Any]:
    """``order.id=17`` as ``{"order.id": 17}``."""
    filters: dict[str, Any] = {}
    for text in inputs:
        path, separator, value = text.partition("=")
        if not separator or not path:
            raise click.BadParameter(f"{text!r} is no PATH=VALUE, such as order.id=17", param_hint="--input")
        if path in filters:
            raise click.BadParameter(f"the path {path!r} is given twice: all must match", param_hint="--input")
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


def _print_page(page: InstancePage, again: list[str]) -> None:
    if not page.instances:
        is_filtered = {"--workflow", "--status", "--id", "--input"} & {*again}
        print_line("no instances match" if is_filtered else "no instances")
        return
    screen = Screen.of(sys.stdout)
    lines = [instance_table(page.instances, screen, now())]
    if page.next_page_token is not None:
        next_page = printable(command(*again, "--page-token", page.next_page_token))
        lines += ["", screen.paint("There are more:", "dim"), next_page]
    print_raw("\n".join(lines), screen)


def _print_instance(instance: Instance, database: str) -> None:
    screen = Screen.of(sys.stdout)
    lines = [instance_details(instance, screen, now()), "", screen.paint("next", "bold")]
    # Broken by the terminal alone, so that commands can be copied.
    lines += [f"  {printable(step)}" for step in next_steps(instance, database)]
    print_raw("\n".join(lines), screen)


def _print_history(instance: Instance, run: int, events: list[HistoryEvent]) -> None:
    screen = Screen.of(sys.stdout)
    title = screen.paint(screen.show(printable(instance.instance_id)), "bold")
    facts = screen.show(f"  {printable(instance.workflow_name)}, run {run}, {instance.status}")
    body = history_table(events, screen, now()) if events else "nothing is recorded yet"
    print_raw(f"{title}{facts}\n\n{body}", screen)
