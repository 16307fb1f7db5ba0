"""Options and arguments that several commands share."""

from __future__ import annotations

import click

database_option = click.option(
    "--database",
    metavar="DB",
    envvar="ROMANCY_DATABASE",
    show_envvar=True,
    required=True,
    help="A path such as orders.db, or a URL such as postgresql://user@host/orders.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document, for programs.")
instance_argument = click.argument("instance_id", metavar="ID")
