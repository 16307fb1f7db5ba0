"""The one statement of a group commit on PostgreSQL: what it writes, by whatever shape."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from romancy.storage.address import parse_address
from romancy.storage.mail import Closing, Receipt
from romancy.storage.postgresql import PostgresqlStore
from romancy.storage.postgresql_flush import FEW, Fence, Rows, flush_statement, new_starts, rows_of
from romancy.storage.rows import HistoryRow, StartRow, StateRow
from romancy.storage.stores import make_store
from romancy.storage.threads import Link
from tests.databases import clean, execute
from tests.databases import rows as rows_in

ME = "5e0b9d4c-7d55-4a5e-9f0f-0d6c1a5f7b21"
ALIVE = (
    "INSERT INTO romancy_workers (worker_id, name, state, host, pid, process_started, started_at, lease_until) "
    f"VALUES ('{ME}', 'n', 'alive', 'h', 1, 1, 1, 9)"
)
TABLES = ("instances", "history", "deliveries", "subscriptions", "mail")
TEXTS = st.text(st.characters(min_codepoint=32, exclude_categories=("Cs",)), max_size=12)
NUMBERS = st.integers(-(2**62), 2**62)


@pytest.fixture
def link(postgresql_url: str) -> Iterator[Link]:
    store = make_store(parse_address(postgresql_url), [])
    store.prepare(migrate=True)
    execute(postgresql_url, ALIVE)
    with contextlib.closing(store.connect()) as link:
        yield link
    clean(postgresql_url)


def worker_fence(url: str) -> Fence:
    store = make_store(parse_address(url), [])
    assert isinstance(store, PostgresqlStore)
    return Fence(store._worker_fence, ME)


def flush(link: Link, fence: Fence, rows: Rows) -> tuple[bool, set[str]]:
    sql, values = flush_statement(fence, rows, 1)
    is_alive, inserted, _ = link.execute(sql, values).fetchone()
    return is_alive, new_starts(inserted)


def start(instance_id: str, **fields: Any) -> StartRow:
    row = StartRow(instance_id, 1, "flow", "running", ME, None, 0, 1, None, 1, None, "{}")
    return row._replace(**fields)


def event(instance_id: str, seq: int = 1, **fields: Any) -> HistoryRow:
    row = HistoryRow(instance_id, 1, seq, "ActivityCompleted", None, None, None, 1, 1, None, None, None, None)
    return row._replace(**fields)


def state(instance_id: str, **fields: Any) -> StateRow:
    return StateRow(instance_id, "completed", None, None, 2, 2, None, None)._replace(**fields)


def nothing(**kinds: Any) -> Rows:
    return Rows([], [], [], [], [], [])._replace(**kinds)


def contents(url: str) -> dict[str, list[tuple[Any, ...]]]:
    return {table: sorted(map(tuple, rows_in(url, f"SELECT * FROM romancy_{table}")), key=repr) for table in TABLES}


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    texts=st.lists(st.none() | st.just("None") | TEXTS, min_size=1, max_size=6),
    number=NUMBERS,
    is_empty=st.booleans(),
)
def test_all_shapes_store_what_they_are_given(
    link: Link, postgresql_url: str, texts: list[str | None], number: int, is_empty: bool
) -> None:
    """Texts with quotes, backslashes, commas, braces, words like NULL: as values and as one text."""
    execute(postgresql_url, "DELETE FROM romancy_history")
    rows = [event("é'\\", n, result=text, error="" if is_empty else None, at=number) for n, text in enumerate(texts)]
    assert flush(link, worker_fence(postgresql_url), nothing(events=rows)) == (True, set())
    found = rows_in(postgresql_url, f"SELECT {', '.join(HistoryRow._fields)} FROM romancy_history ORDER BY seq")
    assert [HistoryRow(*row) for row in found] == rows


@pytest.mark.parametrize("count", [1, FEW, FEW + 1, 50])
def test_each_kind_of_row(link: Link, postgresql_url: str, count: int) -> None:
    fence = worker_fence(postgresql_url)
    ids = [f"i{n}" for n in range(count)]
    assert flush(link, fence, nothing(starts=[start(i) for i in ids])) == (True, set())
    keyed = [start(i) for i in ("i0", *(f"k{n}" for n in range(count)))]
    assert flush(link, fence, nothing(keyed_starts=keyed)) == (True, {f"k{n}" for n in range(count)})
    flush(link, fence, nothing(events=[event(i) for i in ids], states=[state(i, result=i) for i in ids]))
    ended = rows_in(postgresql_url, "SELECT result FROM romancy_instances WHERE result = instance_id")
    assert sorted(i for (i,) in ended) == sorted(ids)
    assert len(contents(postgresql_url)["history"]) == count


@pytest.mark.parametrize("count", [1, FEW, FEW + 1])
def test_ends_of_deliveries_and_mailboxes(link: Link, postgresql_url: str, count: int) -> None:
    for n in range(count + 1):
        execute(
            postgresql_url,
            "INSERT INTO romancy_deliveries "
            "(instance_id, run, operation_id, to_id, mail_id, kind, name, subject, body, expires_at) "
            f"VALUES ('i{n}', 1, 'op', '', 'm{n}', 'event', 'e', 's', '1', 9)",
        )
        execute(
            postgresql_url,
            "INSERT INTO romancy_mail (to_id, mail_id, kind, name, subject, body, expires_at) "
            f"VALUES ('i{n}', 'm{n}', 'message', 'c', '', '1', 9)",
        )
        execute(
            postgresql_url,
            f"INSERT INTO romancy_subscriptions (instance_id, channel) VALUES ('i{n}', 'c')",
        )
    fence = worker_fence(postgresql_url)
    receipts, closed = rows_of([*(Receipt(f"i{n}", 1, "op") for n in range(count)), Receipt(f"i{count}", 2, "op")])
    flush(link, fence, nothing(receipts=receipts))
    left = contents(postgresql_url)
    assert [len(left[table]) for table in ("deliveries", "subscriptions", "mail")] == [1, count + 1, count + 1]
    _, closed = rows_of([Closing(f"i{n}") for n in range(1, count + 1)])
    flush(link, fence, nothing(closed=closed))
    left = contents(postgresql_url)
    assert [len(left[table]) for table in ("deliveries", "subscriptions", "mail")] == [0, 1, 1]


@pytest.mark.parametrize("count", [1, FEW + 1])
def test_without_the_lease_nothing_is_written(link: Link, postgresql_url: str, count: int) -> None:
    fence = worker_fence(postgresql_url)
    flush(link, fence, nothing(starts=[start(f"old{n}") for n in range(count)]))
    execute(postgresql_url, "UPDATE romancy_workers SET state = 'dead'")
    before = contents(postgresql_url)
    rows = Rows(
        [start(f"new{n}") for n in range(count)],
        [start(f"keyed{n}") for n in range(count)],
        [event(f"old{n}") for n in range(count)],
        [state(f"old{n}") for n in range(count)],
        [Receipt(f"old{n}", 1, "op") for n in range(count)],
        [f"old{n}" for n in range(count)],
    )
    for kind, given_rows in rows._asdict().items():
        assert flush(link, fence, nothing(**{kind: given_rows})) == (False, set())
    assert flush(link, fence, rows) == (False, set())
    assert contents(postgresql_url) == before


@pytest.mark.parametrize("count", [1, FEW, FEW + 1])
@pytest.mark.parametrize("owner", [None, "somebody else"])
def test_an_instance_of_somebody_else_fails_all_of_it(
    link: Link, postgresql_url: str, count: int, owner: str | None
) -> None:
    fence = worker_fence(postgresql_url)
    flush(link, fence, nothing(starts=[start(f"i{n}") for n in range(count)]))
    flush(link, fence, nothing(starts=[start("theirs", owner=owner)]))
    before = contents(postgresql_url)
    states = [*(state(f"i{n}") for n in range(count - 1)), state("theirs")]
    with pytest.raises(psycopg.errors.DivisionByZero):
        flush(link, fence, nothing(events=[event("i0")], states=states))
    assert contents(postgresql_url) == before


@pytest.mark.parametrize("char", ["\x1e", "\x1f"])
def test_what_stands_between_values_can_be_no_part_of_them(char: str) -> None:
    """It would shift all that comes after it; names with control characters are refused where they come in."""
    rows = nothing(events=[event("i", n, result=f"a{char}b") for n in range(FEW + 1)])
    with pytest.raises(UnicodeError, match="control characters"):
        flush_statement(Fence("SELECT 1"), rows, 1)


def test_what_stands_for_a_missing_value_can_be_no_part_of_others() -> None:
    rows = nothing(events=[event("i", n, name="None", result="a\x1db") for n in range(FEW + 1)])
    with pytest.raises(UnicodeError, match="control characters"):
        flush_statement(Fence("SELECT 1"), rows, 1)


@pytest.mark.parametrize("count", [1, FEW + 1])
def test_the_word_none_is_a_text_like_others(link: Link, postgresql_url: str, count: int) -> None:
    """Missing values are written so, in the texts where nothing else is."""
    fence, ids = worker_fence(postgresql_url), ["None", *map(str, range(1, count))]
    starts = [start(i, workflow_name="None") for i in ids]
    events = [event(i, operation_id="None", name="None:1", result='"None"') for i in ids]
    assert flush(link, fence, nothing(keyed_starts=starts, events=events)) == (True, set(ids))
    assert flush(link, fence, nothing(states=[state(i) for i in ids])) == (True, set())
    found = rows_in(postgresql_url, f"SELECT {', '.join(HistoryRow._fields)} FROM romancy_history")
    assert sorted((tuple(row) for row in found), key=repr) == sorted(map(tuple, events), key=repr)
    ended = "SELECT instance_id, workflow_name, parent_id, result FROM romancy_instances WHERE status = 'completed'"
    assert sorted(map(tuple, rows_in(postgresql_url, ended))) == [(i, "None", None, None) for i in sorted(ids)]


def test_few_shapes_are_prepared() -> None:
    """Numbers and missing values don't make it another statement for the driver."""
    fence = Fence("SELECT 1 FROM w WHERE worker_id = %s", ME)
    one = flush_statement(fence, nothing(events=[event("i", 1, position=3, due_at=2**40)]), 1)
    other = flush_statement(fence, nothing(events=[event("j", 2**20, name="n")]), 1)
    assert one[0] is other[0]
    assert {type(value) for value in (*one[1], *other[1])} == {str, type(None)}
