"""A workflow whose activity waits for a file before it writes: time enough to stop its process, and to wake it."""

from __future__ import annotations

import asyncio
import os
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from romancy import App, Workflow, WorkflowContext, activity, current_activity, workflow
from tests.databases import Database
from tests.ledger import INSERT

LEASE_S = 0.5


def define(folder: Path) -> Workflow[..., Any]:
    """The workflow; ``reached`` appears in the folder when its activity runs, which then waits for ``go``."""

    @activity(name="patient_book")
    async def book() -> str:
        (folder / "reached").touch()
        while not (folder / "go").exists():
            await asyncio.sleep(0.01)
        token = f"process {os.getpid()}"
        await current_activity().session.execute(INSERT, {"token": token})
        return token

    @workflow(name="patient_flow")
    async def flow(ctx: WorkflowContext) -> str:
        return await book()

    return flow


def main(database: Database, folder: Path, outcome: Connection) -> None:
    """Start the workflow and wait for its result, whoever brings it."""
    flow = define(folder)

    async def run() -> str:
        async with App(database, workflows=[flow], lease_ttl=LEASE_S) as app:
            handle = await app.start_workflow(flow, id="it")
            result: str = await handle.result(30)
            return result

    outcome.send(asyncio.run(run()))
