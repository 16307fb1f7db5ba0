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
from shutil import get_terminal_size
from textwrap import fill
from typing import Annotated, Literal, TextIO
from zlib import crc32

from pydantic import AfterValidator, BaseModel, Field, ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy import text
from tqdm import tqdm

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
        # disable=None: no bar where the output is no terminal.
        with tqdm(desc="orders", total=len(lines), unit=" orders", file=sys.stdout, disable=None) as bar:

            async def follow(line: Line) -> Receipt | Rejection:
                outcome = await process(app, line)
                bar.update()
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
        print(f"{done} of {len(lines)} orders were done already")
    if len(known) > done:
        print(f"resumed {len(known) - done} unfinished orders of an earlier run")


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
    width = max(get_terminal_size().columns, 40)
    print(f"\n {'line':>4}  {'order':<8}  reason\n {'-' * 4}  {'-' * 8}  {'-' * 6}")
    for rejection in rejections:
        head = f" {rejection.line.number:>4}  {on_one_line(rejection.line.order_id):<8}  "
        print(fill(on_one_line(rejection.reason), width, initial_indent=head, subsequent_indent=" " * len(head)))
    print()


def on_one_line(text: str) -> str:
    """As it is, or quoted: what comes from a file may hold characters that a terminal obeys."""
    return text if text.isprintable() else repr(text)


def print_totals(receipts: list[Receipt], rejected: int) -> None:
    """Count the orders and the money."""
    notified = sum(receipt.is_customer_notified for receipt in receipts)
    cents: Counter[str] = Counter()
    for receipt in receipts:
        cents[receipt.currency] += receipt.cents
    totals = [
        (f"{notified}", "orders shipped, customer notified"),
        (f"{len(receipts) - notified}", "orders shipped, customer's mailbox full"),
        (f"{rejected}", "lines rejected"),
        *[(f"{amount / 100:,.2f}", f"{currency} charged") for currency, amount in sorted(cents.items())],
    ]
    width = max(len(figure) for figure, _ in totals)
    for figure, what in totals:
        print(f"{figure:>{width}} {what}")


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
    print(
        f"\n{len(orders)} orders, {once} charged exactly once, {twice} charged twice, "
        f"stock {'adds up' if adds_up else 'does not add up'}"
    )
    return once == len(orders) and twice == 0 and adds_up


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
        print("\nStopped. Nothing is lost: the same command goes on from here.")
        sys.exit(130)
