"""The commands that write: instances told what to do, events and messages, and ``migrate``."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from romancy import (
    App,
    RetryPolicy,
    Status,
    WorkflowCancelledError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    workflow,
)
from tests.cli.conftest import Run
from tests.cli.test_errors import failure
from tests.databases import Database, rows
from tests.support import RESULT_TIMEOUT_S, wait_for_status


def test_resume_makes_a_suspended_instance_claimable_and_registers_no_worker(run: Run, shop: Path) -> None:
    result = run("resume", "user-1", "--database", shop)
    assert (result.exit_code, result.stdout.split(":")[0]) == (0, "resumed user-1")
    sql = "SELECT status, owner, ready_at, error FROM romancy_instances WHERE instance_id = 'user-1'"
    assert rows(shop, sql) == [("pending", None, 0, None)]
    assert rows(shop, "SELECT * FROM romancy_workers") == []


def test_resume_as_json_is_the_instance_as_it_is_then(run: Run, shop: Path) -> None:
    instance = json.loads(run("resume", "user-1", "--database", shop, "--json").stdout)
    assert (instance["instance_id"], instance["status"], instance["error"]) == ("user-1", "pending", None)


def test_resume_of_what_is_not_suspended(run: Run, shop: Path) -> None:
    result = run("resume", "ann", "--database", shop)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: instance 'ann' is completed, not suspended: nothing to resume\n"
    error = json.loads(run("resume", "ann", "--database", shop, "--json").stdout)["error"]
    assert error["type"] == "InstanceStateError"


def test_resume_works_where_workflows_are_defined_too(run: Run, shop: Path) -> None:
    @workflow
    async def user_registration(ctx: WorkflowContext, email: str) -> None: ...

    assert run("resume", "user-1", "--database", shop).exit_code == 0
    assert rows(shop, "SELECT status FROM romancy_instances WHERE instance_id = 'user-1'") == [("pending",)]


# -- with a worker elsewhere that sees to it ---------------------------------------------------------


def define() -> None:
    @activity
    async def note(what: str) -> str:
        return what

    @activity
    async def fail_once(tried: list[int]) -> str:
        if not FAILS:
            return "at last"
        raise ValueError("not yet")

    @workflow
    async def sleeper(ctx: WorkflowContext) -> None:
        await ctx.sleep(86_400)

    @workflow
    async def listener(ctx: WorkflowContext, key: str) -> Any:
        await note("waits")
        return (await ctx.wait_event("paid", key=key)).data

    @workflow
    async def reader(ctx: WorkflowContext, mode: str) -> Any:
        await ctx.subscribe("news", mode=mode)
        return (await ctx.receive("news")).data

    @workflow
    async def failing(ctx: WorkflowContext) -> str:
        return await note("before") + await fail_once.options(retry=RetryPolicy.no_retry())([])


FAILS: list[int] = []


async def call(run: Run, *words: str) -> Any:
    """The command's JSON document, while this loop's app goes on."""
    result = await asyncio.to_thread(run, *words, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


async def test_cancel_ends_an_instance_of_a_worker_elsewhere(run: Run, any_database: Database) -> None:
    define()
    async with App(any_database) as app:
        handle = await app.start_workflow("sleeper", id="s")
        await wait_for_status(app, "s", Status.WAITING_FOR_TIMER)
        words = ["cancel", "s", "--database", str(any_database), "--reason", "nobody needs it"]
        assert (await call(run, *words))["instance_id"] == "s"
        with pytest.raises(WorkflowCancelledError, match="nobody needs it"):
            await handle.result(RESULT_TIMEOUT_S)
        message = await asyncio.to_thread(failure, run, *words)
        assert message == "InstanceStateError: instance 's' is cancelled: there is nothing to cancel"


async def test_suspend_sets_an_instance_aside_until_it_is_resumed(run: Run, database: Path) -> None:
    define()
    async with App(database) as app:
        await app.start_workflow("sleeper", id="s")
        await wait_for_status(app, "s", Status.WAITING_FOR_TIMER)
        await call(run, "suspend", "s", "--database", str(database))
        await wait_for_status(app, "s", Status.SUSPENDED)
        await call(run, "resume", "s", "--database", str(database))
        await wait_for_status(app, "s", Status.WAITING_FOR_TIMER)


def test_suspend_of_what_has_ended(run: Run, shop: Path) -> None:
    message = failure(run, "suspend", "ann", "--database", shop)
    assert message == "InstanceStateError: instance 'ann' is completed: there is nothing to suspend"


async def test_send_event_reaches_who_waits_and_counts_once(run: Run, any_database: Database) -> None:
    define()
    at = ["--database", str(any_database)]
    async with App(any_database) as app:
        handle = await app.start_workflow("listener", "order-5", id="l")
        await wait_for_status(app, "l", Status.WAITING_FOR_EVENT)
        words = ["send-event", "paid", "--key", "order-5", "--data", '{"amount": [17]}', "--event-id", "e-1", *at]
        assert await call(run, *words) == {"event_type": "paid", "is_new": True}
        assert await handle.result(RESULT_TIMEOUT_S) == {"amount": [17]}
        assert await call(run, *words) == {"event_type": "paid", "is_new": False}


async def test_an_event_may_be_for_one_instance(run: Run, database: Path) -> None:
    define()
    at = ["--database", str(database)]
    async with App(database) as app:
        first, second = [await app.start_workflow("listener", "k", id=name) for name in ("a", "b")]
        await call(run, "send-event", "paid", "--to", "b", "--key", "k", "--data", "1", *at)
        assert await second.result(RESULT_TIMEOUT_S) == 1
        assert await first.status() is not Status.COMPLETED
        message = await asyncio.to_thread(failure, run, "send-event", "paid", "--to", "c", *at)
        assert message.startswith("InstanceNotFoundError: there is no instance 'c'")


async def test_publish_reaches_subscribers_and_publish_to_one_mailbox(run: Run, any_database: Database) -> None:
    define()
    at = ["--database", str(any_database)]
    async with App(any_database) as app:
        handle = await app.start_workflow("reader", "broadcast", id="r")
        await wait_for_status(app, "r", Status.WAITING_FOR_MESSAGE)
        assert await call(run, "publish", "news", "--data", '"hot"', *at) == {"channel": "news", "instance_id": None}
        assert await handle.result(RESULT_TIMEOUT_S) == "hot"
        message = await asyncio.to_thread(failure, run, "publish", "news", "--to", "r", *at)
        assert message.startswith("ChannelModeConflictError: channel 'news' has the mode 'broadcast'")


async def test_publish_to_one_instance(run: Run, database: Path) -> None:
    define()
    async with App(database) as app:
        handle = await app.start_workflow("reader", "direct", id="r")
        await wait_for_status(app, "r", Status.WAITING_FOR_MESSAGE)
        await call(run, "publish", "news", "--to", "r", "--data", "[1]", "--database", str(database))
        assert await handle.result(RESULT_TIMEOUT_S) == [1]


async def test_retry_lets_a_failed_instance_go_on_and_fork_makes_another(
    run: Run, database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    define()
    at = ["--database", str(database)]
    async with App(database) as app:
        monkeypatch.setattr(f"{__name__}.FAILS", [1])
        with pytest.raises(WorkflowFailedError):
            await (await app.start_workflow("failing", id="f")).result(RESULT_TIMEOUT_S)
        assert f"romancy retry f --database {database}" in (await asyncio.to_thread(run, "show", "f", *at)).stdout
        monkeypatch.setattr(f"{__name__}.FAILS", [])
        forked = await call(run, "fork", "f", "--from-activity", "fail_once:1", "--new-id", "g", *at)
        assert (forked["instance_id"], forked["workflow_name"]) == ("g", "failing")
        assert await (await app.get_handle("g")).result(RESULT_TIMEOUT_S) == "beforeat last"
        assert (await app.get_instance("f")).status is Status.FAILED  # type: ignore[union-attr]
        await call(run, "retry", "f", *at)
        await wait_for_status(app, "f", Status.COMPLETED)
        message = await asyncio.to_thread(failure, run, "fork", "f", "--from-activity", "nope:1", *at)
        assert message.startswith("InstanceStateError: ")


def test_data_may_come_from_the_standard_input(run: Run, shop: Path) -> None:
    words = ["send-event", "paid", "--key", "k", "--data", "-", "--database", str(shop)]
    assert run(*words, stdin='{"amount":\n 17}').exit_code == 0
    ((body,),) = rows(shop, "SELECT body FROM romancy_mail")
    assert body.endswith(',{"amount":17}]')


@pytest.mark.parametrize("data", ["nope", "NaN", "", "{", "[" * 100_000])
def test_data_that_are_no_json(run: Run, shop: Path, data: str) -> None:
    result = run("publish", "news", "--data", data, "--database", shop)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "this is no JSON: " in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["cancel", "user-2"], "asked to cancel user-2: a worker sees to it (pending now)"),
        (["suspend", "user-2"], "asked to suspend user-2: a worker sees to it (pending now)"),
        (["suspend", "user-1"], "suspended user-1: it stays so until it is resumed"),
        (["retry", "poor"], "poor goes on as soon as a worker is free (pending)"),
        (["fork", "ann", "--from-activity", "reserve:1", "--new-id", "x"], "started x, with the history of ann"),
        (["send-event", "paid"], "sent event paid to those who wait for it now"),
        (["send-event", "paid", "--key", "k"], "sent event paid: it is kept until somebody waits for it, for 24 hours"),
        (["publish", "news"], "published on channel news"),
        (["publish", "news", "--to", "user-2"], "sent to user-2 on channel news"),
    ],
)
def test_people_are_told_what_was_done(run: Run, shop: Path, words: list[str], said: str) -> None:
    result = run(*words, "--database", shop)
    assert (result.exit_code, result.output) == (0, f"{said}\n")


@pytest.mark.parametrize("text", ["a\x1b[31m", "\udcff", ""])
@pytest.mark.parametrize("command", [["send-event"], ["publish"], ["send-event", "paid", "--key"]])
def test_names_that_the_database_cannot_hold(run: Run, shop: Path, command: list[str], text: str) -> None:
    assert failure(run, *command, text, "--database", shop).startswith("ConfigurationError: ")


def test_migrate_creates_then_has_nothing_to_do(run: Run, database: Path) -> None:
    assert run("migrate", "--database", database).stdout == f"{database}: created the tables, version 0002\n"
    assert run("migrate", "--database", database).stdout == f"{database}: already up to date, version 0002\n"
    assert run("list", "--database", database).exit_code == 0


def test_migrate_as_json(run: Run, database: Path) -> None:
    expected = {"database": str(database), "action": "created", "from_version": None, "to_version": "0002"}
    assert json.loads(run("migrate", "--database", database, "--json").stdout) == expected
    expected |= {"action": "none", "from_version": "0002"}
    assert json.loads(run("migrate", "--database", database, "--json").stdout) == expected


def test_migrate_leaves_what_else_is_in_the_database(run: Run, database: Path) -> None:
    rows(database, "CREATE TABLE theirs (x)")
    assert run("migrate", "--database", f"sqlite:///{database}").exit_code == 0
    assert rows(database, "SELECT name FROM sqlite_master WHERE name = 'theirs'") == [("theirs",)]
