"""The one statement of a group commit on PostgreSQL, its fence included: one round trip.

It has a part for each kind of row that the batch brings, and no other, for each costs time even if it finds nothing to
do. A few rows are given as values, to a statement for just so many. More are given as one text for each kind: no other
way is as cheap for both the driver and the server.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from romancy.errors import PacketTooLargeError
from romancy.storage.mail import Closing, Operation, Receipt
from romancy.storage.rows import HistoryRow, StartRow, StateRow
from romancy.storage.schema import deliveries, history, instances, mail, subscriptions

FEW = 3
"""So many rows, of all kinds, go as values. The driver takes much longer for more than 50 parameters."""

MANY, MANY_WITH_A_NONE = -1, -2
"""In a shape: as one text; the second where one of the rows holds what stands for a missing value in the first."""

BETWEEN_VALUES, BETWEEN_ROWS = "\x1f", "\x1e"
"""No name and no JSON text holds a control character."""

NULL = {MANY: str(None), MANY_WITH_A_NONE: "\x1d"}
"""What stands for a missing value: what Python writes by itself, in no time, save where that could be misread."""

MOST_TOGETHER = 64 * 1024 * 1024
"""Characters of a group commit in one statement; more are written in several."""

MOST_ALONE = 200 * 1024 * 1024
"""Characters of one instance's rows; they may take four bytes each, and the server has no values of more than 1 GB."""

NOT_TEXT = {"run": "int", "claims": "int", "seq": "int", "position": "int", "attempt": "int"} | dict.fromkeys(
    ("ready_at", "created_at", "started_at", "updated_at", "completed_at", "at", "due_at"), "bigint"
)
"""The types of columns that hold numbers."""


class Rows(NamedTuple):
    """What a group commit writes, by kind."""

    starts: Sequence[StartRow]
    keyed_starts: Sequence[StartRow]
    events: Sequence[HistoryRow]
    states: Sequence[StateRow]
    receipts: Sequence[Receipt]
    closed: Sequence[str]

    @property
    def new(self) -> int:
        """How many rows are added."""
        return len(self.starts) + len(self.keyed_starts) + len(self.events)


class Shape(NamedTuple):
    """For how many rows a statement is: none, so many values, or :data:`MANY`; see :class:`Rows`."""

    starts: int
    keyed_starts: int
    events: int
    states: int
    receipts: int
    closed: int


class Fence(NamedTuple):
    """What must find a row for anything to be written; ``sql`` takes the worker's id where there is a worker."""

    sql: str
    worker_id: str | None = None


def rows_of(operations: Sequence[Operation]) -> tuple[list[Receipt], list[str]]:
    """The ends of deliveries and of mailboxes among these."""
    receipts = [operation for operation in operations if isinstance(operation, Receipt)]
    return receipts, [operation.instance_id for operation in operations if isinstance(operation, Closing)]


def flush_statement(fence: Fence, rows: Rows, parties: int) -> tuple[str, list[str | None]]:
    """The statement that writes these rows, of so many parties.

    Its only row says whether the fence found one, which keyed starts are new (see :func:`new_starts`), and nothing
    further: an instance that is not this worker's makes a division by zero, and with it the whole statement fails.
    All values are given as texts, so that missing ones don't make it another statement to prepare.

    Raises:
        PacketTooLargeError: the server can't take it in one piece.
        UnicodeError: a text holds what stands between values.
    """
    tables = rows[:-1]
    given: list[list[str | None]]
    if sum(map(len, tables)) <= FEW:
        given = [
            [value if value is None or isinstance(value, str) else str(value) for row in table for value in row]
            for table in tables
        ]
        shape = Shape._make([*map(len, tables), len(rows.closed) and MANY])
    else:
        texts = [_in_one(table) if table else None for table in tables]
        given = [[] if text is None else [text[1]] for text in texts]
        shape = Shape._make([*(0 if text is None else text[0] for text in texts), len(rows.closed) and MANY])
    starts, keyed_starts, events, states, receipts = given
    parameters: list[str | None] = [] if fence.worker_id is None else [fence.worker_id]
    parameters += [*starts, *keyed_starts, *events, *states]
    if states:
        parameters.append(fence.worker_id)
    parameters += receipts
    if rows.closed:
        parameters += [_as_array(rows.closed)] * 3
    if states:
        parameters.append(str(len(rows.states)))
    _check_size(sum(map(len, filter(None, parameters))), parties)
    return _statement(fence.sql, shape), parameters


def new_starts(found: str | None) -> set[str]:
    """The ids of the new keyed starts, from what the statement says of them."""
    return set(json.loads(found)) if found is not None else set()


def _as_array(texts: Sequence[str]) -> str:
    quoted = [text.replace("\\", "\\\\").replace('"', '\\"') for text in texts]
    return '{"' + '","'.join(quoted) + '"}'


def _in_one(table: Sequence[tuple[object, ...]]) -> tuple[int, str]:
    """Rows as one text, and how many that is in a shape."""
    width, none = len(table[0]), NULL[MANY]
    if [row for row in table if none in row]:
        shape, null = MANY_WITH_A_NONE, NULL[MANY_WITH_A_NONE]
        lines = [BETWEEN_VALUES.join([null if value is None else str(value) for value in row]) for row in table]
    else:
        shape, null = MANY, None
        lines = [*map(_line_of(width), table)]
    text = BETWEEN_ROWS.join(lines)
    if (
        text.count(BETWEEN_VALUES) != len(table) * (width - 1)
        or text.count(BETWEEN_ROWS) != len(table) - 1
        or (null is not None and text.count(null) != sum(row.count(None) for row in table))
    ):
        raise UnicodeError("a text holds one of the control characters U+001D, U+001E and U+001F: leave it out")
    return shape, text


