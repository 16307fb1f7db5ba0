"""Conditions over instances: parts of names, and values inside the stored input.

Paths and values are always bound, never pasted into SQL. The answers are those of plain Python (``==`` between the
wanted value and what ``json.loads`` gives, with texts, numbers and booleans kept apart) on every database, but for
what a database can't read:

* An input that nests deeper than the database's JSON functions go is found by no filter: 31 levels on MariaDB, 99 on
  MySQL, 5,000 on PostgreSQL, 1,000 or 2,000 on SQLite, by its version.
* MySQL reads whole numbers beyond 64 bits as floats, so that a float filter finds all that round to it. By no filter
  it finds an input with a number beyond the largest float, and one with more than 40,000 quotes and brackets, if more
  than 99 of these open something: whether it nests too deep can't be told then.
* For MariaDB, a number with a point or an exponent that is beyond the largest float is that float. Python writes none.
* Where an object holds a key twice, SQLite and MariaDB look at the first one, PostgreSQL and MySQL at the last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import accumulate, product
from typing import Any

from sqlalchemy import (
    JSON,
    ColumnElement,
    Double,
    Float,
    LargeBinary,
    Numeric,
    String,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    literal,
    literal_column,
    or_,
    select,
    true,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction

from romancy.errors import InvalidFilterError
from romancy.storage.schema import instances

JsonScalar = str | int | float | bool | None

MAX_PATH_PARTS = 16
MAX_INDEX_PARTS = 6

POSTGRESQL_MAX_DEPTH = 5_000  # its parser gives up beyond 13,000 levels, with the stack it has by default
MYSQL_MAX_DEPTH = 99  # it allows 100, and some versions count what stands in the innermost list
MYSQL_MAX_TOKENS = 40_000


def contains(column: ColumnElement[str], part: str, dialect: str) -> ColumnElement[bool]:
    """Whether the column holds this text, ASCII case ignored; ``%`` and ``_`` are just characters.

    Args:
        column: a name or an id.
        part: the text to look for; an empty one is in every text.
        dialect: the name of SQLAlchemy's dialect.

    Raises:
        InvalidFilterError: the part is no text.
    """
    if not isinstance(part, str):
        raise InvalidFilterError(f"{part!r} is no text to look for: give a string")
    try:
        part.encode()
    except UnicodeEncodeError as error:
        raise InvalidFilterError(f"{part!r} is no valid text to look for: {error}") from None
    lowered = ascii_lower(part)
    if dialect == "postgresql":
        # No text holds a NUL there, and the driver refuses to send one. By collation C, lower() knows ASCII only.
        return false() if "\0" in part else func.strpos(func.lower(column.collate("C")), lowered) > 0
    if dialect in {"mysql", "mariadb"}:
        # Its lower() changes letters of all alphabets, so that those of the part are replaced one by one. On bytes
        # no collation takes part; where the bytes of a text in UTF-8 are found, the text is.
        text: ColumnElement[Any] = _bytes(column)
        for letter in sorted({char for char in lowered if "a" <= char <= "z"}):
            text = func.replace(text, literal(letter.upper(), String), literal(letter, String))
        return func.instr(_bytes(text), _bytes(literal(lowered, String))) > 0
    return func.instr(func.lower(column), lowered) > 0


def ascii_lower(text: str) -> str:
    """Lower case for A to Z only, as SQLite's ``lower`` does it."""
    return "".join(chr(ord(char) + 32) if "A" <= char <= "Z" else char for char in text)


