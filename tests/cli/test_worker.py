"""``romancy worker``: real processes, real signals; what they print tells the test when to go on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from romancy import App, AppNotRunningError, WorkflowContext, workflow
from romancy.cli import worker as cli_worker
from romancy.testing import isolated_catalogue
from tests.cli.conftest import EXECUTABLE
from tests.databases import rows
from tests.support import RESULT_TIMEOUT_S

SHOP = """
import asyncio, os, time
from romancy import App, WorkflowContext, activity, workflow

HANGS = os.environ.get("SHOP_HANGS") == "1"

@activity
async def pack(order: str) -> str:
    print("packing", order, flush=True)
    if HANGS:
        await asyncio.Event().wait()
    return f"{order} packed"

@activity
def grind(order: str) -> str:
    print("grinding", order, flush=True)
    if HANGS:
        time.sleep(600)
    return f"{order} ground"

@workflow
async def pack_order(ctx: WorkflowContext, order: str) -> str:
    return await pack(order)

@workflow
async def grind_order(ctx: WorkflowContext, order: str) -> str:
    return await grind(order)

@workflow
async def block_loop(ctx: WorkflowContext, order: str) -> None:
    await block()

@activity
async def block() -> None:
    print("blocking", flush=True)
    time.sleep(600)

class Holder:
    app = App("shop.db", worker_id="shop-1", shutdown_grace=float(os.environ.get("SHOP_GRACE", "0")), stall_warning=600)

app = Holder.app

def make_app() -> App:
    return Holder.app
"""


@pytest.fixture
def shop_folder(tmp_path: Path) -> Path:
    (tmp_path / "worker_shop.py").write_text(SHOP)
    return tmp_path


async def start(folder: Path, name: str, order: str) -> None:
    """Store a start without running it; the definition here has no more than the name."""

    async def body(ctx: WorkflowContext, order: str) -> None: ...

    with isolated_catalogue():
        definition = workflow(name=name)(body)
    async with App(folder / "shop.db", worker=False, workflows=[definition]) as app:
        await app.start_workflow(name, order, id=order)


@contextmanager
def worker(folder: Path, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [EXECUTABLE, "worker", *(words or ["worker_shop:app"])],
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def end(process: subprocess.Popen[str]) -> tuple[int, list[str], str]:
    """Exit code, the remaining lines, and stderr."""
    out, err = process.communicate(timeout=RESULT_TIMEOUT_S)
    return process.returncode, out.splitlines(), err


@pytest.mark.parametrize(
    ("number", "target"), [(signal.SIGTERM, "worker_shop:app"), (signal.SIGINT, "worker_shop:make_app")]
)
def test_a_signal_hands_instances_back_so_that_another_app_finishes_them_at_once(
    shop_folder: Path, number: signal.Signals, target: str
) -> None:
    asyncio.run(start(shop_folder, "pack_order", "o-1"))
    with worker(shop_folder, target, SHOP_HANGS="1") as process:
        assert line(process) == f"worker shop-1 runs on {shop_folder / 'shop.db'}; Ctrl+C or SIGTERM stops it"
        assert line(process) == "packing o-1"
        process.send_signal(number)
        code, lines, err = end(process)
    assert (code, err) == (0, "")
    assert [text.split()[2] for text in lines] == ["stops;", "has"]
    assert rows(shop_folder / "shop.db", "SELECT status, owner FROM romancy_instances") == [("pending", None)]
    assert rows(shop_folder / "shop.db", "SELECT * FROM romancy_workers") == []

    async def finish() -> str:
        @workflow
        async def pack_order(ctx: WorkflowContext, order: str) -> str:
            return "finished elsewhere"

        async with App(shop_folder / "shop.db", workflows=[pack_order]) as app:
            return await (await app.get_handle("o-1", pack_order)).result(RESULT_TIMEOUT_S)

    assert asyncio.run(finish()) == "finished elsewhere"


def test_a_worker_runs_what_is_pending_and_tells_programs_in_json_lines(shop_folder: Path) -> None:
    asyncio.run(start(shop_folder, "pack_order", "o-1"))
    with worker(shop_folder, "worker_shop:Holder.app", "--json", SHOP_GRACE="20") as process:
        started = json.loads(line(process))
        assert line(process) == "packing o-1"
        process.send_signal(signal.SIGTERM)
        code, lines, _ = end(process)
    assert code == 0
    assert started.keys() == {"event", "at", "worker", "database", "pid"}
    assert (started["worker"], started["database"], started["pid"]) == (
        "shop-1",
        str(shop_folder / "shop.db"),
        process.pid,
    )
    assert [json.loads(text)["event"] for text in lines] == ["stopping", "stopped"]
    assert rows(shop_folder / "shop.db", "SELECT status FROM romancy_instances") == [("completed",)]


def test_a_second_signal_ends_the_process_at_once(shop_folder: Path) -> None:
    asyncio.run(start(shop_folder, "pack_order", "o-1"))
    with worker(shop_folder, SHOP_HANGS="1", SHOP_GRACE="600") as process:
        line(process)
        assert line(process) == "packing o-1"
        process.send_signal(signal.SIGINT)
        assert line(process) == "worker shop-1 stops; running activities have 600 s; once more to end at once"
        process.send_signal(signal.SIGINT)
        assert end(process)[:2] == (128 + signal.SIGINT, [])


def test_a_second_signal_ends_even_a_process_whose_loop_is_blocked(shop_folder: Path) -> None:
    asyncio.run(start(shop_folder, "block_loop", "o-1"))
    with worker(shop_folder) as process:
        line(process)
        assert line(process) == "blocking"
        process.send_signal(signal.SIGINT)
        # A signal between Python's look for signals and its next sleep waits for another one, as at a keyboard.
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        assert process.returncode in {128 + signal.SIGINT, 128 + signal.SIGTERM}


def test_a_thread_that_outlives_its_grace_does_not_keep_the_process(shop_folder: Path) -> None:
    asyncio.run(start(shop_folder, "grind_order", "o-1"))
    with worker(shop_folder, SHOP_HANGS="1") as process:
        line(process)
        assert line(process) == "grinding o-1"
        process.send_signal(signal.SIGTERM)
        code, lines, _ = end(process)
    assert (code, len(lines)) == (0, 2)
    assert rows(shop_folder / "shop.db", "SELECT status, owner FROM romancy_instances") == [("pending", None)]


def test_a_worker_whose_app_stops_by_itself_ends_with_an_error(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @workflow
    async def idle(ctx: WorkflowContext) -> None: ...

    monkeypatch.setattr(cli_worker, "HEALTH_CHECK_INTERVAL_S", 0.01)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    told: list[str] = []

    async def run() -> None:
        app = App(database)
        shutdowns: list[asyncio.Task[None]] = []

        def tell(moment: str) -> None:
            told.append(moment)
            shutdowns.append(asyncio.get_running_loop().create_task(app.shutdown()))

        await cli_worker.run_until_signal(app, tell)

    with pytest.raises(AppNotRunningError):
        asyncio.run(run())
    assert told == ["started"]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_load_app_takes_objects_attributes_and_factories(shop_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shop_folder)
    monkeypatch.setattr(sys, "path", [*sys.path])
    load: Callable[[str], App] = cli_worker.load_app
    app = load("worker_shop:app")
    assert load("worker_shop:Holder.app") is app
    assert load("worker_shop:make_app") is app
    assert sys.path[0] == str(shop_folder)
    del sys.modules["worker_shop"]
