"""Queries answer as plain Python would: matching in inputs, parts of names, pages."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import create_engine, delete, insert, select
from sqlalchemy.pool import StaticPool

from romancy import App, InvalidFilterError, InvalidPageTokenError, Status, WorkflowContext, workflow
from romancy.storage.filters import ascii_lower, contains, input_matches
from romancy.storage.rows import StartRow
from romancy.storage.schema import instances, metadata

examples = settings(deadline=None, max_examples=60)

Search = Callable[[list[str], Any], list[int]]


@pytest.fixture(scope="module")
def search() -> Iterator[Search]:
    """Which of these inputs a condition finds, by their number."""
    engine = create_engine("sqlite://", poolclass=StaticPool)
    metadata.create_all(engine)

    def find(inputs: list[str], condition: Any) -> list[int]:
        with engine.begin() as connection:
            connection.execute(delete(instances))
            rows = [
                StartRow(f"{n:04}", 1, "w", "pending", None, 0, 0, n, None, n, None, text)._asdict()
                for n, text in enumerate(inputs)
            ]
            if rows:
                connection.execute(insert(instances), rows)
            found = connection.execute(select(instances.c.instance_id).where(condition).order_by("instance_id"))
            return [int(row[0]) for row in found]

    yield find
    engine.dispose()


# -- the oracle -------------------------------------------------------------------------------------------------


def _values_at(value: Any, parts: list[str]) -> list[Any]:
    """What a dotted path reaches: keys of objects, and indexes of lists."""
    if not parts:
        return [value]
    head, rest = parts[0], parts[1:]
    if isinstance(value, dict):
        return _values_at(value[head], rest) if head in value else []
    if isinstance(value, list) and head.isascii() and head.isdecimal() and str(int(head)) == head:
        return _values_at(value[int(head)], rest) if int(head) < len(value) else []
    return []


def _same(found: Any, wanted: Any) -> bool:
    if wanted is None or isinstance(wanted, bool):
        return found is wanted
    if isinstance(wanted, str):
        return isinstance(found, str) and found == wanted
    return isinstance(found, int | float) and not isinstance(found, bool) and found == wanted


def matches(value: Any, filters: dict[str, Any]) -> bool:
    return all(
        any(_same(found, wanted) for found in _values_at(value, path.split("."))) for path, wanted in filters.items()
    )


names = st.sampled_from(["a", "b", "0", "1", "01", "Ä", "a b", "%", "_", "$", "[0]", "key-1", "'", "--", ";"])
words = st.sampled_from(
    ["", "x", "X", "1", "true", "null", "ä", "%", "_", "a'b", "\u2603", "x\0", "\\u0000", '"', "\n"]
)
numbers = st.sampled_from(
    [0, 1, -1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 0.1, 1.0, -0.0, 1e300, 5e-324, 0.30000000000000004]
)
scalars = st.none() | st.booleans() | numbers | words
stored = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)
paths = st.lists(names, min_size=1, max_size=3).map(".".join)
wanted = st.none() | st.booleans() | numbers | words.filter(lambda word: "\0" not in word)


@examples
@given(st.lists(st.dictionaries(names, stored, max_size=3), max_size=5), st.dictionaries(paths, wanted, max_size=2))
def test_filters_find_what_plain_python_finds(search: Search, inputs: list[Any], filters: dict[str, Any]) -> None:
    texts = [json.dumps(value, ensure_ascii=False, separators=(",", ":")) for value in inputs]
    assert search(texts, input_matches(filters, "sqlite")) == [
        n for n, value in enumerate(inputs) if matches(value, filters)
    ]


@st.composite
def documents_with_a_path_into_them(draw: Any) -> tuple[Any, dict[str, Any]]:
    document = draw(st.dictionaries(names, stored, min_size=1, max_size=3))
    parts, value = [], document
    while isinstance(value, dict | list) and value:
        step = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        parts.append(str(step))
        value = value[step]
    return document, {".".join(parts): value}


@examples
@given(documents_with_a_path_into_them())
def test_value_that_is_there_is_found(search: Search, case: tuple[Any, dict[str, Any]]) -> None:
    document, filters = case
    (value,) = filters.values()
    if isinstance(value, dict | list) or (isinstance(value, str) and "\0" in value):
        return
    assert search([json.dumps(document, ensure_ascii=False)], input_matches(filters, "sqlite")) == [0]


@examples
@given(st.floats(allow_nan=False, allow_infinity=False), st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_finds_itself_and_no_other(search: Search, number: float, other: float) -> None:
    texts = [json.dumps({"x": number}), json.dumps({"x": other})]
    found = search(texts, input_matches({"x": number}, "sqlite"))
    assert found == ([0, 1] if number == other else [0])


CASES: list[tuple[dict[str, Any], Any, bool]] = [
    ({"status": "pending"}, {"status": "pending"}, True),
    ({"status": "pending"}, {"status": "Pending"}, False),
    ({"status": "pend"}, {"status": "pending"}, False),
    ({"p.q.r": 1}, {"p": {"q": {"r": 1}}}, True),
    ({"n": 1}, {"n": 1.0}, True),
    ({"n": 1.0}, {"n": 1}, True),
    ({"n": 1}, {"n": "1"}, False),
    ({"n": "1"}, {"n": 1}, False),
    ({"n": 1}, {"n": True}, False),
    ({"n": True}, {"n": 1}, False),
    ({"n": True}, {"n": True}, True),
    ({"n": True}, {"n": "true"}, False),
    ({"n": False}, {"n": False}, True),
    ({"n": False}, {"n": 0}, False),
    ({"n": False}, {"n": None}, False),
    ({"n": 0}, {"n": None}, False),
    ({"n": None}, {"n": None}, True),
    ({"n": None}, {}, False),
    ({"n": None}, {"n": "null"}, False),
    ({"n": None}, {"n": 0}, False),
    ({"n.m": None}, {"n": None}, False),
    ({"items.0.sku": "A1"}, {"items": [{"sku": "A1"}]}, True),
    ({"items.1.sku": "A1"}, {"items": [{"sku": "A1"}]}, False),
    ({"items.0": 1}, {"items": [1, 2]}, True),
    ({"items.-1": 2}, {"items": [1, 2]}, False),
    ({"items.00": 1}, {"items": [1, 2]}, False),
    ({"items.0": 1}, {"items": {"0": 1}}, True),
    ({"items.00": 1}, {"items": {"00": 1}}, True),
    ({"items": 1}, {"items": [1]}, False),
    ({"0": "x"}, {"0": "x"}, True),
    ({"n": 2**53}, {"n": 2**53 + 1}, False),
    ({"n": 2**63 - 1}, {"n": 2**63 - 1}, True),
    ({"a": 1, "b": 2}, {"a": 1, "b": 2}, True),
    ({"a": 1, "b": 2}, {"a": 1, "b": 3}, False),
    ({}, {"anything": 1}, True),
    ({"a%": 1}, {"a%": 1}, True),
    ({"a%": 1}, {"ab": 1}, False),
    ({"s": "50%"}, {"s": "50%"}, True),
    ({"s": "%"}, {"s": "50%"}, False),
    ({"x' OR 1=1 --": 1}, {"a": 1}, False),
    ({"a": "' OR 1=1 --"}, {"a": 1}, False),
    ({"a": "x"}, {"a": "x\0y"}, False),
    ({"a": "\\u0000"}, {"a": "\\u0000"}, True),
    ({"s": 'quote " and \\ backslash'}, {"s": 'quote " and \\ backslash'}, True),
]


@pytest.mark.parametrize(("filters", "document", "is_found"), CASES, ids=[str(n) for n in range(len(CASES))])
def test_rule_of_matching(search: Search, filters: dict[str, Any], document: Any, is_found: bool) -> None:
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    assert search([text], input_matches(filters, "sqlite")) == ([0] if is_found else [])
    assert matches(document, filters) == is_found


def test_deeply_nested_input_of_one_instance_does_not_spoil_the_query_for_others(search: Search) -> None:
    deep = '{"v":' + "[" * 1_500 + "]" * 1_500 + "}"
    assert search([deep, '{"a":1}'], input_matches({"a": 1}, "sqlite")) == [1]


def test_paths_and_values_are_bound_never_pasted_into_sql() -> None:
    condition = input_matches({"secret.path": "secret value", "n": 12345}, "sqlite")
    sql = str(condition.compile())
    assert "secret" not in sql
    assert "12345" not in sql


@pytest.mark.parametrize(
    ("filters", "says"),
    [
        ({"": 1}, "the path '' is empty"),
        ({"a..b": 1}, "the path 'a..b' has an empty part"),
        ({".a": 1}, "empty part"),
        ({"a.": 1}, "empty part"),
        ({1: 1}, "the path 1 is of type int"),
        ({None: 1}, "the path None is of type NoneType"),
        ({'a"b': 1}, "holds a quote"),
        ({"a\\b": 1}, "a backslash"),
        ({"a\nb": 1}, "control character"),
        ({"a\0": 1}, "control character"),
        ({"\ud800": 1}, "control character"),
        ({".".join("a" * 17): 1}, "has 17 parts: the limit is 16"),
        ({".".join("0" * 7): 1}, "more than 6 list indexes"),
        ({"a": [1]}, r"the value \[1\] of path 'a' is of type list"),
        ({"a": {"b": 1}}, "of path 'a' is of type dict"),
        ({"a": b"x"}, "of type bytes"),
        ({"a": datetime(2024, 1, 1)}, "of type datetime"),
        ({"a": float("nan")}, "the value nan of path 'a' is out of range"),
        ({"a": float("inf")}, "out of range"),
        ({"a": 2**63}, "out of range"),
        ({"a": -(2**63) - 1}, "out of range"),
        ({"a": "\ud800"}, "no valid text"),
        ({"a": "x\0"}, "NUL"),
        ([("a", 1)], "no mapping"),
        ("a", "no mapping"),
        (None, "no mapping"),
    ],
    ids=count(),
)
def test_bad_filter_is_a_value_error_that_names_it(filters: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        input_matches(filters, "sqlite")
    assert isinstance(caught.value, InvalidFilterError)


# -- parts of names ---------------------------------------------------------------------------------------------

letters = st.text(st.sampled_from("aAbBzZ%_äÄİß.-0'\\"), max_size=6)


@examples
@given(st.lists(letters, max_size=6), letters)
def test_parts_of_text_ignore_ascii_case_only_and_know_no_wildcards(
    search: Search, inputs: list[str], part: str
) -> None:
    expected = [n for n, text in enumerate(inputs) if ascii_lower(part) in ascii_lower(text)]
    assert search(inputs, contains(instances.c.input, part, "sqlite")) == expected


@examples
@given(st.text())
def test_ascii_lower_changes_ascii_letters_only(text: str) -> None:
    lowered = ascii_lower(text)
    assert len(lowered) == len(text)
    assert all(a == b or (a.isascii() and a.isupper() and b == a.lower()) for a, b in zip(text, lowered, strict=True))


# -- through the app --------------------------------------------------------------------------------------------


def _define() -> None:
    @workflow
    async def order(ctx: WorkflowContext, payload: Any) -> None: ...


async def _put(app: App, rows: list[tuple[str, str, str, Any, int]]) -> None:
    """Instances with the times that a test wants, as if they had been started."""
    connection = sqlite3.connect(app._life.store.path)
    connection.executemany(
        "INSERT INTO romancy_instances "
        "(instance_id, run, workflow_name, status, claims, created_at, updated_at, input) "
        "VALUES (?, 1, ?, ?, 0, ?, ?, ?)",
        [(key, name, status, at, at, json.dumps(document)) for key, name, status, document, at in rows],
    )
    connection.commit()
    connection.close()


async def _ids(app: App, **query: Any) -> list[str]:
    return [instance.instance_id async for instance in app.iter_instances(**query)]


async def test_lists_match_names_in_part_and_status_exactly() -> None:
    _define()
    async with App(":memory:", worker=False) as app:
        rows = [
            ("order_1", "OrderFlow", "pending"),
            ("orderX2", "order_flow", "suspended"),
            ("100%", "orderXflow", "suspended"),
            ("ÄB", "other", "pending"),
        ]
        await _put(app, [(*row, {}, 1_000 + n) for n, row in enumerate(rows)])
        assert await _ids(app, instance_id="order_") == ["order_1"]
        assert await _ids(app, instance_id="%") == ["100%"]
        assert await _ids(app, instance_id="ORDER") == ["orderX2", "order_1"]
        assert await _ids(app, instance_id="äb") == []
        assert await _ids(app, instance_id="Äb") == ["ÄB"]
        assert await _ids(app, workflow_name="r_f") == ["orderX2"]
        assert await _ids(app, workflow_name="FLOW", status="suspended") == ["100%", "orderX2"]
        assert await _ids(app, status=Status.PENDING) == ["ÄB", "order_1"]
        assert await _ids(app, workflow_name="") == ["ÄB", "100%", "orderX2", "order_1"]


async def test_times_of_start_bound_the_list_on_both_sides() -> None:
    _define()
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    async with App(":memory:", worker=False) as app:
        await _put(app, [(f"i{n}", "order", "pending", {}, n) for n in range(5)])
        after, before = epoch + timedelta(microseconds=1), epoch + timedelta(microseconds=4)
        assert await _ids(app, started_after=after, started_before=before) == ["i3", "i2"]
        elsewhere = timezone(timedelta(hours=5))
        assert await _ids(app, started_after=after.astimezone(elsewhere)) == ["i4", "i3", "i2"]


async def test_pages_are_newest_first_and_stable_when_times_are_equal() -> None:
    _define()
    async with App(":memory:", worker=False) as app:
        await _put(app, [(f"i{n:02}", "order", "pending", {"n": n % 2}, 5 + n // 5) for n in range(17)])
        everything = [f"i{n:02}" for n in reversed(range(17))]
        for limit in (1, 2, 3, 5, 16, 17, 18):
            seen, token = [], None
            while True:
                page = await app.list_instances(limit=limit, page_token=token)
                assert len(page.instances) <= limit
                seen += [instance.instance_id for instance in page.instances]
                assert page.has_more == (page.next_page_token is not None)
                token = page.next_page_token
                if token is None:
                    break
            assert seen == everything
        odd = [instance.instance_id async for instance in app.iter_instances(filters={"n": 1}, page_size=2)]
        assert odd == [key for key in everything if int(key[1:]) % 2]


async def test_instances_that_are_new_meanwhile_do_not_shift_the_pages() -> None:
    _define()
    async with App(":memory:", worker=False) as app:
        await _put(app, [(f"i{n}", "order", "pending", {}, n) for n in range(4)])
        first = await app.list_instances(limit=2)
        await _put(app, [("newer", "order", "pending", {}, 99)])
        second = await app.list_instances(limit=2, page_token=first.next_page_token)
        assert [i.instance_id for i in (*first.instances, *second.instances)] == ["i3", "i2", "i1", "i0"]


async def test_token_belongs_to_its_query_however_that_is_written() -> None:
    _define()
    async with App(":memory:", worker=False) as app:
        await _put(app, [(f"i{n}", "order", "pending", {"a": 1, "b": True}, 10 + n) for n in range(4)])
        after = datetime(1970, 1, 1, tzinfo=UTC)
        page = await app.list_instances(limit=1, status="pending", started_after=after)
        same = await app.list_instances(
            limit=3,
            status=Status.PENDING,
            started_after=after.astimezone(timezone(timedelta(hours=1))),
            page_token=page.next_page_token,
        )
        assert [i.instance_id for i in same.instances] == ["i2", "i1", "i0"]
        found = await app.find_instances({"a": 1, "b": True}, limit=1)
        again = await app.find_instances({"b": True, "a": 1}, limit=9, page_token=found.next_page_token)
        assert len(again.instances) == 3
        for other in ({"a": 1}, {"a": True, "b": True}, {"a": 1, "b": 1}):
            with pytest.raises(InvalidPageTokenError, match="belongs to another query"):
                await app.find_instances(other, page_token=found.next_page_token)
        with pytest.raises(InvalidPageTokenError, match="belongs to another query"):
            await app.list_instances(page_token=page.next_page_token)


async def test_find_takes_status_and_workflow_name_too() -> None:
    _define()
    async with App(":memory:", worker=False) as app:
        rows = [("a", "order", "pending"), ("b", "order", "suspended"), ("c", "refund", "pending")]
        await _put(app, [(*row, {"k": "v"}, n) for n, row in enumerate(rows)])

        async def find(**options: Any) -> list[str]:
            return [i.instance_id for i in (await app.find_instances({"k": "v"}, **options)).instances]

        assert await find() == ["c", "b", "a"]
        assert await find(status="pending") == ["c", "a"]
        assert await find(workflow_name="ORD") == ["b", "a"]
        assert await find(workflow_name="ord", status=Status.SUSPENDED) == ["b"]
        assert await find(limit=1) == ["c"]


async def test_inputs_are_found_as_start_workflow_stored_them() -> None:
    @workflow
    async def structured(ctx: WorkflowContext, order: dict[str, Any]) -> None: ...

    @workflow
    async def several(ctx: WorkflowContext, order_id: str, amount: float) -> None: ...

    @workflow
    async def scalar(ctx: WorkflowContext, order_id: str) -> None: ...

    async with App(":memory:", worker=False) as app:
        await app.start_workflow(structured, {"order_id": "Ä1", "lines": [{"sku": "A1"}]}, id="structured")
        await app.start_workflow(several, "Ä1", 5, id="several")
        await app.start_workflow(scalar, "Ä1", id="scalar")

        async def find(filters: dict[str, Any]) -> set[str]:
            return {i.instance_id for i in (await app.find_instances(filters)).instances}

        assert await find({"order_id": "Ä1"}) == {"structured", "several", "scalar"}
        assert await find({"lines.0.sku": "A1"}) == {"structured"}
        assert await find({"amount": 5}) == {"several"}
