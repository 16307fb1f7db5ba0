"""A shop works off a file of orders; each is validated, reserved, charged, shipped, and its customer told.

Kill it as hard as you like (``kill -9``) and run it again: it goes on where it was. No order is lost, no
card is charged twice, and every bad line of the file is reported with its reason::

    python examples/order.py [--database orders.db] [--orders examples/data/orders.csv]
"""

import argparse
import asyncio
import csv
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal, TextIO
from zlib import crc32

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from sqlalchemy import text

from romancy import (
    App,
    ConfigurationError,
    InstanceConflictError,
    RetryExhaustedError,
    RetryPolicy,
    RomancyError,
    TerminalError,
    WorkflowContext,
    WorkflowFailedError,
    WorkflowSuspendedError,
    activity,
    current_activity,
    workflow,
)

DEFAULT_ORDERS = Path(__file__).parent / "data" / "orders.csv"
CATALOGUE = [
    "DESKPAD-OAK", "ENV-KRAFT-25", "ERASER-SOFT", "INK-BLUE-50", "INK-SEPIA-50", "NB-A5-DOT",
    "NB-A6-RULED", "PEN-FOUNT-M", "PEN-GEL-07", "PENCIL-2B-12", "RULER-STEEL-30", "WASHI-SET-6",
]  # fmt: skip
IN_STOCK = 500

# The shop's own tables, in the same file as Romancy's. Orders are no unique keys there: were one charged
# twice, the books would show it.
TABLES = (
    "CREATE TABLE IF NOT EXISTS stock (sku TEXT PRIMARY KEY, initial INTEGER, available INTEGER)",
    "CREATE TABLE IF NOT EXISTS reservations (order_id TEXT, sku TEXT, quantity INTEGER)",
    "CREATE TABLE IF NOT EXISTS charges (order_id TEXT, charge_id TEXT, cents INTEGER, currency TEXT)",
    "CREATE TABLE IF NOT EXISTS shipments (order_id TEXT, tracking TEXT)",
)

console = Console(markup=False, highlight=False)

# -- What goes into the workflows, and what comes out -----------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the file, unchecked: its cells by column. ``flaw`` is what is wrong with the line as such."""

    cells: dict[str, str]
    flaw: str | None = None


def in_catalogue(sku: str) -> str:
    """Let through what the shop sells."""
    if sku not in CATALOGUE:
        raise ValueError("Not in the catalogue")
    return sku


class Order(BaseModel, frozen=True):
    """A line of the file that makes sense. Inputs and results may be dataclasses, pydantic models, and more."""

    order_id: Annotated[str, Field(pattern=r"^SO-\d+$")]
    ordered_at: datetime
    customer: str
    email: Annotated[str, Field(pattern=r"^\S+@\S+$")]
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$")]
    sku: Annotated[str, AfterValidator(in_catalogue)]
    quantity: Annotated[int, Field(ge=1, le=9999)]
    unit_price: Annotated[Decimal, Field(gt=0, le=9999, decimal_places=2)]
    currency: Literal["EUR", "GBP", "USD"]
    card_token: str

    @property
    def cents(self) -> int:
        """What to charge."""
        return int(self.unit_price * self.quantity * 100)


@dataclass(frozen=True)
class Receipt:
    """How a good order ended."""

    order_id: str
    cents: int
    currency: str
    charge_id: str
    tracking: str
    is_customer_notified: bool


# -- Activities: the side effects -------------------------------------------------------------------------

QUICK = RetryPolicy.exponential(5, 0.02, 0.2)


@activity
async def open_books() -> None:
    """Create the shop's tables and fill its shelves."""
    session = current_activity().session
    for statement in TABLES:
        await session.execute(text(statement))
    shelves = [{"sku": sku, "initial": IN_STOCK} for sku in CATALOGUE]
    await session.execute(text("INSERT OR IGNORE INTO stock VALUES (:sku, :initial, :initial)"), shelves)


@activity
async def validate(row: Row) -> Order:
    """The order of a row. A bad row is a ``TerminalError``, for no retry would make it a good one."""
    if row.flaw:
        raise TerminalError(row.flaw)
    try:
        return Order.model_validate(row.cells)
    except ValidationError as error:
        raise TerminalError("; ".join(map(in_words, error.errors()))) from error


def in_words(flaw: ErrorDetails) -> str:
    """What is wrong with a cell, for the people who wrote the file."""
    column, value = flaw["loc"][0], flaw["input"]
    match flaw["type"]:
        case "missing":
            return f"{column} is missing"
        case "string_pattern_mismatch":
            return f"{column} {value!r} is malformed"
        case _:
            return f"{column} {value!r}: {flaw['msg'].removeprefix('Value error, ')}"


@activity
async def reserve(order: Order) -> None:
    """Take the goods off the shelf: both rows and the record that this is done commit together."""
    await asyncio.sleep(0.01)
    session, goods = current_activity().session, order.model_dump()
    take = "UPDATE stock SET available = available - :quantity WHERE sku = :sku AND available >= :quantity"
    taken = await session.execute(text(f"{take} RETURNING sku"), goods)
    if taken.first() is None:
        raise TerminalError(f"there are no {order.quantity} of {order.sku} in stock")
    await session.execute(text("INSERT INTO reservations VALUES (:order_id, :sku, :quantity)"), goods)


