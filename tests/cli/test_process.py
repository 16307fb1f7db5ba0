"""The installed command as a process of its own: one call of each command, and how quickly it starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from romancy import __version__
from tests.cli.conftest import EXECUTABLE


def romancy_command(
    *words: str | Path, encoding: str = "utf-8", **environment: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [EXECUTABLE, *map(str, words)],
        env={**os.environ, "PYTHONIOENCODING": encoding, **environment},
        capture_output=True,
        encoding=encoding,
        timeout=30,
        check=False,
    )


def test_version() -> None:
    result = romancy_command("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"romancy {__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["list"], "There are more"),
        (["show", "ann"], "Ann Müller 東京"),
        (["history", "poor"], "RetryExhaustedError"),
        (["resume", "user-1"], "resumed user-1"),
        (["migrate"], "already up to date"),
    ],
)
def test_each_command(shop: Path, command: list[str], expected: str) -> None:
    options = ["--limit", "3"] if command == ["list"] else []
    result = romancy_command(*command, *options, COLUMNS="80", ROMANCY_DATABASE=str(shop))
    assert (result.returncode, result.stderr) == (0, "")
    assert expected in result.stdout


def test_an_error_is_one_line_on_stderr(database: Path) -> None:
    result = romancy_command("list", "--database", database)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: there is no database")
    assert result.stderr.count("\n") == 1


def test_a_terminal_that_knows_ascii_only(shop: Path) -> None:
    result = romancy_command("show", "ann", "--database", shop, encoding="ascii")
    assert result.returncode == 0
    assert "\\u6771\\u4eac" in result.stdout


def test_a_reader_that_goes_away_early_gets_no_traceback(shop: Path) -> None:
    process = subprocess.Popen(
        [EXECUTABLE, "list", "--database", shop, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(30)


def test_help_and_version_import_no_sqlalchemy() -> None:
    code = """
import json, sys
import romancy.cli.commands
print(json.dumps([name for name in sys.modules if "." not in name]))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=True)
    assert not {"sqlalchemy", "aiosqlite", "alembic", "pydantic"} & {*json.loads(result.stdout)}


@pytest.mark.parametrize("module", ["click", "sqlalchemy"])
def test_an_interrupt_while_it_imports_ends_it_without_a_traceback(tmp_path: Path, module: str) -> None:
    """By the signal itself, so that a shell's loop ends, too."""
    (tmp_path / f"{module}.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(600)\n")
    with subprocess.Popen(
        [EXECUTABLE, "list", "--database", tmp_path / "x.db"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "importing\n"
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30) == ("", "")
        finally:
            process.kill()
    assert process.returncode == -signal.SIGINT
