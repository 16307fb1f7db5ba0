"""The order example keeps its word, however often it is killed."""

from __future__ import annotations

import csv
import re
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from random import Random

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "order.py"
ORDERS = EXAMPLE.parent / "data" / "orders.csv"
ALL_WELL = "283 orders, 283 charged exactly once, 0 charged twice, stock adds up"
PATIENCE_S = 40.0

REJECTED = {
    (17, "SO-10059"): "email is missing",
    (29, "SO-10071"): "quantity '-2': Input should be greater than or equal to 1",
    (46, "SO-10092"): "sku 'NB-B5-GRID': Not in the catalogue",
    (58, "SO-10105"): "unit_price '39,00': Input should be a valid decimal",
    (71, "SO-10117"): "order_id: line 70 has the same",
    (94, "SO-10142"): "the line has 3 columns instead of 10",
    (112, "SO-10164"): "the card was declined for 16.80",
    (131, "SO-10187"): "currency 'JPY': Input should be 'EUR', 'GBP' or 'USD'",
    (149, "-"): "the line is empty",
    (163, "SO-10229"): "email 'rhysl at inbox.example' is malformed",
    (178, "SO-10246"): "the line has 11 columns instead of 10",
    (197, "SO-10267"): "there are no 5000 of ERASER-SOFT in stock",
    (214, "SO-10285"): "ordered_at '2026-02-30 10:15:00': Input should be a valid datetime or date, day value is "
    "outside expected range",
    (233, "SO-10136"): "order_id: line 88 has the same",
    (251, "SO-10327"): "unit_price 'n/a': Input should be a valid decimal",
    (270, "SO-10352"): "the card was declined for 44.70",
    (288, "-"): "order_id is missing",
}


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLE), *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(folder: Path, *options: str) -> tuple[int, str, str]:
    with start(folder, *options) as process:
        out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def query(folder: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(folder / "orders.db")) as connection:
        return connection.execute(sql).fetchall()


def charges(folder: Path) -> int:
    """How many charges are committed; -1 while there is no table for them."""
    if not (folder / "orders.db").exists():
        return -1
    try:
        return int(str(query(folder, "SELECT count(*) FROM charges")[0][0]))
    except sqlite3.OperationalError:
        return -1


def stop_when(process: subprocess.Popen[str], folder: Path, at_least: int, signum: int) -> tuple[str, str]:
    """Send the signal once so many charges are committed; what the process had printed."""
    deadline = time.monotonic() + PATIENCE_S
    with process:
        while charges(folder) < at_least:
            assert process.poll() is None, f"it ended by itself: {process.communicate()}"
            assert time.monotonic() < deadline, "it makes no progress"
            time.sleep(0.01)
        process.send_signal(signum)
        out, err = process.communicate(timeout=PATIENCE_S)
    return out, err


def rejections(out: str) -> dict[tuple[int, str], str]:
    """The table of rejected lines, its folded cells joined again."""
    found: dict[tuple[int, str], str] = {}
    last = (0, "")
    for line in out[out.index("reason") :].splitlines()[2:]:
        if match := re.match(r" +(\d+) +(SO-\d+|-) +(\S.*?) *$", line):
            last = (int(match[1]), match[2])
            found[last] = match[3]
        elif line.startswith(" " * 15) and line.strip():
            found[last] += " " + line.strip()
        else:
            break
    return found


def assert_books_are_right(folder: Path) -> None:
    """Count from the file and the tables alone, by rules of the test's own."""
    with ORDERS.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    bad_lines = {line for line, _ in REJECTED}
    good = {row[0]: row for number, row in enumerate(rows, 1) if number > 1 and number not in bad_lines}
    assert len(rows) == 301
    assert len(good) == 283

    charged = query(folder, "SELECT order_id, cents, currency FROM charges ORDER BY order_id")
    assert charged == sorted(
        (order_id, round(int(row[6]) * float(row[7]) * 100), row[8]) for order_id, row in good.items()
    )
    assert query(folder, "SELECT count(DISTINCT charge_id) FROM charges") == [(283,)]
    assert query(folder, "SELECT order_id FROM shipments ORDER BY 1") == [(order_id,) for order_id in sorted(good)]
    reserved = query(folder, "SELECT order_id, sku, quantity FROM reservations ORDER BY order_id")
    assert reserved == sorted((order_id, row[5], int(row[6])) for order_id, row in good.items())
    for sku, initial, available in query(folder, "SELECT sku, initial, available FROM stock"):
        assert available == int(str(initial)) - sum(int(row[6]) for row in good.values() if row[5] == sku)
    statuses = query(folder, "SELECT status, count(*) FROM romancy_instances GROUP BY status ORDER BY status")
    assert statuses == [("completed", 283 + 1), ("failed", len(REJECTED))]
    assert query(folder, "PRAGMA integrity_check") == [("ok",)]


def test_killed_again_and_again_it_loses_and_doubles_nothing(tmp_path: Path) -> None:
    random = Random(11)
    for at_least in [0, *sorted(random.sample(range(1, 275), 4))]:
        out, err = stop_when(start(tmp_path), tmp_path, at_least, signal.SIGKILL)
        assert err == ""
        assert ALL_WELL not in out

    code, out, err = run(tmp_path)

    assert (code, err) == (0, "")
    assert re.search(r"^\d+ of 300 orders were done already$", out, re.MULTILINE)
    assert re.search(r"^resumed \d+ unfinished orders of an earlier run$", out, re.MULTILINE)
    assert out.splitlines()[-1] == ALL_WELL
    assert rejections(out) == REJECTED
    assert_books_are_right(tmp_path)

    code, again, err = run(tmp_path)
    assert (code, err) == (0, "")
    assert "300 of 300 orders were done already" in again
    assert again[again.index("reason") :] == out[out.index("reason") :]
    assert_books_are_right(tmp_path)


def test_interrupted_it_says_how_to_go_on(tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("".join(ORDERS.read_text("utf-8").splitlines(keepends=True)[:101]), "utf-8")
    process = start(tmp_path, "--orders", "few.csv")

    out, err = stop_when(process, tmp_path, 20, signal.SIGINT)

    assert (process.returncode, err) == (130, "")
    assert out.splitlines()[-1] == "Stopped. Nothing is lost: the same command goes on from here."

    code, out, err = run(tmp_path, "--orders", "few.csv")
    assert (code, err) == (0, "")
    assert "unfinished orders of an earlier run" in out
    assert out.splitlines()[-1] == "94 orders, 94 charged exactly once, 0 charged twice, stock adds up"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "the first line is not order_id,"),
        (b"sku,quantity\nNB-A5-DOT,1\n", "the first line is not order_id,"),
        (b"order_id,\xff\xfe\n", "can't decode byte"),
    ],
    ids=["missing", "empty", "other columns", "not UTF-8"],
)
def test_an_unreadable_file_is_named_without_a_traceback(tmp_path: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "mine.csv").write_bytes(content)

    code, _, err = run(tmp_path, "--orders", "mine.csv")

    assert code == 2
    assert "mine.csv can't be read: " in err
    assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "orders.db").exists()


def test_an_unusable_database_is_named_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "note.db").write_text("this is no database " * 100)

    code, _, err = run(tmp_path, "--database", "note.db")

    assert code == 1
    assert "note.db" in err
    assert "Traceback" not in err
