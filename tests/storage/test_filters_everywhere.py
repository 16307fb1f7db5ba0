"""Filters find the same instances on every database, as plain Python would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum, IntEnum, StrEnum
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import URL, Connection, Engine, create_engine, insert, select, text
from sqlalchemy.exc import InvalidRequestError
from sqlalchemy.pool import StaticPool

from romancy.storage.filters import _mysql_is_flat, ascii_lower, contains, input_matches
from romancy.storage.rows import StartRow
from romancy.storage.schema import instances, metadata
from tests.databases import server

examples = settings(deadline=None, max_examples=40)

Find = Callable[[Any], set[str]]


@dataclass(frozen=True)
class Database:
    """A database with the tables in it, and what it can't do.

    Attributes:
        deepest: how many levels its JSON functions surely read.
        reads_all_whole_numbers: whether whole numbers beyond 64 bits are more than floats to it.
    """

    engine: Engine
    deepest: int
    reads_all_whole_numbers: bool

    @property
    def dialect(self) -> str:
        return self.engine.dialect.name

    @contextmanager
    def holding(self, documents: Mapping[str, str], names: Mapping[str, str] | None = None) -> Iterator[Find]:
        """Instances with these inputs by their ids, which nobody else sees; says which of them a condition finds."""
        with self.engine.connect() as connection:
            rows = [
                StartRow(key, 1, (names or {}).get(key, "w"), "pending", None, 0, 0, n, None, n, None, document)
                for n, (key, document) in enumerate(documents.items())
            ]
            if rows:
                connection.execute(insert(instances), [row._asdict() for row in rows])

            def find(condition: Any) -> set[str]:
                return set(connection.execute(select(instances.c.instance_id).where(condition)).scalars())

            yield find
            connection.rollback()

    def find(self, documents: Mapping[str, str], filters: Mapping[str, Any]) -> set[str]:
        """The ids of the inputs that match."""
        with self.holding(documents) as find:
            return find(input_matches(filters, self.dialect))


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "mysql", "mariadb"])
def database(request: pytest.FixtureRequest) -> Iterator[Database]:
    """An empty database of each kind that is there."""
    match request.param:
        case "sqlite":
            engine = create_engine("sqlite://", poolclass=StaticPool)
            metadata.create_all(engine)
            yield Database(engine, deepest=1_000, reads_all_whole_numbers=True)
            engine.dispose()
        case "postgresql":
            with _on_server(server("postgresql").set(drivername="postgresql+psycopg")) as engine:
                yield Database(engine, deepest=5_000, reads_all_whole_numbers=True)
        case kind:
            with _on_server(server("mysql").set(drivername=f"{kind}+pymysql")) as engine:
                with engine.connect():  # only then the dialect knows the server
                    is_mariadb = _is_mariadb(engine)
                yield Database(engine, deepest=31 if is_mariadb else 99, reads_all_whole_numbers=is_mariadb)


@contextmanager
def _on_server(url: URL) -> Iterator[Engine]:
    """An engine for a database that vanishes afterwards."""
    administration = create_engine(url, isolation_level="AUTOCOMMIT", connect_args={"connect_timeout": 5})
    try:
        connection: Connection = administration.connect()
    except (NotImplementedError, InvalidRequestError):  # MySQL, where SQLAlchemy is told that it is MariaDB
        pytest.skip(f"the server at {url} is no MariaDB")
    name = f"filters_test_{uuid4().hex[:12]}"
    options = "TEMPLATE template0 ENCODING 'UTF8'"
    if url.get_backend_name() != "postgresql":
        collation = "utf8mb4_nopad_bin" if _is_mariadb(administration) else "utf8mb4_0900_bin"
        options = f"CHARACTER SET utf8mb4 COLLATE {collation}"
    try:
        with connection:
            connection.execute(text(f"CREATE DATABASE {name} {options}"))
            engine = create_engine(url.set(database=name))
            try:
                _create_tables(engine.url, is_mariadb=_is_mariadb(administration))
                yield engine
            finally:
                engine.dispose()
                connection.execute(text(f"DROP DATABASE {name}"))
    finally:
        administration.dispose()


def _create_tables(url: URL, *, is_mariadb: bool) -> None:
    """The options of the tables go by the name of the dialect: MariaDB must be called so for them."""
    engine = create_engine(url.set(drivername="mariadb+pymysql") if is_mariadb else url)
    metadata.create_all(engine)
    engine.dispose()


def _is_mariadb(engine: Engine) -> bool:
    return bool(getattr(engine.dialect, "is_mariadb", False))


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


def matches(document: str, filters: Mapping[str, Any]) -> bool:
    """Whether a document matches, by the rules of Python."""
    value = json.loads(document)
    return all(
        any(_same(found, wanted) for found in _values_at(value, path.split("."))) for path, wanted in filters.items()
    )


def dump(value: Any) -> str:
    """Canonical JSON, as inputs are stored."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# -- cases ------------------------------------------------------------------------------------------------------

