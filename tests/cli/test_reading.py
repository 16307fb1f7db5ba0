"""``list``, ``show`` and ``history``, for people and for programs."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from romancy import App, RetryPolicy, WorkflowContext, activity, current_activity, workflow
from romancy.cli.text import cell_len
from tests.cli.conftest import LONG_ID, NASTY, Run
from tests.databases import rows
from tests.support import RESULT_TIMEOUT_S


def ids(output: str) -> list[str]:
    return [instance["instance_id"] for instance in json.loads(output)["instances"]]


# -- list ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_list_lines_up_and_keeps_to_the_width(run: Run, shop: Path, width: int) -> None:
    result = run("list", "--database", shop, width=width)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["id", "workflow", "status", "started", "took"]
    assert max(cell_len(line) for line in lines) <= width
    assert not [line for line in lines if line != line.rstrip()]
    at = lines[0].index("status")
    assert {line[at:].split()[0] for line in lines[1:] if line[at:][:1].strip()} >= {
        "pending",
        "suspended",
        "completed",
    }


def test_a_pipe_gets_a_line_for_each_instance_and_event(run: Run, shop: Path) -> None:
    lines = run("list", "--database", shop, width=None).stdout.splitlines()
    assert len(lines) == 1 + 7
    (line,) = [line for line in lines if line.startswith(LONG_ID)]
    assert line.split()[1:3] == ["process_order", "completed"]
    events = run("history", "poor", "--database", shop, width=None).stdout.splitlines()[3:]
    assert [event.split()[0] for event in events] == ["1", "2", "3", "4"]
    assert events[-1].endswith("or give the activity another RetryPolicy")


def test_a_narrow_terminal_gets_blocks(run: Run, shop: Path) -> None:
    lines = run("list", "--database", shop, "--id", "user-1", width=30).stdout.splitlines()
    assert lines[:3] == ["id        user-1", "workflow  user_registration", "status    suspended"]
    lines = run("history", "poor", "--database", shop, width=40).stdout.splitlines()
    assert max(map(len, lines)) <= 40
    assert [line.split()[1] for line in lines if line.startswith("kind ")] == [
        "ActivityCompleted", "ActivityRetryScheduled", "ActivityFailed", "WorkflowFailed",
    ]  # fmt: skip


@pytest.mark.parametrize("command", [["list"], ["show", "poor"], ["history", "poor"]])
def test_colors_can_be_forced_and_forbidden_and_change_nothing_else(run: Run, shop: Path, command: list[str]) -> None:
    plain, forced, forbidden = [
        run(*command, "--database", shop, width=80, **colors).stdout
        for colors in ({}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "NO_COLOR": "1"})
    ]
    assert "\x1b[" not in plain + forbidden
    assert re.search(r"\x1b\[1;31m(failed|WorkflowFailed)\x1b\[0m", forced)
    stripped = re.sub(r"\x1b\[[\d;]+m", "", forced)
    assert [line[:40] for line in stripped.splitlines()] == [line[:40] for line in plain.splitlines()]


def test_list_as_json(run: Run, shop: Path) -> None:
    result = run("list", "--database", shop, "--id", "user-1", "--json")
    page = json.loads(result.stdout)
    assert page.keys() == {"instances", "has_more", "next_page_token"}
    (instance,) = page["instances"]
    assert instance["workflow_name"] == "user_registration"
    assert instance["status"] == "suspended"
    assert instance["input"] == {"email": "ann@example.com"}
    assert instance["error"].keys() == {"type", "message", "traceback"}
    assert instance["completed_at"] is None
    created = datetime.fromisoformat(instance["created_at"])
    assert created.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - created) < timedelta(hours=1)
    assert (page["has_more"], page["next_page_token"]) == (False, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--workflow", "NIGHTLY"], ["nightly-1"]),
        (["--status", "failed"], ["poor"]),
        (["--id", "-2026-11-"], [LONG_ID]),
        (["--input", "id=18"], ["nasty"]),
        (["--input", "id=18.0"], ["nasty"]),
        (["--input", 'id="18"'], []),
        (["--input", "items.0.sku=A0"], ["ann"]),
        (["--input", 'items.0.sku="A0"'], ["ann"]),
        (["--input", "customer=poor", "--input", "id=99"], ["poor"]),
        (["--input", "customer=poor", "--input", "id=98"], []),
        (["--input", "email=null"], []),
        (["--workflow", "order", "--status", "completed", "--limit", "2"], [LONG_ID, "nasty"]),
    ],
)
def test_filters(run: Run, shop: Path, options: list[str], expected: list[str]) -> None:
    result = run("list", "--database", shop, *options, "--json")
    assert result.exit_code == 0, result.output
    assert ids(result.stdout) == expected


def test_the_command_for_the_next_page_works_as_it_is_printed(run: Run, shop: Path) -> None:
    seen: list[str] = []
    words = ["list", "--database", str(shop), "--workflow", "order", "--limit", "3", "--input", "items.0.sku=A1"]
    result = run(*words)
    assert "There are more" not in result.stdout
    words = ["list", "--database", str(shop), "--limit", "3"]
    while words:
        seen += ids(run(*words, "--json").stdout)
        result = run(*words, width=80)
        *_, before, last = result.stdout.splitlines()
        words = last.split(" ")[1:] if before == "There are more:" else []
    assert seen == [
        name for (name,) in rows(shop, "SELECT instance_id FROM romancy_instances ORDER BY created_at DESC")
    ]


def test_an_empty_list_says_so(run: Run, shop: Path, database: Path) -> None:
    assert run("migrate", "--database", database).exit_code == 0
    assert run("list", "--database", database).stdout == "no instances\n"
    assert run("list", "--database", shop, "--id", "none like this").stdout == "no instances match\n"


def test_the_database_may_come_from_the_environment(run: Run, shop: Path) -> None:
    result = run("list", "--json", ROMANCY_DATABASE=str(shop))
    assert len(ids(result.stdout)) == 7


# -- show ------------------------------------------------------------------------------------------


def test_show_a_suspended_instance_says_why_and_what_to_do(run: Run, shop: Path) -> None:
    result = run("show", "user-1", "--database", shop)
    assert result.exit_code == 0
    assert "suspended" in result.stdout
    assert '"email": "ann@example.com"' in result.stdout
    assert result.stdout.count("the history expects activity 'reserve'") == 1
    assert f"  romancy resume user-1 --database {shop}\n" in result.stdout
    assert f"  romancy history user-1 --database {shop}\n" in result.stdout


def test_show_a_failed_instance_has_its_error_with_the_traceback(run: Run, shop: Path) -> None:
    result = run("show", "poor", "--database", shop)
    assert "romancy.errors.RetryExhaustedError: activity charge:1 failed after 2 attempts" in result.stdout
    assert "Traceback (most recent call last):" in result.stdout
    assert "await charge(order)" in result.stdout
    assert "romancy resume" not in result.stdout


def test_show_a_completed_instance_has_its_result(run: Run, shop: Path) -> None:
    result = run("show", "ann", "--database", shop)
    assert '"warehouse": "north-1"' in result.stdout
    assert "Ann Müller 東京" in result.stdout
    assert "error" not in result.stdout


def test_show_a_sleeper_says_when_it_goes_on_and_a_pending_one_what_it_waits_for(run: Run, shop: Path) -> None:
    assert "goes on" in run("show", "nightly-1", "--database", shop).stdout
    assert (
        "waits for a worker that has the workflow user_registration" in run("show", "user-2", "--database", shop).stdout
    )


def test_show_tells_what_is_being_retried(run: Run, database: Path) -> None:
    @activity(retry=RetryPolicy.fixed(3, 3600.0))
    async def charge(amount: int) -> None:
        current_activity().heartbeat({"asked": "the bank"})
        raise ConnectionError("the bank is away")

    @workflow
    async def order(ctx: WorkflowContext) -> None:
        await charge(5)

    async def fail_once() -> None:
        async with App(database) as app:
            await app.start_workflow(order, id="it")
            async with asyncio.timeout(RESULT_TIMEOUT_S):
                while not ((found := await app.get_instance("it")) and found.pending and found.pending[0].attempts):
                    await asyncio.sleep(0.005)

    asyncio.run(fail_once())
    shown = run("show", "it", "--database", database).stdout
    lines = [line.strip() for line in shown.splitlines()]
    at = lines.index("activity charge:1")
    assert re.fullmatch(r"1 attempt has failed, next .* \(in 59m\d+s\)", lines[at + 1]), lines[at + 1]
    assert lines[at + 2] == "ConnectionError: the bank is away"
    assert re.fullmatch(r'last heartbeat .* ago\): {"asked": "the bank"}', lines[at + 3])
    (pending,) = json.loads(run("show", "it", "--database", database, "--json").stdout)["pending"]
    assert (pending["activity_id"], pending["attempts"], pending["heartbeat"]) == ("charge:1", 1, {"asked": "the bank"})
    assert pending["last_error"]["type"] == "builtins.ConnectionError"
    assert pending["next_attempt_at"].endswith("+00:00")


def test_show_as_json(run: Run, shop: Path) -> None:
    instance = json.loads(run("show", "nasty", "--database", shop, "--json").stdout)
    assert instance["input"]["customer"] == NASTY
    assert instance["result"]["customer"] == NASTY
    assert instance["error"] is None
    assert instance["run"] == 1


# -- history ---------------------------------------------------------------------------------------


def test_history_in_order(run: Run, shop: Path) -> None:
    result = run("history", "poor", "--database", shop)
    title, blank, header, *lines = result.stdout.splitlines()
    assert title == "poor  process_order, run 1, failed"
    assert (blank, header.split()) == ("", ["seq", "kind", "activity", "try", "at", "outcome"])
    kinds = [line.split()[1] for line in lines if line[:3].strip()]
    assert kinds == ["ActivityCompleted", "ActivityRetryScheduled", "ActivityFailed", "WorkflowFailed"]
    assert '{"reserved": 0, "warehouse": "north-1"}' in lines[0]


def test_history_as_json(run: Run, shop: Path) -> None:
    events = json.loads(run("history", "poor", "--database", shop, "--json").stdout)
    assert [event["kind"] for event in events] == [
        "ActivityCompleted",
        "ActivityRetryScheduled",
        "ActivityFailed",
        "WorkflowFailed",
    ]
    first, retry, failed, _ = events
    assert (first["activity_id"], first["name"], first["attempt"]) == ("reserve:1", "reserve", 1)
    assert first["result"] == {"reserved": 0, "warehouse": "north-1"}
    assert datetime.fromisoformat(retry["next_attempt_at"]) > datetime.fromisoformat(first["at"])
    assert NASTY in failed["error"]["message"]


def test_history_of_an_instance_that_has_none(run: Run, shop: Path) -> None:
    assert "nothing is recorded yet" in run("history", "user-2", "--database", shop).stdout
    assert json.loads(run("history", "user-2", "--database", shop, "--json").stdout) == []


# -- what is common --------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["list"], ["show", "nasty"], ["show", "poor"], ["history", "poor"]])
@pytest.mark.parametrize("form", [[], ["--json"]])
def test_no_control_character_of_a_payload_reaches_the_terminal(
    run: Run, shop: Path, command: list[str], form: list[str]
) -> None:
    result = run(*command, "--database", shop, *form, FORCE_COLOR="", NO_COLOR="1")
    assert result.exit_code == 0
    assert not [char for char in result.stdout if (ord(char) < 32 and char != "\n") or 127 <= ord(char) < 160]
    assert "\u202e" not in result.stdout


def test_markup_of_a_payload_is_text(run: Run, shop: Path) -> None:
    assert "[bold]loud[/bold]" in run("show", "nasty", "--database", shop).stdout


@pytest.mark.parametrize("command", [["list"], ["show", "poor"], ["history", "poor"]])
def test_reading_leaves_the_database_as_it_is(run: Run, shop: Path, command: list[str]) -> None:
    def content() -> list[Any]:
        with sqlite3.connect(shop) as connection:
            return list(connection.iterdump())

    before = content()
    assert run(*command, "--database", shop).exit_code == 0
    assert content() == before
    assert not list(shop.parent.glob("*-journal"))