@activity
async def release(order: Order) -> None:
    """Put the goods back on the shelf."""
    session, goods = current_activity().session, order.model_dump()
    await session.execute(text("DELETE FROM reservations WHERE order_id = :order_id"), goods)
    await session.execute(text("UPDATE stock SET available = available + :quantity WHERE sku = :sku"), goods)


@activity(retry=QUICK)
async def charge(order: Order) -> str:
    """Have the gateway charge the card, then enter it in the books.

    Killed in between, it runs again; by the key, the gateway knows that it is still the same charge.
    """
    call = current_activity()
    charge_id = await ask_gateway(order.card_token, order.cents, call.idempotency_key)
    entry = {"order": order.order_id, "charge": charge_id, "cents": order.cents, "currency": order.currency}
    await call.session.execute(text("INSERT INTO charges VALUES (:order, :charge, :cents, :currency)"), entry)
    return charge_id


@activity
def ship(order: Order) -> str:
    """Print the label. A plain ``def`` may block, as it runs in a thread."""
    time.sleep(0.02)
    tracking = f"{order.country}{crc32(order.order_id.encode()):010}"
    entry = {"order": order.order_id, "tracking": tracking}
    current_activity().sync_session.execute(text("INSERT INTO shipments VALUES (:order, :tracking)"), entry)
    return tracking


@activity(retry=QUICK, transactional=False)
async def notify(email: str, message: str) -> None:
    """Mail the customer. Mail has no transactions: a kill at the wrong moment may send a second one."""
    await asyncio.sleep(0.02)
    if email.endswith("@full-mailbox.example"):
        raise ConnectionError(f"the mailbox of {email} is full, so it does not take: {message}")
    stumble("the mail server is busy")


async def ask_gateway(card_token: str, cents: int, idempotency_key: str) -> str:
    """A payment gateway as we know them: slow, and not always there. The same key is the same charge."""
    await asyncio.sleep(0.04)
    stumble("the payment gateway does not answer")
    if card_token.startswith("tok_declined"):
        raise TerminalError(f"the card was declined for {cents / 100:,.2f}")
    return f"ch_{crc32(idempotency_key.encode()):08x}"


def stumble(message: str) -> None:
    """Fail for one call in four, always the same ones, in their first one to three attempts."""
    call = current_activity()
    if call.attempt <= 3 - crc32(call.idempotency_key.encode()) % 12:
        raise ConnectionError(message)


# -- Workflows: what happens, in which order ---------------------------------------------------------------


@workflow
async def open_shop(ctx: WorkflowContext) -> None:
    """Once for each database, as it is always started with the same id."""
    await open_books()


@workflow
async def process_order(ctx: WorkflowContext, row: Row) -> Receipt:
    """One order, from the line in the file to the parcel."""
    order = await validate(row)
    await reserve(order)
    try:
        charge_id = await charge(order)
    except (TerminalError, RetryExhaustedError):
        await release(order)
        raise
    tracking = await ship(order)
    try:
        await notify(order.email, f"Your parcel is on its way: {tracking}")
        is_notified = True
    except RetryExhaustedError:
        is_notified = False
    return Receipt(order.order_id, order.cents, order.currency, charge_id, tracking, is_notified)


# -- The file of orders ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A row, where it stands in the file, and the id of its workflow instance."""

    number: int
    order_id: str
    instance_id: str
    row: Row


def read_lines(file: TextIO) -> Iterator[Line]:
    """All lines, good and bad. Read again, the same line has the same id, so that it meets its instance."""
    columns = list(Order.model_fields)
    reader = csv.reader(file)
    if next(reader, []) != columns:
        raise ValueError(f"the first line is not {','.join(columns)}")
    line_of: dict[str, int] = {}
    for values in reader:
        number = reader.line_num
        cells = {column: value for column, value in zip(columns, values, strict=False) if value.strip()}
        order_id = cells.get("order_id", f"line-{number}")
        first = line_of.setdefault(order_id, number)
        flaw = None
        if not values:
            flaw = "the line is empty"
        elif len(values) != len(columns):
            flaw = f"the line has {len(values)} columns instead of {len(columns)}"
        elif first != number:
            flaw = f"order_id: line {first} has the same"
        instance_id = order_id if first == number else f"line-{number}"
        yield Line(number, cells.get("order_id", "-"), instance_id, Row(cells, flaw))


# -- The run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rejection:
    """How a bad order ended."""

    line: Line
    reason: str