DOCUMENTS: dict[str, str] = {
    "pending": '{"status":"pending","p":{"q":{"r":1}}}',
    "Pending": '{"status":"Pending"}',
    "pend": '{"status":"pend"}',
    "pending_space": '{"status":"pending "}',
    "empty": "{}",
    "a_list": "[1,[2,3],{\"a\":4}]",
    "a_number": "7",
    "a_text": '"text"',
    "n_1": '{"n":1}',
    "n_1.0": '{"n":1.0}',
    "n_10e-1": '{"n":10e-1}',
    "n_text_1": '{"n":"1"}',
    "n_true": '{"n":true}',
    "n_false": '{"n":false}',
    "n_null": '{"n":null}',
    "n_text_true": '{"n":"true"}',
    "n_text_null": '{"n":"null"}',
    "n_text_empty": '{"n":""}',
    "n_0": '{"n":0}',
    "n_-0": '{"n":-0}',
    "n_-0.0": '{"n":-0.0}',
    "n_list": '{"n":[1]}',
    "n_object": '{"n":{"0":1,"n":1}}',
    "n_1e5": '{"n":1e5}',
    "n_100000": '{"n":100000}',
    "n_0.1": '{"n":0.1}',
    "n_0.3": '{"n":0.30000000000000004}',
    "n_2**53": '{"n":9007199254740992}',
    "n_2**53+1": '{"n":9007199254740993}',
    "n_2.0**53": '{"n":9007199254740992.0}',
    "n_2**63-1": '{"n":9223372036854775807}',
    "n_2**63": '{"n":9223372036854775808}',
    "n_2.0**63": '{"n":9.223372036854775808e18}',
    "n_-2**63": '{"n":-9223372036854775808}',
    "n_tiny": '{"n":5e-324}',
    "items": '{"items":[{"sku":"A1"},{"sku":"B2"}]}',
    "items_keyed": '{"items":{"0":{"sku":"A1"},"00":{"sku":"C3"},"-1":{"sku":"D4"}}}',
    "twice-minus": '{"-1":{"-1":{"-1":3}}}',
    "minus": '{"-1":{"-a":1,"minus-a":2,"x\\"-a":3},"minus-1":{"-a":4},"s":"\\"-1\\":"}',
    "items_bare": '{"items":{"sku":"A1"}}',
    "top_keys": '{"0":"x","1":"y","12345678901":"z"}',
    "odd_keys": '{"a b":1,"%":2,"_":3,"$":4,"*":5,"**":6,"[0]":7,"key-1":8,"ключ":9,"😀":10," ":11,"\'":12,"last":13}',
    "spaces": '{"s":"a "}',
    "no_spaces": '{"s":"a"}',
    "accent": '{"s":"é"}',
    "accent_upper": '{"s":"É"}',
    "no_accent": '{"s":"e"}',
    "sharp_s": '{"s":"ß"}',
    "two_s": '{"s":"ss"}',
    "emoji": '{"s":"😀"}',
    "other_emoji": '{"s":"😁"}',
    "percent": '{"s":"50%"}',
    "escapes": '{"s":"\\"quoted\\" \\\\ and\\n\\u0001"}',
    "quoted": '{"s":"\\"a\\""}',
    "nul": '{"s":"x\\u0000y"}',
    "nul_alone": '{"s":"\\u0000"}',
    "nul_words": '{"s":"x\\\\u0000y"}',
    "nul_after_backslash": '{"s":"\\\\\\u0000"}',
    "nul_in_key": '{"s\\u0000":"a","s":"b"}',
    "nul_elsewhere": '{"z":["\\u0000\\u0000"],"s":"xNULy"}',
    "injection": '{"s":"\' OR 1=1 --"}',
}  # fmt: skip

