"""What users get wrong, and what they are told: never a traceback, and never a new database."""

from __future__ import annotations

import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Run

OF_AN_INSTANCE = ["show", "history", "resume", "retry", "suspend", "cancel"]
ON_A_DATABASE = [
    ["list"],
    *[[command, "x"] for command in OF_AN_INSTANCE],
    ["fork", "x", "--from-activity", "y:1"],
    ["send-event", "x"],
    ["publish", "x"],
]


def failure(run: Run, *words: str | Path) -> str:
    """The message, which is the same for people and for programs."""
    for_people = run(*words)
    assert (for_people.exit_code, for_people.stdout) == (1, "")
    assert "Traceback" not in for_people.stderr
    for_programs = run(*words, "--json")
    assert (for_programs.exit_code, for_programs.stderr) == (1, "")
    error = json.loads(for_programs.stdout)["error"]
    assert error.keys() == {"type", "message"}
    assert for_people.stderr.startswith("error: ")
    assert "\x1b" not in for_people.stderr
    return f"{error['type']}: {error['message']}"


@pytest.mark.parametrize("command", ON_A_DATABASE)
def test_a_missing_database_is_not_created(run: Run, database: Path, command: list[str]) -> None:
    message = failure(run, *command, "--database", database)
    assert message.startswith(f"DatabaseUnavailableError: there is no database {database}")
    assert message.endswith(f"romancy migrate --database {database}")
    assert list(database.parent.iterdir()) == []


@pytest.mark.parametrize("command", [*ON_A_DATABASE, ["migrate"]])
def test_a_file_that_is_no_database_stays_as_it_is(run: Run, database: Path, command: list[str]) -> None:
    database.write_text("no database\n" * 1_000)
    assert "the file is no SQLite database" in failure(run, *command, "--database", database)
    assert database.read_text() == "no database\n" * 1_000


@pytest.mark.parametrize("command", ON_A_DATABASE)
def test_missing_tables_name_the_command_that_makes_them(run: Run, database: Path, command: list[str]) -> None:
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    message = failure(run, *command, "--database", database)
    assert message.startswith("SchemaError: ")
    assert message.endswith(f"run: romancy migrate --database {database}")


@pytest.mark.parametrize("command", [*ON_A_DATABASE, ["migrate"]])
def test_tables_of_a_newer_version_ask_for_an_upgrade(run: Run, shop: Path, command: list[str]) -> None:
    with sqlite3.connect(shop) as connection:
        connection.execute("UPDATE romancy_schema_version SET version_num = '9999'")
    assert "upgrade the package" in failure(run, *command, "--database", shop)


@pytest.mark.parametrize("command", [*ON_A_DATABASE, ["migrate"]])
@pytest.mark.parametrize(
    ("address", "message"),
    [
        (".", "is a folder"),
        (":memory:", "name a file"),
        ("oracle://host/orders", "oracle:// is not supported"),
        (" ", "the database is empty"),
    ],
)
def test_addresses_that_name_no_file(run: Run, command: list[str], address: str, message: str) -> None:
    assert message in failure(run, *command, "--database", address)


@pytest.mark.parametrize("command", OF_AN_INSTANCE)
@pytest.mark.parametrize("name", ["nope", "\x1b[31m", "\udcff", "ANN", "an"])
def test_an_unknown_id(run: Run, shop: Path, command: str, name: str) -> None:
    message = failure(run, command, name, "--database", shop)
    assert message.startswith("InstanceNotFoundError: there is no instance ")
    assert message.endswith(f"romancy list --database {shop} --id PART")


def test_an_unknown_run(run: Run, shop: Path) -> None:
    assert "has no run 2; its latest is 1" in failure(run, "history", "ann", "--database", shop, "--run", "2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--status", "finished"], "InvalidFilterError: status='finished': give one of pending, running"),
        (["--page-token", "zzz"], "InvalidPageTokenError: page_token='zzz'"),
        (["--limit", "0"], "InvalidFilterError: limit=0: give a whole number from 1 to 1000"),
        (["--limit", "1001"], "InvalidFilterError: limit=1001"),
        (["--input", "a..b=1"], "InvalidFilterError: the path 'a..b' has an empty part"),
        (["--input", "a=[1]"], "InvalidFilterError: the value [1] of path 'a'"),
        (["--input", "a=1e999"], "InvalidFilterError: the value inf of path 'a'"),
    ],
)
def test_bad_filters(run: Run, shop: Path, options: list[str], message: str) -> None:
    assert failure(run, "list", "--database", shop, *options).startswith(message)