async def process_all(lines: list[Line], database: Path) -> list[Receipt | Rejection]:
    """Run a workflow for each line, or wait for the one that an earlier run has begun."""
    async with App(database, max_instances=32) as app:
        await tell_of_earlier_run(app, lines)
        shop = await app.start_workflow(open_shop, id="open-shop")
        await shop.result()
        with Progress("orders", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console) as progress:
            bar = progress.add_task("orders", total=len(lines))

            async def follow(line: Line) -> Receipt | Rejection:
                outcome = await process(app, line)
                progress.advance(bar)
                return outcome

            return await asyncio.gather(*map(follow, lines))


async def process(app: App, line: Line) -> Receipt | Rejection:
    """To start is idempotent: with the id and the input of an instance, it leads to that instance."""
    try:
        handle = await app.start_workflow(process_order, line.row, id=line.instance_id)
        return await handle.result()
    except WorkflowFailedError as failure:
        return Rejection(line, failure.error.message)
    except InstanceConflictError:
        return Rejection(line, "order_id: an earlier run saw another line with this id; give it a new one")
    except (WorkflowSuspendedError, ConfigurationError) as error:
        return Rejection(line, str(error))


async def tell_of_earlier_run(app: App, lines: list[Line]) -> None:
    """Say what the database knows of these lines already."""
    statuses = {instance.instance_id: instance.status async for instance in app.iter_instances()}
    known = [statuses[line.instance_id] for line in lines if line.instance_id in statuses]
    done = sum(status.is_terminal for status in known)
    if done:
        console.print(f"{done} of {len(lines)} orders were done already")
    if len(known) > done:
        console.print(f"resumed {len(known) - done} unfinished orders of an earlier run")


# -- The report --------------------------------------------------------------------------------------------


def report(outcomes: list[Receipt | Rejection], database: Path) -> bool:
    """Print how all ended. The answer: whether the books are in order."""
    receipts = [outcome for outcome in outcomes if isinstance(outcome, Receipt)]
    rejections = [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
    if rejections:
        print_rejections(rejections)
    print_totals(receipts, len(rejections))
    return check_books(receipts, database)


def print_rejections(rejections: list[Rejection]) -> None:
    """Name every bad line, and why it is one."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("line", justify="right")
    table.add_column("order")
    table.add_column("reason")
    for rejection in rejections:
        table.add_row(str(rejection.line.number), rejection.line.order_id, rejection.reason)
    console.print(table)


def print_totals(receipts: list[Receipt], rejected: int) -> None:
    """Count the orders and the money."""
    notified = sum(receipt.is_customer_notified for receipt in receipts)
    cents: Counter[str] = Counter()
    for receipt in receipts:
        cents[receipt.currency] += receipt.cents
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right")
    table.add_row(str(notified), "orders shipped, customer notified")
    table.add_row(str(len(receipts) - notified), "orders shipped, customer's mailbox full")
    table.add_row(str(rejected), "lines rejected")
    for currency, amount in sorted(cents.items()):
        table.add_row(f"{amount / 100:,.2f}", f"{currency} charged")
    console.print(table)


def check_books(receipts: list[Receipt], database: Path) -> bool:
    """Count in the tables themselves, whatever the workflows say."""
    with closing(sqlite3.connect(database)) as books:
        charged = Counter(books.execute("SELECT order_id FROM charges"))
        shipped = Counter(books.execute("SELECT order_id FROM shipments"))
        reserved = Counter(books.execute("SELECT order_id FROM reservations"))
        wrong_shelves = books.execute(
            "SELECT sku FROM stock WHERE available <> initial - "
            "(SELECT coalesce(sum(quantity), 0) FROM reservations WHERE reservations.sku = stock.sku)"
        ).fetchall()
    orders = [(receipt.order_id,) for receipt in receipts]
    once = sum(charged[order] == 1 for order in orders)
    twice = sum(count > 1 for count in charged.values())
    adds_up = not wrong_shelves and all(reserved[order] == shipped[order] == 1 for order in orders)
    is_fine = once == len(orders) and twice == 0 and adds_up
    console.print(
        f"\n{len(orders)} orders, {once} charged exactly once, {twice} charged twice, "
        f"stock {'adds up' if adds_up else 'does not add up'}",
        style="green" if is_fine else "bold red",
    )
    return is_fine


def main() -> None:
    """Read the file, run the workflows, report."""
    parser = argparse.ArgumentParser(description="Process a file of orders, durably.")
    parser.add_argument(
        "--database",
        type=Path,
        default=Path("orders.db"),
        help="the SQLite file that keeps everything (default: orders.db)",
    )
    parser.add_argument(
        "--orders", type=Path, default=DEFAULT_ORDERS, help="the CSV file to process (default: the one of this example)"
    )
    options = parser.parse_args()
    database = options.database.absolute()
    try:
        with options.orders.open(encoding="utf-8-sig", newline="") as file:
            lines = list(read_lines(file))
    except (OSError, ValueError, csv.Error) as error:
        parser.error(f"{options.orders} can't be read: {error}")
    try:
        outcomes = asyncio.run(process_all(lines, database))
    except RomancyError as error:
        sys.exit(str(error))
    sys.exit(0 if report(outcomes, database) else 1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        console.print("\nStopped. Nothing is lost: the same command goes on from here.")
        sys.exit(130)