CASES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set(DOCUMENTS)),
    ({"status": "pending"}, {"pending"}),
    ({"status": "Pending"}, {"Pending"}),
    ({"status": "PENDING"}, set()),
    ({"status": "pending "}, {"pending_space"}),
    ({"status": "pend"}, {"pend"}),
    ({"p.q.r": 1}, {"pending"}),
    ({"p.q.r": 1, "status": "pending"}, {"pending"}),
    ({"p.q.r": 1, "status": "pend"}, set()),
    ({"p.q": 1}, set()),
    ({"0": 1}, {"a_list"}),
    ({"1.1": 3}, {"a_list"}),
    ({"2.a": 4}, {"a_list"}),
    ({"0.0": 1}, set()),
    ({"0": 7}, set()),
    ({"0": "text"}, set()),
    ({"n": 1}, {"n_1", "n_1.0", "n_10e-1"}),
    ({"n": 1.0}, {"n_1", "n_1.0", "n_10e-1"}),
    ({"n": "1"}, {"n_text_1"}),
    ({"n": True}, {"n_true"}),
    ({"n": False}, {"n_false"}),
    ({"n": None}, {"n_null"}),
    ({"n": "true"}, {"n_text_true"}),
    ({"n": "null"}, {"n_text_null"}),
    ({"n": ""}, {"n_text_empty"}),
    ({"n": 0}, {"n_0", "n_-0", "n_-0.0"}),
    ({"n": -0.0}, {"n_0", "n_-0", "n_-0.0"}),
    ({"n.0": 1}, {"n_list", "n_object"}),
    ({"n.n": 1}, {"n_object"}),
    ({"n.m": None}, set()),
    ({"n": 100_000}, {"n_1e5", "n_100000"}),
    ({"n": 1e5}, {"n_1e5", "n_100000"}),
    ({"n": 0.1}, {"n_0.1"}),
    ({"n": 0.3}, set()),
    ({"n": 0.1 + 0.2}, {"n_0.3"}),
    ({"n": 2**53}, {"n_2**53", "n_2.0**53"}),
    ({"n": 2**53 + 1}, {"n_2**53+1"}),
    ({"n": 2.0**53}, {"n_2**53", "n_2.0**53"}),
    ({"n": 2**63 - 1}, {"n_2**63-1"}),
    ({"n": 2.0**63}, {"n_2**63", "n_2.0**63"}),
    ({"n": -(2**63)}, {"n_-2**63"}),
    ({"n": -(2.0**63)}, {"n_-2**63"}),
    ({"n": 5e-324}, {"n_tiny"}),
    ({"items.0.sku": "A1"}, {"items", "items_keyed"}),
    ({"items.1.sku": "B2"}, {"items"}),
    ({"items.00.sku": "A1"}, set()),
    ({"items.00.sku": "C3"}, {"items_keyed"}),
    ({"items.-1.sku": "B2"}, set()),
    ({"items.-1.sku": "D4"}, {"items_keyed"}),
    ({"-1.-a": 1}, {"minus"}),
    ({"-1.-1.-1": 3}, {"twice-minus"}),
    ({"-1.minus-a": 2, "minus-1.-a": 4}, {"minus"}),
    ({"-1.-a": 4}, set()),
    ({"s": '"-1":', "-1.-a": 1}, {"minus"}),
    ({"items.sku": "A1"}, {"items_bare"}),
    ({"0": "x", "1": "y"}, {"top_keys"}),
    ({"12345678901": "z"}, {"top_keys"}),
    ({"a b": 1, "%": 2, "_": 3, "$": 4, "*": 5, "**": 6}, {"odd_keys"}),
    ({"[0]": 7, "key-1": 8, "ключ": 9, "😀": 10, " ": 11, "'": 12, "last": 13}, {"odd_keys"}),
    ({"Ключ": 9}, set()),
    ({"*": 1}, set()),
    ({"**.sku": "A1"}, set()),
    ({"items.*.sku": "A1"}, set()),
    ({"items[0].sku": "A1"}, set()),
    ({"s": "a"}, {"no_spaces"}),
    ({"s": "a "}, {"spaces"}),
    ({"s": "é"}, {"accent"}),
    ({"s": "É"}, {"accent_upper"}),
    ({"s": "e"}, {"no_accent"}),
    ({"s": "e\u0301"}, set()),
    ({"s": "ss"}, {"two_s"}),
    ({"s": "😀"}, {"emoji"}),
    ({"s": "50%"}, {"percent"}),
    ({"s": "%"}, set()),
    ({"s": '"quoted" \\ and\n\x01'}, {"escapes"}),
    ({"s": '"a"'}, {"quoted"}),
    ({"s": "x\\u0000y"}, {"nul_words"}),
    ({"s": "x"}, set()),
    ({"s": ""}, set()),
    ({"s": "\\"}, set()),
    ({"s": "\\u0000"}, set()),
    ({"s": "b"}, {"nul_in_key"}),
    ({"s": "xNULy"}, {"nul_elsewhere"}),
    ({"sNUL": "a"}, set()),
    ({"s": "' OR 1=1 --"}, {"injection"}),
    ({"x' OR 1=1 --": 1}, set()),
]