@cache
def _line_of(width: int) -> Callable[[tuple[object, ...]], str]:
    """Makes one text of so many values."""
    return BETWEEN_VALUES.join(["%s"] * width).__mod__


def _check_size(size: int, parties: int) -> None:
    """Refuse what the server can't take in one piece; some parties that are too much together are tried in halves."""
    if size > MOST_TOGETHER and (parties > 1 or size > MOST_ALONE):
        raise PacketTooLargeError(
            f"rows take {size:,} characters, more than the {MOST_ALONE:,} that PostgreSQL is given in one piece (it "
            f"has no values of more than 1 GB): store large data elsewhere and pass a reference"
        )


# -- the statement's text ----------------------------------------------------------------------------

_ALIVE = "EXISTS (SELECT FROM fence)"
_OF_THESE = f"= ANY (CAST(%s AS text[])) AND {_ALIVE}"

_FEW_FOR_THE_PLANNER = "v.instance_id = v.instance_id || ''"
"""Always so. But the planner, which can't know how many rows a text brings, takes those that fulfil this for one, and
looks them up in the index; for more it would rather walk through a table of some thousand instances, at each flush."""

_OWNER = "COALESCE(i.owner, '')"
"""Looked at, but not looked for: an index of owners leads through all that a worker has."""


@cache
def _statement(fence: str, shape: Shape) -> str:
    start, event = ", ".join(StartRow._fields), ", ".join(HistoryRow._fields)
    sets = ", ".join(f"{field} = v.{field}" for field in StateRow._fields if field != "instance_id")
    parts = [f"fence AS MATERIALIZED ({fence})"]
    inserted = is_ours = "NULL"
    if shape.starts:
        source = _source(StartRow._fields, shape.starts)
        parts.append(f"starts AS (INSERT INTO {instances.name} ({start}) SELECT {start} FROM {source} WHERE {_ALIVE})")
    if shape.keyed_starts:
        source = _source(StartRow._fields, shape.keyed_starts)
        parts.append(
            f"keyed AS (INSERT INTO {instances.name} ({start}) SELECT {start} FROM {source} WHERE {_ALIVE} "
            f"ON CONFLICT (instance_id) DO NOTHING RETURNING instance_id)"
        )
        inserted = "(SELECT CAST(json_agg(instance_id) AS text) FROM keyed)"
    if shape.events:
        source = _source(HistoryRow._fields, shape.events)
        parts.append(f"events AS (INSERT INTO {history.name} ({event}) SELECT {event} FROM {source} WHERE {_ALIVE})")
    if shape.states:
        source = _source(StateRow._fields, shape.states)
        parts.append(
            f"states AS (UPDATE {instances.name} AS i SET {sets}, claims = 0 FROM {source} "
            f"WHERE {_ALIVE} AND i.instance_id = v.instance_id AND {_FEW_FOR_THE_PLANNER} AND {_OWNER} = %s "
            f"RETURNING 1)"
        )
        is_ours = f"1 / (CASE WHEN NOT {_ALIVE} OR (SELECT count(*) FROM states) = %s THEN 1 ELSE 0 END)"
    if shape.receipts:
        source = _source(Receipt._fields, shape.receipts)
        parts.append(
            f"received AS (DELETE FROM {deliveries.name} AS d USING {source} "
            f"WHERE {_ALIVE} AND {_FEW_FOR_THE_PLANNER} "
            f"AND {' AND '.join(f'd.{field} = v.{field}' for field in Receipt._fields)})"
        )
    if shape.closed:
        parts += [
            f"left_channels AS (DELETE FROM {subscriptions.name} WHERE instance_id {_OF_THESE})",
            f"left_mail AS (DELETE FROM {mail.name} WHERE to_id {_OF_THESE})",
            f"left_deliveries AS (DELETE FROM {deliveries.name} WHERE instance_id {_OF_THESE})",
        ]
    return f"WITH {', '.join(parts)} SELECT {_ALIVE}, {inserted}, {is_ours}"


def _source(fields: Sequence[str], count: int) -> str:
    """Where rows come from, as ``v``: so many values, or one text."""
    columns = ", ".join(fields)
    if count not in NULL:
        typed = ", ".join(typed_mark(field) for field in fields)
        return f"(VALUES {', '.join([f'({typed})'] * count)}) AS v({columns})"
    null = f"'{NULL[count]}'" if count == MANY else _char(NULL[count])
    values = ", ".join(f"CAST(a[{n}] AS {NOT_TEXT.get(field, 'text')})" for n, field in enumerate(fields, 1))
    # OFFSET 0: each row is taken apart once, not for each of its columns.
    return (
        f"(SELECT {values} FROM (SELECT string_to_array(line, {_char(BETWEEN_VALUES)}, {null}) AS a "
        f"FROM unnest(string_to_array(%s, {_char(BETWEEN_ROWS)})) AS line OFFSET 0) AS rows) AS v({columns})"
    )


def typed_mark(field: str, mark: str = "%s") -> str:
    """The placeholder of a column's value, with its type."""
    return f"CAST({mark} AS {NOT_TEXT.get(field, 'text')})"


def _char(char: str) -> str:
    return f"chr({ord(char)})"