def input_matches(filters: Mapping[str, JsonScalar], dialect: str) -> ColumnElement[bool]:
    """Whether the stored input holds all these values at these dotted paths.

    Args:
        filters: the wanted values by their paths.
        dialect: the name of SQLAlchemy's dialect.

    Raises:
        InvalidFilterError: a path or a value can't be used; the message names it.
    """
    if not isinstance(filters, Mapping):
        raise InvalidFilterError(f"{filters!r} is no mapping of paths to values, such as {{'order.status': 'pending'}}")
    matches, can_be_read = _DIALECTS[dialect]
    conditions = [matches(path, path_parts(path), _checked(path, value)) for path, value in filters.items()]
    if not conditions:
        return true()
    # One input that the database can't read must not fail the query for all others.
    return case((can_be_read(), and_(true(), *conditions)), else_=false())


def _checked(path: str, value: JsonScalar) -> JsonScalar:
    """The value as one of the built-in types: drivers know nothing of their subclasses, such as enums."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidFilterError(f"the value {value!r} of path {path!r} is no valid text: {error}") from None
        if "\0" in value:
            raise InvalidFilterError(f"the value {value!r} of path {path!r} holds a NUL character: leave it out")
        return "".join(value)
    if isinstance(value, int | float):
        if not math.isfinite(value) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            raise InvalidFilterError(
                f"the value {value!r} of path {path!r} is out of range: give a finite 64-bit number"
            )
        return int(value) if isinstance(value, int) else float(value)
    raise InvalidFilterError(
        f"the value {value!r} of path {path!r} is of type {type(value).__name__}: "
        f"give a string, a number, a boolean or None"
    )


def path_parts(path: str) -> list[str]:
    """The parts of a dotted path.

    Raises:
        InvalidFilterError: it is empty, has an empty part, or characters that no path can hold.
    """
    if not isinstance(path, str):
        raise InvalidFilterError(f"the path {path!r} is of type {type(path).__name__}: give keys joined by dots")
    if not path:
        raise InvalidFilterError(f"the path {path!r} is empty: give keys joined by dots, such as 'order.id'")
    parts = path.split(".")
    if any(not part for part in parts):
        raise InvalidFilterError(f"the path {path!r} has an empty part: give keys joined by single dots")
    if any(char in '"\\' or ord(char) < 32 or 0xD800 <= ord(char) <= 0xDFFF for char in path):
        raise InvalidFilterError(f"the path {path!r} holds a quote, a backslash or a control character")
    if len(parts) > MAX_PATH_PARTS:
        raise InvalidFilterError(f"the path {path!r} has {len(parts)} parts: the limit is {MAX_PATH_PARTS}")
    if sum(_may_be_index(part) for part in parts) > MAX_INDEX_PARTS:
        raise InvalidFilterError(f"the path {path!r} has more than {MAX_INDEX_PARTS} list indexes")
    return parts


def _may_be_index(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) <= 9 and (part == "0" or part[0] != "0")


def _json_paths(parts: list[str]) -> list[list[str]]:
    """The JSON paths that a dotted path may mean, in pieces: a part of digits is a list index, or a key."""
    choices = [[f'."{part}"', f"[{part}]"] if _may_be_index(part) else [f'."{part}"'] for part in parts]
    return [list(chosen) for chosen in product(*choices)]


def _whole_number_texts(value: float) -> list[str]:
    """How JSON may write this number without a point or an exponent."""
    if value != int(value):
        return []
    return ["0", "-0"] if value == 0 else [str(int(value))]


def _as_float(value: float) -> float | None:
    """The float of this value; ``None`` for a whole number that lies between two floats."""
    return float(value) if float(value) == value else None


def _marker(path: str, value: JsonScalar) -> str:
    """What can stand for a NUL: it is neither in the path nor in the value, so that no key and no text becomes one
    that is looked for."""
    marker = "NUL"
    while marker in path or (isinstance(value, str) and marker in value):
        marker += "L"
    return marker


# -- SQLite -----------------------------------------------------------------------------------------------------


def _sqlite_matches(path: str, parts: list[str], value: JsonScalar) -> ColumnElement[bool]:
    text = _sqlite_text_without_nul(path, value)
    return or_(false(), *[_sqlite_at(text, "$" + "".join(pieces), value) for pieces in _json_paths(parts)])


def _sqlite_text_without_nul(path: str, value: JsonScalar) -> ColumnElement[str]:
    """The input with other text for NUL characters, at which older versions cut texts off, and newer ones keys."""
    # Without pairs of backslashes, each one that is left begins an escape.
    without_pairs = func.replace(instances.c.input, "\\\\", "\\u005c")
    without = func.replace(without_pairs, "\\u0000", _marker(path, value))
    return case((func.instr(instances.c.input, "\\u0000") > 0, without), else_=instances.c.input)


def _sqlite_at(text: ColumnElement[str], json_path: str, value: JsonScalar) -> ColumnElement[bool]:
    kind = func.json_type(text, json_path)
    found = func.json_extract(text, json_path)
    if value is None:
        return kind == "null"
    if isinstance(value, bool):
        return kind == ("true" if value else "false")
    if isinstance(value, str):
        return and_(kind == "text", found == literal(value))
    if abs(value) < 2**63:
        return and_(or_(kind == "integer", kind == "real"), found == literal(value))
    # SQLite makes floats of whole numbers beyond 64 bits.
    whole = int(value)
    # With two paths it gives a list, as JSON text that stands as it is stored.
    twice_as_text = func.json_extract(text, json_path, json_path)
    return or_(
        and_(kind == "integer", twice_as_text == f"[{whole},{whole}]"),
        and_(kind == "real", found == literal(value)),
    )


def _sqlite_can_read() -> ColumnElement[bool]:
    return func.json_valid(instances.c.input) == 1


# -- PostgreSQL -------------------------------------------------------------------------------------------------

# An odd number of backslashes, the last of which begins an escaped NUL.
POSTGRESQL_ESCAPED_NUL = r"(?<!\\)((?:\\\\)*)\\u0000"
# What a numeric takes in any case; as a float, numbers with longer exponents would be none or beyond the largest.
POSTGRESQL_FLOAT = r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]{1,3})?$"
POSTGRESQL_MAX_DIGITS = 10_000


def _postgresql_matches(path: str, parts: list[str], value: JsonScalar) -> ColumnElement[bool]:
    node: ColumnElement[Any] = cast(_postgresql_text_without_nul(path, value), JSON)
    for part in parts:
        # The function takes "0" as a key or as an index, by what it finds, but also "-1" and "01" as indexes.
        # The operator takes a text as a key only.
        node = (
            func.json_extract_path(node, literal(part, Text))
            if _may_be_index(part)
            else node.op("->", return_type=JSON())(literal(part, Text))
        )
    kind = func.json_typeof(node)
    if value is None:
        return kind == "null"
    as_written = cast(node, Text)
    if isinstance(value, bool):
        return and_(kind == "boolean", as_written == ("true" if value else "false"))
    if isinstance(value, str):
        unescaped = node.op("#>>", return_type=Text())(literal_column("'{}'"))
        return and_(kind == "string", unescaped.collate("C") == literal(value, Text))
    # Conditions are evaluated in any order, but those of a CASE one after the other.
    return case(
        (func.coalesce(kind, "") != "number", false()),
        (as_written.regexp_match("[.eE]"), _postgresql_float_is(as_written, _as_float(value))),
        else_=as_written.in_(_whole_number_texts(value)),
    )


def _postgresql_text_without_nul(path: str, value: JsonScalar) -> ColumnElement[str]:
    """The input with other text for NUL characters, which no function of PostgreSQL takes."""
    without = func.regexp_replace(instances.c.input, POSTGRESQL_ESCAPED_NUL, "\\1" + _marker(path, value), "g")
    return case((func.strpos(instances.c.input, "\\u0000") > 0, without), else_=instances.c.input)


def _postgresql_float_is(text: ColumnElement[str], value: float | None) -> ColumnElement[bool]:
    """Whether a number with a point or an exponent has this value; the cast fails out of the range of floats."""
    if value is None:
        return false()
    size = func.abs(cast(text, Numeric))
    return case(
        (or_(func.length(text) > POSTGRESQL_MAX_DIGITS, ~text.regexp_match(POSTGRESQL_FLOAT)), false()),
        (size > literal_column("1.7976931348623158e308"), false()),
        (size < literal_column("2.4703282292062328e-324"), true() if value == 0 else false()),
        else_=cast(text, Double) == literal(value, Double),
    )


def _postgresql_can_read() -> ColumnElement[bool]:
    """Whether its parser, which calls itself for each level, gets through the input."""
    text = instances.c.input
    brackets = func.regexp_replace(text, r'"(?:[^"\\]|\\.)*"|[^][{}"]+', "", "g")
    each = (
        func.unnest(func.string_to_array(brackets, None))
        .table_valued("bracket", with_ordinality="place")
        .render_derived()
    )
    step = case((each.c.bracket.in_(["[", "{"]), 1), else_=-1)
    levels = select(func.sum(step).over(order_by=each.c.place).label("level")).correlate(instances).subquery()
    depth = select(func.max(levels.c.level)).correlate(instances).scalar_subquery()
    opening = func.length(text) - func.length(func.translate(text, "[{", ""))
    return case((opening <= POSTGRESQL_MAX_DEPTH, true()), else_=depth <= POSTGRESQL_MAX_DEPTH)


# -- MySQL and MariaDB ------------------------------------------------------------------------------------------


def _mysql_matches(_path: str, parts: list[str], value: JsonScalar) -> ColumnElement[bool]:
    text, parts = _mysql_without_leading_minus(parts)
    return or_(false(), *[_mysql_at(text, pieces, value) for pieces in _json_paths(parts)])


def _mysql_without_leading_minus(parts: list[str]) -> tuple[ColumnElement[str], list[str]]:
    """The input and the path with other names for keys that begin with a minus: MariaDB finds none of these.

    In JSON, ``"-1":`` is always a key, or the end of one with an escaped quote in it, for which no path can ask. A key
    that has the other name already makes room for it.
    """
    text: ColumnElement[str] = instances.c.input
    renamed = {part: f"minus{part}" for part in parts if part.startswith("-")}
    for part, other in renamed.items():
        text = func.replace(text, f'"{other}":', f'"other {other}":')
        text = func.replace(text, f'"{part}":', f'"{other}":')
    return text, [renamed.get(part, part) for part in parts]


def _mysql_at(text: ColumnElement[str], pieces: list[str], value: JsonScalar) -> ColumnElement[bool]:
    """What works on both servers, though MySQL reads JSON into values and MariaDB cuts pieces from its text."""
    path, *longer = accumulate(pieces, initial="$")
    lists: list[ColumnElement[bool]] = []
    for piece, whole_path in zip(pieces, longer, strict=True):
        if piece.startswith("["):
            # For both servers, index 0 of what is no list is that itself.
            lists.append(func.json_type(func.json_extract(text, path)) == "ARRAY")
        path = whole_path
    found = func.json_extract(text, path)
    kind = func.json_type(found)
    return and_(*lists, _mysql_is(found, kind, value))


def _mysql_is(found: ColumnElement[Any], kind: ColumnElement[str], value: JsonScalar) -> ColumnElement[bool]:
    if value is None:
        return kind == "NULL"
    text: ColumnElement[str] = func.json_unquote(found, type_=String())
    if isinstance(value, bool):
        return and_(kind == "BOOLEAN", text == ("true" if value else "false"))
    if isinstance(value, str):
        # No collation that both servers have leaves spaces at the end alone; bytes have none.
        return and_(kind == "STRING", _bytes(text) == _bytes(literal(value, String)))
    # What kind of number it is says the text: for MariaDB, 1e5 is an integer.
    return case(
        (func.coalesce(kind, "").not_in(["INTEGER", "UNSIGNED INTEGER", "DOUBLE", "DECIMAL"]), false()),
        (text.regexp_match("[.eE]"), _mysql_float_is(found, _as_float(value))),
        else_=text.in_(_whole_number_texts(value)),
    )


def _mysql_float_is(found: ColumnElement[Any], value: float | None) -> ColumnElement[bool]:
    """Whether a number with a point or an exponent has this value.

    MySQL's JSON parser may be off by the last bit, so that the value is read by it too, where it can be.
    """
    if value is None:
        return false()
    text = literal(repr(value), String)
    wanted = case((func.json_valid(text) == 1, _mysql_float(func.json_extract(text, "$"))), else_=_mysql_float(text))
    return _mysql_float(found) == wanted


def _mysql_float(value: ColumnElement[Any]) -> ColumnElement[Any]:
    """As a double: a cast to it would ask SQLAlchemy for the server's version, which a statement may not know."""
    return value.op("+", return_type=Float())(literal_column("0e0"))