def test_rules_of_matching(database: Database) -> None:
    with database.holding(DOCUMENTS) as find:
        for filters, expected in CASES:
            assert find(input_matches(filters, database.dialect)) == expected, filters


@pytest.mark.parametrize(("filters", "expected"), CASES, ids=[str(n) for n in range(len(CASES))])
def test_python_agrees_with_the_rules(filters: dict[str, Any], expected: set[str]) -> None:
    assert {key for key, document in DOCUMENTS.items() if matches(document, filters)} == expected


def test_whole_numbers_beyond_64_bits_are_compared_digit_by_digit(database: Database) -> None:
    if not database.reads_all_whole_numbers:
        pytest.skip("MySQL reads whole numbers beyond 64 bits as floats")
    numbers = [10**20, 10**20 + 1, 10**300, int(1e300), -(2**63) - 1, -(10**20), 2**64]
    documents = {str(n): dump({"n": number}) for n, number in enumerate(numbers)}
    documents["float"] = '{"n":1e20}'
    assert database.find(documents, {"n": 1e20}) == {"0", "float"}
    assert database.find(documents, {"n": 1e300}) == {"3"}
    assert database.find(documents, {"n": -(2**63)}) == set()
    assert database.find(documents, {"n": -(2.0**63)}) == set()
    assert database.find(documents, {"n": -1e20}) == {"5"}
    assert database.find(documents, {"n": 2.0**64}) == {"6"}


ODD_DOCUMENTS = {
    "nul": '{"n":"\\u0000","z":{"\\u0000":"\\u0000"}}',
    "huge": '{"n":' + "9" * 4_000 + "}",
    "huge_negative": '{"n":-' + "9" * 400 + ".5}",
    "beyond_floats": '{"n":1e400,"z":1.0e309}',
    "far_beyond_floats": '{"n":1e999999999,"z":-1E+999999999}',
    "barely_below_floats": '{"n":1.5e-400}',
    "below_floats": '{"n":1.5e-4000}',
    "many_digits": '{"n":0.' + "123456789" * 300 + "}",
    "deep": '{"n":' + "[" * 20_000 + "]" * 20_000 + "}",
    "deep_objects": '{"n":' * 20_000 + "1" + "}" * 20_000,
    "twice": '{"n":{"m":2},"n":{"m":3}}',
    "long": dump({"n": '"\\[{' * 50_000}),
    "wide": dump({"n": [{"m": [n]} for n in range(20_000)]}),
}
# None asks for the largest float: for MariaDB, numbers beyond it are that float. Python writes none of these.
ODD_FILTERS: list[dict[str, Any]] = [
    {"n": "x"}, {"n": 1}, {"n": 0.5}, {"n": 1e308}, {"n": -1e300}, {"n": True}, {"n": None},
    {"z": 1.5}, {"n.m": 7}, {"n.0": 7}, {"n.0.0.0.0.0.0": 7}, {"n.n.n": "x"}, {"n.0": "x"}, {"z.n": 5e-324},
]  # fmt: skip


def test_odd_input_of_one_instance_does_not_spoil_the_query_for_others(database: Database) -> None:
    documents = {**ODD_DOCUMENTS, "found": '{"ok":1}'}
    with database.holding(documents) as find:
        assert find(input_matches({"ok": 1}, database.dialect)) == {"found"}
        for filters in ODD_FILTERS:
            assert find(input_matches(filters, database.dialect)) == set(), filters


def test_inputs_are_read_as_deep_as_the_database_goes_however_wide_they_are(database: Database) -> None:
    def nested(levels: int) -> str:
        """So many lists in an object, beside many short ones and a text full of brackets that close nothing."""
        lists = "[" * levels + "]" * levels
        return '{"wide":[' + "[],{}," * 3_000 + '0],"text":"[[{\\"[\\\\","deep":' + lists + ',"a":1}'

    documents = {"flat": nested(1), "deep": nested(database.deepest - 1), "too_deep": nested(20_000)}
    assert database.find(documents, {"a": 1}) == {"flat", "deep"}
    assert database.find(documents, {"text": '[[{"[\\'}) == {"flat", "deep"}