def test_a_page_token_of_another_query(run: Run, shop: Path) -> None:
    token = json.loads(run("list", "--database", shop, "--limit", "1", "--json").stdout)["next_page_token"]
    words = ["list", "--database", str(shop), "--status", "failed", "--page-token", token]
    assert "belongs to another query" in failure(run, *words)


def test_migrate_where_no_file_can_be(run: Run, tmp_path: Path) -> None:
    message = failure(run, "migrate", "--database", tmp_path / "nowhere" / "x.db")
    assert message.startswith("DatabaseUnavailableError")


@pytest.mark.parametrize(
    "words",
    [
        ["list"],
        ["show", "--database", "x.db"],
        ["list", "--database", "x.db", "--input", "no value"],
        ["list", "--database", "x.db", "--input", "=1"],
        ["list", "--database", "x.db", "--input", "a=1", "--input", "a=2"],
        ["list", "--database", "x.db", "--limit", "many"],
        ["history", "x", "--database", "x.db", "--run", "0"],
        ["worker"],
        ["no-such-command"],
        ["list", "--no-such-option"],
    ],
)
def test_wrong_usage_exits_with_2(run: Run, words: list[str]) -> None:
    result = run(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Usage: " in result.stderr


# -- worker: the module and what it holds ----------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of the user's, and the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith(("broken", "some_shop", "homeless_shop")):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n\ny = x / 0\n", "ZeroDivisionError: division by zero ({file}:3)"),
        ("import json\n\njson.loads('{')\n", "JSONDecodeError: Expecting property name"),
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax ({file}:2)"),
        ("import no_such_library.part\n", "ModuleNotFoundError: No module named 'no_such_library' ({file}:1)"),
        ("\nraise SystemExit(3)\n", "SystemExit: 3 ({file}:2)"),
        (
            "from romancy import activity\n\n@activity\ndef f(): ...\n\n@activity(name='f')\ndef g(): ...\n",
            "DuplicateNameError",
        ),
        ("raise ValueError('\\x1b[31m')\n", "ValueError"),
    ],
)
def test_a_module_that_fails_at_import_is_named_with_error_and_line(
    run: Run, project: Path, source: str, message: str
) -> None:
    file = project / "broken.py"
    file.write_text(source)
    found = failure(run, "worker", "broken:app")
    assert found.startswith(f"ConfigurationError: importing 'broken' failed with {message.format(file=file)}")
    assert str(file) in found


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("some_shop", "give module:attribute, such as some_shop:app"),
        ("some_shop.py:app", "such as some_shop:app"),
        ("./web/some_shop.py:app", "such as web.some_shop:app"),
        ("some_shop:", "give module:attribute"),
        (":app", "give module:attribute"),
        ("some_shop:app:app", "give module:attribute"),
        ("no_such_module:app", "there is no module 'no_such_module' in "),
        ("some_shop.part:app", "there is no module 'some_shop.part' in "),
        ("some_shop:nope", "there is no 'nope'; apps there: some_shop:app"),
        ("some_shop:app.nope", "there is no 'nope'"),
        ("some_shop:number", "is of type int, no App; apps there: some_shop:app"),
        ("some_shop:factory", "is called for an App, and failed with RuntimeError: no luck ("),
        ("some_shop:later", "is of type coroutine, no App"),
        ("some_shop:needs", "failed with TypeError: needs() missing 1 required positional argument: 'x'"),
        ("json:loads.__name__", "is of type str, no App; module 'json' holds no App object"),
    ],
)
def test_targets_that_name_no_app(run: Run, project: Path, target: str, message: str) -> None:
    (project / "some_shop.py").write_text(
        "from romancy import App\n"
        "app = App('some.db')\n"
        "number = 1\n"
        "def factory(): raise RuntimeError('no luck')\n"
        "async def later(): ...\n"
        "def needs(x): ...\n"
    )
    found = failure(run, "worker", target)
    assert found.startswith("ConfigurationError: ")
    assert message in found
    assert not (project / "some.db").exists()


def test_a_worker_whose_database_cannot_be_opened(run: Run, project: Path) -> None:
    (project / "homeless_shop.py").write_text("from romancy import App\ndef app(): return App('no/such/folder.db')\n")
    assert failure(run, "worker", "homeless_shop:app").startswith("DatabaseUnavailableError")
