"""A shop's database with an instance in every state that matters, and the command line to look into it."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from romancy import App, RetryPolicy, WorkflowContext, WorkflowFailedError, WorkflowSuspendedError, activity, workflow
from romancy.cli.commands import app as command_line
from romancy.testing import isolated_catalogue

NASTY = "\x1b]0;owned\x07 \x9b31m [bold]loud[/bold] \u202eback \x7f"
LONG_ID = "order-" + "x" * 80 + "-2026-11-20"
EXECUTABLE = str(Path(sys.executable).with_name("romancy"))

Run = Callable[..., Result]


@dataclass
class Order:
    id: int
    customer: str
    items: list[dict[str, Any]] = field(default_factory=list)


class CardDeclinedError(Exception):
    pass


async def _complete_and_fail(database: Path) -> None:
    @activity
    async def reserve(order: Order) -> dict[str, Any]:
        return {"reserved": len(order.items), "warehouse": "north-1"}

    @activity(retry=RetryPolicy.fixed(2, 0.001))
    async def charge(order: Order) -> str:
        raise CardDeclinedError(f"the bank says no: {NASTY}")

    hangs = asyncio.Event()

    @activity
    async def hang() -> None:
        hangs.set()
        await asyncio.Event().wait()

    @workflow
    async def process_order(ctx: WorkflowContext, order: Order) -> dict[str, Any]:
        stock = await reserve(order)
        if order.customer == "poor":
            await charge(order)
        return {"stock": stock, "customer": order.customer}

    @workflow
    async def nightly_inventory_reconciliation(ctx: WorkflowContext, day: str) -> None:
        await ctx.sleep(86_400)

    @workflow
    async def user_registration(ctx: WorkflowContext, email: str) -> None:
        await reserve(Order(0, email))
        await hang()

    async with App(database, worker_id="test", shutdown_grace=0) as app:
        await app.start_workflow(user_registration, "ann@example.com", id="user-1")
        await app.start_workflow(nightly_inventory_reconciliation, "2026-11-20", id="nightly-1")
        for number, (name, customer) in enumerate([("ann", "Ann Müller 東京"), ("nasty", NASTY), (LONG_ID, "Bob")]):
            order = Order(17 + number, customer, [{"sku": f"A{number}"}])
            await (await app.start_workflow(process_order, order, id=name)).result(20)
        failing = await app.start_workflow(process_order, Order(99, "poor"), id="poor")
        with pytest.raises(WorkflowFailedError):
            await failing.result(20)
        await hangs.wait()


async def _suspend_and_leave_pending(database: Path) -> None:
    """Other code for the same history; and a start without a worker."""

    @activity
    async def greet(email: str) -> None: ...

    @workflow
    async def user_registration(ctx: WorkflowContext, email: str) -> None:
        await greet(email)

    async with App(database, worker_id="test") as app:
        with pytest.raises(WorkflowSuspendedError):
            await (await app.get_handle("user-1")).result(20)
    async with App(database, worker=False) as app:
        await app.start_workflow(user_registration, "bob@example.com", id="user-2")


@pytest.fixture(scope="session")
def _shop_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shop") / "shop.db"
    for fill in (_complete_and_fail, _suspend_and_leave_pending):
        with isolated_catalogue():
            asyncio.run(fill(path))
    return path


@pytest.fixture
def shop(_shop_template: Path, tmp_path: Path) -> Path:
    """A copy of the shop's database."""
    for file in _shop_template.parent.glob("shop.db*"):
        shutil.copy(file, tmp_path)
    return tmp_path / "shop.db"


@pytest.fixture
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


@pytest.fixture
def run(_utc: None, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Call the command line in this process: ``run("list", …, width=80)``; ``width=None`` is a pipe."""
    for name in ("ROMANCY_DATABASE", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def run(*words: str | Path, width: int | None = 120, stdin: str | None = None, **environment: str) -> Result:
        return CliRunner().invoke(
            command_line,
            [str(word) for word in words],
            input=stdin,
            env={"COLUMNS": "" if width is None else f"{width}", **environment},
            color=True,
        )

    return run