def _mysql_can_read() -> ColumnElement[bool]:
    """Whether the input is valid for the server, which MariaDB says of none that is too deep for it.

    To MySQL, such an input is an error, even in JSON_VALID.
    """
    return case(
        (func.version().contains("MariaDB"), func.json_valid(instances.c.input) == 1),
        (_mysql_is_flat(), func.json_valid(instances.c.input) == 1),
        else_=false(),
    )


def _mysql_is_flat() -> ColumnElement[bool]:
    """Whether the input surely is no deeper than MySQL reads.

    Without texts and all else, its brackets are left; each step takes the innermost ones away. MySQL bounds the steps
    of a regular expression to 320,000 for one input: up to six for each quote and bracket.
    """
    text = instances.c.input
    opening = _mysql_count(text, "[") + _mysql_count(text, "{")
    without_escapes = func.replace(func.replace(text, "\\\\", ""), '\\"', "")
    brackets = func.regexp_replace(without_escapes, r'"[^"]*"|[^\[\]\{\}"]+', "")
    of_one_kind = func.replace(func.replace(brackets, "{", "["), "}", "]")
    return case(
        (opening <= MYSQL_MAX_DEPTH, true()),
        (opening * 2 + _mysql_count(text, '"') > MYSQL_MAX_TOKENS, false()),
        else_=func.char_length(without_levels(of_one_kind)) == 0,
    )


