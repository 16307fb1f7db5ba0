"""Conditions over instances: parts of names, and values inside the stored input.

Paths and values are always bound, never pasted into SQL.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product

from sqlalchemy import ColumnElement, and_, false, func, literal, or_, true

from romancy.errors import InvalidFilterError
from romancy.storage.schema import instances

JsonScalar = str | int | float | bool | None

MAX_PATH_PARTS = 16
MAX_INDEX_PARTS = 6


def contains(column: ColumnElement[str], part: str) -> ColumnElement[bool]:
    """Whether the column holds this text, ASCII case ignored; ``%`` and ``_`` are just characters."""
    if not isinstance(part, str):
        raise InvalidFilterError(f"{part!r} is no text to look for: give a string")
    try:
        part.encode()
    except UnicodeEncodeError as error:
        raise InvalidFilterError(f"{part!r} is no valid text to look for: {error}") from None
    return func.instr(func.lower(column), ascii_lower(part)) > 0


def ascii_lower(text: str) -> str:
    """Lower case for A to Z only, as SQLite's ``lower`` does it."""
    return "".join(chr(ord(char) + 32) if "A" <= char <= "Z" else char for char in text)


def input_matches(filters: Mapping[str, JsonScalar]) -> ColumnElement[bool]:
    """Whether the stored input holds all these values at these dotted paths.

    Raises:
        InvalidFilterError: a path or a value can't be used; the message names it.
    """
    if not isinstance(filters, Mapping):
        raise InvalidFilterError(f"{filters!r} is no mapping of paths to values, such as {{'order.status': 'pending'}}")
    return and_(true(), *[_value_matches(path, value) for path, value in filters.items()])


def _value_matches(path: str, value: JsonScalar) -> ColumnElement[bool]:
    return or_(false(), *[_at(json_path, path, value) for json_path in json_paths(path)])


def _at(json_path: str, path: str, value: JsonScalar) -> ColumnElement[bool]:
    kind = func.json_type(instances.c.input, json_path)
    found = func.json_extract(instances.c.input, json_path)
    if value is None:
        return kind == "null"
    if isinstance(value, bool):
        return kind == ("true" if value else "false")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidFilterError(f"the value {value!r} of path {path!r} is no valid text: {error}") from None
        if "\0" in value:
            raise InvalidFilterError(f"the value {value!r} of path {path!r} holds a NUL character: leave it out")
        return and_(kind == "text", found == literal(value), *_is_whole(json_path, value))
    if isinstance(value, int | float):
        if not math.isfinite(value) or (isinstance(value, int) and not -(2**63) <= value < 2**63):
            raise InvalidFilterError(
                f"the value {value!r} of path {path!r} is out of range: give a finite 64-bit number"
            )
        return and_(or_(kind == "integer", kind == "real"), found == literal(value))
    raise InvalidFilterError(
        f"the value {value!r} of path {path!r} is of type {type(value).__name__}: "
        f"give a string, a number, a boolean or None"
    )


def _is_whole(json_path: str, value: str) -> list[ColumnElement[bool]]:
    """Older SQLite cuts an extracted text off at an escaped NUL: then the JSON text shows that there is more."""
    escaped = "\\u0000"
    if escaped in value:
        return []
    as_json = func.json_extract(instances.c.input, json_path, json_path)
    return [func.instr(as_json, escaped) == 0]


def json_paths(path: str) -> list[str]:
    """The JSON paths that a dotted path may mean: a part of digits is a list index, or a key.

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
    choices = [_part_choices(part) for part in parts]
    if sum(len(choice) > 1 for choice in choices) > MAX_INDEX_PARTS:
        raise InvalidFilterError(f"the path {path!r} has more than {MAX_INDEX_PARTS} list indexes")
    return ["$" + "".join(chosen) for chosen in product(*choices)]


def _part_choices(part: str) -> list[str]:
    key = f'."{part}"'
    is_index = part.isascii() and part.isdecimal() and len(part) <= 9 and (part == "0" or part[0] != "0")
    return [key, f"[{part}]"] if is_index else [key]
