"""Ten processes that open one database, without tables as yet, in the same moment."""

from __future__ import annotations

import subprocess
import sys

from tests.databases import Database

PROGRAM = """
import asyncio, os, sys, traceback
from romancy import App, workflow
from romancy.storage.address import parse_address
from romancy.storage.stores import make_store
make_store(parse_address(sys.argv[1]), [])  # its driver is imported once, not ten times
@workflow
async def flow(ctx, number: int) -> int:
    return number + 1
async def main():
    async with App(sys.argv[1]) as app:
        handle = await app.start_workflow(flow, 1)
        assert await handle.result(timeout=20) == 2
wait, go = os.pipe()
children = []
for _ in range(10):
    child = os.fork()
    if not child:
        os.close(go)
        os.read(wait, 1)
        try:
            asyncio.run(main())
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    children.append(child)
os.close(go)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def start_ten_workers_at_once(database: Database) -> None:
    """Let each of them run a workflow; all must come to a good end, without a word of complaint."""
    command = [sys.executable, "-c", PROGRAM, str(database)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert ended.stdout.strip() == str([0] * 10), ended.stderr
    assert ended.stderr == ""