@pytest.mark.parametrize("database", ["mysql", "mariadb"], indirect=True)
def test_mysql_is_spared_inputs_that_are_too_deep_for_it(database: Database) -> None:
    """There they are errors even to JSON_VALID; other servers can do what is done before it is asked."""
    beside = '"wide":[' + "[],{}," * 500 + '0],"text":"[[{\\"[\\\\","list":["]","}"],'
    documents = {
        "flat": "{}",
        "text_of_brackets": dump({"text": "[" * 10_000}),
        "99": "{" + beside + '"deep":' + "[" * 98 + "1" + "]" * 98 + "}",
        "99_objects": '{"deep":' * 99 + "1" + "}" * 99,
        "100": "{" + beside + '"deep":' + "[" * 99 + "1" + "]" * 99 + "}",
        "100_objects": '{"deep":' * 100 + "1" + "}" * 100,
        "10000": "[" * 10_000 + "]" * 10_000,
        "too_many_to_tell": dump({"items": [{}] * 20_000}),
    }
    with database.holding(documents) as find:
        assert find(_mysql_is_flat()) == {"flat", "text_of_brackets", "99", "99_objects"}


def test_values_of_enums_are_their_values(database: Database) -> None:
    class Colour(StrEnum):
        RED = "red"

    class OldColour(str, Enum):  # noqa: UP042  # it is not the same
        RED = "red"

    class Size(IntEnum):
        SMALL = 1

    documents = {"a": '{"colour":"red","size":1}', "b": '{"colour":"RED","size":2}'}
    assert database.find(documents, {"colour": Colour.RED}) == {"a"}
    assert database.find(documents, {"colour": OldColour.RED}) == {"a"}
    assert database.find(documents, {"size": Size.SMALL}) == {"a"}


def test_paths_and_values_are_bound_never_pasted_into_sql(database: Database) -> None:
    filters = {"secret.path.0": "secret value", "n": 12345, "x": 0.6789, "secret": True}
    sql = str(input_matches(filters, database.dialect).compile(dialect=database.engine.dialect))
    sql += str(contains(instances.c.instance_id, "secret", database.dialect).compile(dialect=database.engine.dialect))
    assert not [word for word in ("secret", "12345", "6789") if word in sql]


# -- random documents -------------------------------------------------------------------------------------------

names = st.sampled_from(
    [
        "a",
        "A",
        "b",
        "0",
        "1",
        "01",
        "-1",
        "-a",
        "minus-1",
        "Ä",
        "a b",
        "%",
        "_",
        "$",
        "[0]",
        "*",
        "key-1",
        "'",
        "--",
        ";",
        "NUL",
        "😀",
    ]
)
stored_names = names | st.sampled_from(["\0", "a\0", 'a"', "a\\", "a\n", "", "a."])
words = st.sampled_from(
    ["", "x", "X", "x ", "1", "1.0", "true", "null", "ä", "Ä", "%", "_", "a'b", "☃", "😀", "\\u0000", '"', "\n", "xNUL"]
) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=5)
stored_words = words | st.sampled_from(["\0", "x\0", "\\\0", "\0\0", "\\\\\0"])
numbers = (
    st.sampled_from([0, 1, -1, 2**53, 2**53 + 1, 2**63 - 1, -(2**63), 0.1, 1.0, -0.0, 1e300, 5e-324, 0.1 + 0.2, 1e16])
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
)
# Whole numbers beyond 64 bits are only here: MySQL compares them as floats, for which there is a test of its own.
huge_numbers = st.sampled_from([2**63, 2**64, -(2**63) - 1, 10**20, 10**20 + 1, int(1e300), 10**300, 10**1_000])


