"""``resume`` and ``migrate``: the two commands that write."""

from __future__ import annotations

import json
from pathlib import Path

from romancy import WorkflowContext, workflow
from tests.cli.conftest import Run
from tests.databases import rows


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
