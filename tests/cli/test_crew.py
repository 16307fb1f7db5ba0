"""``romancy worker --processes N``: real processes, real signals; what they print tells the test when to go on."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from romancy import App, ConfigurationError, WorkflowContext, workflow
from romancy.cli import crew as cli_crew
from romancy.cli.crew import Crew, restart_delay_s
from romancy.testing import isolated_catalogue
from tests.cli.conftest import Run
from tests.cli.test_errors import failure
from tests.cli.test_worker import end, line, worker
from tests.databases import Database, rows

SHOP = """
import asyncio, logging, os
from romancy import App, WorkflowContext, activity, workflow

@activity
async def pack(order: str) -> str:
    logging.getLogger("shop").warning("packing %s", order)
    print("packing", order, flush=True)
    await asyncio.Event().wait()

@workflow
async def pack_order(ctx: WorkflowContext, order: str) -> str:
    return await pack(order)

app = App(os.environ["SHOP_DATABASE"], worker_id="shop", shutdown_grace=float(os.environ.get("SHOP_GRACE", "0")))
"""
RUNS = re.compile(r"process (\d): worker shop-(\d) runs on .*, process id (\d+)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "crew_shop.py").write_text(SHOP)
    return tmp_path


async def start(database: Database, order: str) -> None:
    async def pack_order(ctx: WorkflowContext, order: str) -> None: ...

    with isolated_catalogue():
        definition = workflow(pack_order)
    async with App(database, worker=False, workflows=[definition]) as app:
        await app.start_workflow("pack_order", order, id=order)


def crew(folder: Path, count: int, database: Database, *options: str, **environment: str) -> Any:
    words = ["crew_shop:app", "--processes", str(count), *options]
    return worker(folder, *words, SHOP_DATABASE=str(database), **environment)


def until_running(process: subprocess.Popen[str], numbers: set[int]) -> tuple[dict[int, int], list[str]]:
    """Process ids by number, once all of these run; and the other lines until then."""
    found: dict[int, int] = {}
    others: list[str] = []
    while not numbers <= found.keys():
        text = line(process)
        assert text, "it ended"
        match = RUNS.fullmatch(text)
        if match:
            assert match[1] == match[2]
            found[int(match[1])] = int(match[3])
        else:
            others.append(text)
    return found, others


def is_there(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_process_is_a_worker_and_sigterm_hands_all_back(folder: Path, any_database: Database) -> None:
    asyncio.run(start(any_database, "o-1"))
    with crew(folder, 3, any_database) as process:
        ids, lines = until_running(process, {1, 2, 3})
        assert lines[0] == "3 worker processes of crew_shop:app start; Ctrl+C or SIGTERM stops them"
        assert "packing o-1" in lines or line(process) == "packing o-1"
        assert len({process.pid, *ids.values()}) == 4
        names = rows(any_database, "SELECT name FROM romancy_workers ORDER BY name")
        assert names == [("shop-1",), ("shop-2",), ("shop-3",)]
        process.send_signal(signal.SIGTERM)
        code, lines, err = end(process)
    assert code == 0
    assert re.fullmatch(r"process \d: WARNING shop: packing o-1\n", err)
    assert lines[0] == "3 worker processes are asked to stop; once more to end them at once"
    assert sorted(text for text in lines if "stopped" in text) == [
        "all 3 worker processes have stopped",
        *[f"process {n}: worker shop-{n} has stopped; what is unfinished was handed back" for n in (1, 2, 3)],
    ]
    assert rows(any_database, "SELECT status, owner FROM romancy_instances") == [("pending", None)]
    assert rows(any_database, "SELECT * FROM romancy_workers") == []


def test_a_killed_process_is_replaced(folder: Path, database: Path) -> None:
    with crew(folder, 2, database) as process:
        before, _ = until_running(process, {1, 2})
        os.kill(before[2], signal.SIGKILL)
        after, (told,) = until_running(process, {2})
        assert re.fullmatch(r"process 2 ended by SIGKILL; another one starts in [\d.]+ s", told)
        assert after[2] != before[2]
        assert is_there(before[1])
        process.send_signal(signal.SIGINT)
        assert end(process)[0] == 0


def test_a_killed_parent_leaves_no_process_and_its_instances_are_handed_back(folder: Path, database: Path) -> None:
    asyncio.run(start(database, "o-1"))
    with crew(folder, 2, database) as process:
        _, lines = until_running(process, {1, 2})
        assert "packing o-1" in lines or line(process) == "packing o-1"
        process.kill()
        # Its output ends when nobody is left who could write.
        assert end(process)[0] == -signal.SIGKILL
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("pending", None)]
    assert rows(database, "SELECT * FROM romancy_workers") == []


def test_a_signal_to_all_processes_of_a_service_is_one_signal(folder: Path, database: Path) -> None:
    asyncio.run(start(database, "o-1"))
    with crew(folder, 1, database, SHOP_GRACE="2") as process:
        ids, lines = until_running(process, {1})
        assert "packing o-1" in lines or line(process) == "packing o-1"
        os.kill(ids[1], signal.SIGTERM)
        assert line(process) == "process 1: worker shop-1 stops; running activities have 2 s"
        process.send_signal(signal.SIGTERM)
        code, lines, _ = end(process)
    assert (code, lines[-1]) == (0, "all 1 worker processes have stopped")
    assert rows(database, "SELECT status, owner FROM romancy_instances") == [("pending", None)]
    assert rows(database, "SELECT * FROM romancy_workers") == []


def test_a_second_signal_ends_all_at_once(folder: Path, database: Path) -> None:
    asyncio.run(start(database, "o-1"))
    with crew(folder, 2, database, SHOP_GRACE="600") as process:
        ids, lines = until_running(process, {1, 2})
        assert "packing o-1" in lines or line(process) == "packing o-1"
        process.send_signal(signal.SIGINT)
        while "asked to stop" not in line(process):
            pass
        process.send_signal(signal.SIGINT)
        assert end(process)[0] == 128 + signal.SIGINT
    assert not any(map(is_there, ids.values()))


def test_programs_are_told_in_json_lines_with_the_number_of_the_process(folder: Path, database: Path) -> None:
    with crew(folder, 1, database, "--json") as process:
        starting, started = json.loads(line(process)), json.loads(line(process))
        process.send_signal(signal.SIGTERM)
        events = [starting, started, *map(json.loads, end(process)[1])]
    assert [event["event"] for event in events] == ["starting", "started", "stopping", "stopping", "stopped", "stopped"]
    assert (starting["processes"], starting["pid"]) == (1, process.pid)
    assert (started["process"], started["worker"], started["database"]) == (1, "shop-1", str(database))


def test_a_module_that_cannot_be_imported_is_told_once(folder: Path) -> None:
    (folder / "broken_crew.py").write_text("\nraise RuntimeError('no luck')\n")
    with worker(folder, "broken_crew:app", "--processes", "3") as process:
        code, lines, err = end(process)
    assert code == 1
    assert lines == ["3 worker processes of broken_crew:app start; Ctrl+C or SIGTERM stops them"]
    place = f"{folder / 'broken_crew.py'}:2"
    assert err == f"error: importing 'broken_crew' failed with RuntimeError: no luck ({place})\n"


def run_crew(folder: Path, source: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, list[str]]:
    """A crew of this process; its exit code, and what it told."""
    (folder / "odd_crew.py").write_text(source)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(cli_crew, "FIRST_RESTART_S", 0.01)
    monkeypatch.setattr(cli_crew, "USUAL_STOP_S", 0.2)
    told: list[str] = []
    return asyncio.run(Crew("odd_crew:app", 2, [], lambda _event, words, **_: told.append(words)).run()), told


def test_processes_that_die_at_once_again_and_again_are_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import os, pathlib\nwith open('starts', 'a') as f: f.write('x')\nos._exit(7)\n"
    with pytest.raises(ConfigurationError, match="process 1 5 times in a row, at last with exit code 7"):
        run_crew(folder, source, monkeypatch)
    assert (folder / "starts").read_text() == "x" * cli_crew.MOST_EARLY_ENDS


def test_restarts_wait_longer_and_longer_up_to_half_a_minute() -> None:
    assert [restart_delay_s(early_ends) for early_ends in (0, 1, 2, 5, 10, 10_000)] == [0.5, 0.5, 1, 8, 30, 30]


def test_a_process_that_does_not_stop_is_killed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = (
        "import os, signal, time\n"
        "os._exit = lambda code: time.sleep(600)\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(600)\n"
    )
    code, told = run_crew(folder, source, monkeypatch)
    assert code == 0
    assert "process 1 has not stopped within 0.2 s and is killed" in told


def test_an_option_that_makes_no_sense(run: Run, folder: Path) -> None:
    assert run("worker", "crew_shop:app", "--processes", "0").exit_code == 2


def test_the_crew_needs_what_windows_lacks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert "needs Linux or macOS" in failure(run, "worker", "crew_shop:app", "--processes", "2")


def test_a_database_in_memory_cannot_be_shared(folder: Path) -> None:
    with crew(folder, 2, ":memory:") as process:
        code, _, err = end(process)
    assert code == 1
    assert err == "error: 'crew_shop:app' has its database in memory, of each process its own: name a file\n"


def test_the_number_of_a_process_is_not_for_people(folder: Path) -> None:
    with worker(folder, "crew_shop:app", "--process", "1") as process:
        assert end(process) == (1, [], "error: --process is for what --processes starts: use that\n")


# -- the line between a process and its parent -------------------------------------------------------


def child(folder: Path, code: str) -> tuple[subprocess.Popen[str], socket.socket]:
    mine, its = socket.socketpair()
    lines = ["import sys, time", "from romancy.cli.lifeline import Lifeline", "line = Lifeline.of_stdin()", code]
    with its:
        process = subprocess.Popen(
            [sys.executable, "-c", "\n".join(lines)], cwd=folder, stdin=its, stdout=subprocess.PIPE, text=True
        )
    return process, mine


def test_a_process_whose_loop_is_blocked_does_not_outlive_its_parent_for_long(folder: Path) -> None:
    code = "line.when_cut(lambda: print('asked', flush=True), 0.1)\nline.tell('started', 7)\ntime.sleep(600)"
    process, mine = child(folder, code)
    with process, mine:
        assert mine.recv(100) == b'{"message": "started", "stop_s": 7}\n'
        mine.close()
        assert end(process) == (1, ["asked"], None)


def test_a_process_that_has_not_begun_ends_with_its_parent(folder: Path) -> None:
    process, mine = child(folder, "print(repr(sys.stdin.read()), flush=True)\ntime.sleep(600)")
    with process, mine:
        assert line(process) == "''"
        mine.close()
        assert end(process) == (0, [], None)