def documents_with(scalars: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """JSON values of some depth, mostly objects at the top, and seldom empty: what is not there is found by nobody."""
    some = st.lists(scalars, min_size=1, max_size=3) | st.dictionaries(stored_names, scalars, min_size=1, max_size=3)
    nested = st.lists(scalars | some, max_size=3) | st.dictionaries(stored_names, scalars | some, max_size=3)
    objects = st.dictionaries(stored_names, scalars | some | nested, min_size=2, max_size=4)
    return objects | objects | objects | some | scalars


ordinary_documents = documents_with(st.none() | st.booleans() | numbers | stored_words)
all_documents = documents_with(st.none() | st.booleans() | numbers | huge_numbers | stored_words)
paths = st.lists(names, min_size=1, max_size=3).map(".".join)
wanted = st.none() | st.booleans() | numbers | words
random_filters = st.dictionaries(paths, wanted, max_size=2)


def _can_be_asked_for(part: str) -> bool:
    return bool(part) and not set(part) & set('"\\\0\n.')


@st.composite
def filters_for(draw: st.DrawFn, document: Any) -> dict[str, Any]:
    """A path that exists in the document, and the value there or one that is close to it."""
    parts, value = [], document
    while isinstance(value, dict | list):
        steps = range(len(value)) if isinstance(value, list) else [key for key in value if _can_be_asked_for(key)]
        if not steps:
            break
        step = draw(st.sampled_from(steps))
        parts.append(str(step))
        value = value[step]
    if not parts or isinstance(value, dict | list):
        return draw(random_filters)
    close: list[Any] = [value, value, None]
    if isinstance(value, str):
        close += [value + " ", value.swapcase(), value[:-1]]
    elif isinstance(value, int | float):
        close += [str(value), bool(value), int(value), value + 1]
        close += [float(value)] if abs(value) < 1e300 else []
    value = draw(st.sampled_from(close))
    if isinstance(value, str):
        value = value.replace("\0", "")
    elif isinstance(value, int) and not -(2**63) <= value < 2**63:
        value = float(value) if abs(value) < 1e300 else 1e300
    path = ".".join(parts) + draw(st.sampled_from(["", "", "", ".0"]))
    return {path: value, **draw(st.just({}) | st.just({}) | random_filters)}


@st.composite
def questions(draw: st.DrawFn, kind: st.SearchStrategy[Any]) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Some documents, and some filters to ask for."""
    documents = draw(st.lists(kind, min_size=4, max_size=8))
    filters = [draw(filters_for(document)) for document in documents for _ in range(2)]
    filters.append(draw(random_filters))
    return {str(n): dump(document) for n, document in enumerate(documents)}, filters


@examples
@given(st.data())
def test_filters_find_what_plain_python_finds(database: Database, data: st.DataObject) -> None:
    kind = all_documents if database.reads_all_whole_numbers else ordinary_documents
    documents, questioned = data.draw(questions(kind))
    with database.holding(documents) as find:
        for filters in questioned:
            expected = {key for key, document in documents.items() if matches(document, filters)}
            assert find(input_matches(filters, database.dialect)) == expected, (documents, filters)


# -- parts of names ---------------------------------------------------------------------------------------------

NAMES = [
    "order_1",
    "orderX2",
    "ORDER",
    "100%",
    "ÄB",
    "äb",
    "İstanbul",
    "\u0131s\u0131",
    "Kelvin",
    "straße",
    "a\\b",
    "a'b",
    "é",
    "É",
]


@pytest.mark.parametrize("part", ["order_", "ORDER", "%", "_", "äb", "Äb", "ÄB", "i", "I", "İ", "\u0131", "k", "ss",
                                  "ß", "\\", "'", "é", "É", "", "rX", "e\u0301", " "])  # fmt: skip
def test_parts_of_names_ignore_ascii_case_only_and_know_no_wildcards(database: Database, part: str) -> None:
    documents = dict.fromkeys(NAMES, "{}")
    expected = {name for name in NAMES if ascii_lower(part) in ascii_lower(name)}
    with database.holding(documents, {name: name for name in NAMES}) as find:
        assert find(contains(instances.c.instance_id, part, database.dialect)) == expected
        assert find(contains(instances.c.workflow_name, part, database.dialect)) == expected


def test_part_with_a_nul_is_in_no_name(database: Database) -> None:
    with database.holding({"ab": "{}"}) as find:
        assert find(contains(instances.c.instance_id, "a\0", database.dialect)) == set()


letters = st.text(st.sampled_from("aAbBkKsSzZ%_äÄİ\u0131ßé\u212a.-0'\\ "), max_size=6)


@examples
@given(st.sets(letters, max_size=8), st.lists(letters, min_size=1, max_size=4))
def test_random_parts_of_names(database: Database, stored: set[str], parts: list[str]) -> None:
    with database.holding(dict.fromkeys(stored, "{}")) as find:
        for part in parts:
            expected = {name for name in stored if ascii_lower(part) in ascii_lower(name)}
            assert find(contains(instances.c.instance_id, part, database.dialect)) == expected
