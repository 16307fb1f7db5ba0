"""What every command prints in the same way: lines, JSON documents, errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import click

from romancy.cli import documents
from romancy.cli.screen import Screen
from romancy.cli.text import printable
from romancy.errors import RomancyError


def now() -> datetime:
    """The time, aware."""
    return datetime.now(UTC)


def print_line(text: str) -> None:
    """A line that only the terminal itself breaks, so that commands and paths can be copied."""
    print_raw(printable(text))


def print_raw(text: str, screen: Screen | None = None) -> None:
    """Lines that are laid out, and printable, already."""
    click.echo(text, color=screen is not None and screen.has_color)
    sys.stdout.flush()


def print_json(document: Any) -> None:
    """One document."""
    print_raw(documents.to_json(document))


def tell(as_json: bool, event: str, words: str, **facts: Any) -> None:
    """An event in the life of a worker: a line for people, or a document on a line for programs."""
    if as_json:
        document = {"event": event, "at": now().isoformat(timespec="microseconds"), **facts}
        print_raw(documents.to_json(document, indent=None))
    else:
        print_line(words)


@contextmanager
def errors_shown(as_json: bool) -> Iterator[None]:
    """Errors that people can mend, in a line on stderr or as JSON on stdout; the exit code is 1."""
    try:
        yield
    except RomancyError as error:
        if as_json:
            print_json(documents.of_error(error))
        else:
            screen = Screen.of(sys.stderr)
            message = screen.show(f"error: {printable(str(error))}")
            click.echo(screen.paint(message, "red"), err=True, color=screen.has_color)
        raise click.exceptions.Exit(1) from None