def _mysql_count(text: ColumnElement[str], char: str) -> ColumnElement[int]:
    count: ColumnElement[int] = func.char_length(text) - func.char_length(func.replace(text, char, ""))
    return count


class without_levels(GenericFunction[str]):  # noqa: N801  # named as SQL functions are
    """A text of square brackets without the innermost 99 levels of them."""

    type = String()
    inherit_cache = True


@compiles(without_levels)
def _write_without_levels(element: without_levels, compiler: SQLCompiler, **options: Any) -> str:
    # So many nested calls, made of SQLAlchemy's objects, would come near Python's limit of recursion.
    inner = compiler.process(element.clauses, **options)
    return "REPLACE(" * MYSQL_MAX_DEPTH + inner + ", '[]', '')" * MYSQL_MAX_DEPTH


def _bytes(text: ColumnElement[Any]) -> ColumnElement[bytes]:
    return cast(text, LargeBinary)


# -- by dialect -------------------------------------------------------------------------------------------------

_Matches = Callable[[str, list[str], JsonScalar], ColumnElement[bool]]

_DIALECTS: dict[str, tuple[_Matches, Callable[[], ColumnElement[bool]]]] = {
    "sqlite": (_sqlite_matches, _sqlite_can_read),
    "postgresql": (_postgresql_matches, _postgresql_can_read),
    "mysql": (_mysql_matches, _mysql_can_read),
    "mariadb": (_mysql_matches, _mysql_can_read),
}
