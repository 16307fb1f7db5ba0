"""Round trips under Hypothesis: what the callee gets live is what reading the text gives."""

from __future__ import annotations

import datetime as dt
import json
from decimal import Decimal
from typing import Any
from uuid import UUID

from hypothesis import given, settings
from hypothesis import strategies as st

from romancy.serde import codec_for
from romancy.signature import Signature
from tests.unit.types_for_tests import Account, Colour, Line, Order, PlainTypedDict, Point, Struct

examples = settings(deadline=None, max_examples=60)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
zones = st.sampled_from([None, dt.UTC, dt.timezone(dt.timedelta(hours=-9, minutes=-30))])
times = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30), timezones=zones)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
floats = st.floats(allow_nan=False)
lines = st.builds(Line, text, decimals, st.binary(max_size=20))
orders = st.recursive(
    st.builds(Order, st.uuids(), st.lists(lines, max_size=2), times, st.sampled_from(Colour)),
    lambda inner: st.builds(
        Order, st.uuids(), st.just([]), times, st.sampled_from(Colour), st.frozensets(text), floats, inner
    ),
    max_leaves=3,
)
points = st.builds(Point, st.integers(), st.integers())
accounts = st.builds(Account, name=text, key=st.binary(max_size=9), ratio=floats, owner=st.none() | points)
structs = st.builds(
    Struct, st.integers(-(2**63), 2**63 - 1), st.binary(max_size=9), st.none() | floats.filter(lambda x: abs(x) < 1e308)
)
typed_dicts = st.fixed_dictionaries({"name": text}, optional={"key": st.binary(max_size=9)})

typed = st.one_of(
    st.tuples(st.just(Order), orders),
    st.tuples(st.just(Account), accounts),
    st.tuples(st.just(Struct), structs),
    st.tuples(st.just(PlainTypedDict), typed_dicts),
    st.tuples(st.just(list[Point]), st.lists(points, max_size=3)),
    st.tuples(st.just(dict[str, Decimal]), st.dictionaries(text, decimals, max_size=3)),
    st.tuples(st.just(dict[UUID, bytes]), st.dictionaries(st.uuids(), st.binary(max_size=9), max_size=3)),
    st.tuples(st.just(set[int]), st.sets(st.integers(), max_size=4)),
    st.tuples(st.just(tuple[int, str, bytes]), st.tuples(st.integers(), text, st.binary(max_size=9))),
    st.tuples(st.just(int | str | None), st.none() | st.integers() | text),
    st.tuples(st.just(bool | int | float), st.booleans() | st.integers() | floats),
    st.tuples(st.just(dt.datetime), times),
    st.tuples(st.just(dt.timedelta), st.timedeltas(dt.timedelta(days=-99_999), dt.timedelta(days=99_999))),
    st.tuples(st.just(float), floats),
    st.tuples(st.just(int), st.integers()),
    st.tuples(st.just(bytes), st.binary()),
)


@examples
@given(plain)
def test_plain_value_is_the_same_live_and_stored(value: Any) -> None:
    stored, live = codec_for(Any).encode(value)
    assert live == codec_for(Any).decode(stored) == value
    assert repr(live) == repr(codec_for(Any).decode(stored))
    stored.encode()


@examples
@given(typed)
def test_typed_value_is_the_same_live_and_stored(case: tuple[Any, Any]) -> None:
    annotation, value = case
    stored, live = codec_for(annotation).encode(value)
    again = codec_for(annotation).decode(stored)
    assert type(live) is type(again) is type(value)
    assert live == again == value
    # Once more from the copy: a second hop changes nothing.
    _, second = codec_for(annotation).encode(live)
    assert second == live


def _anything(ctx: Any, value: Any = "default") -> None: ...
def _typed(ctx: Any, value: dict[str, Any]) -> None: ...
def _many(ctx: Any, first: Any, *rest: Any, last: Any = None, **more: Any) -> None: ...


keys_that_confuse = st.sampled_from(["value", "first", "rest", "more", "last", "x"])
confusing = st.recursive(plain, lambda inner: st.dictionaries(keys_that_confuse, inner, max_size=2), max_leaves=6)


@examples
@given(confusing)
def test_any_single_input_is_read_as_it_was_given(value: Any) -> None:
    signature = Signature("workflow 'w'", _anything, skip=1)
    assert signature.decode_input(signature.encode_input((value,), {}).text) == ((value,), {})


@examples
@given(st.dictionaries(keys_that_confuse, confusing, max_size=3))
def test_any_object_input_is_stored_as_itself_and_read_as_it_was_given(value: dict[str, Any]) -> None:
    signature = Signature("workflow 'w'", _typed, skip=1)
    stored = signature.encode_input((value,), {}).text
    assert json.loads(stored) == value
    assert signature.decode_input(stored) == ((value,), {})


@examples
@given(
    st.lists(confusing, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["last", "x", "y", "value"]), confusing, max_size=3),
)
def test_several_inputs_are_read_as_they_were_given(args: list[Any], kwargs: dict[str, Any]) -> None:
    signature = Signature("workflow 'w'", _many, skip=1)
    assert signature.decode_input(signature.encode_input(tuple(args), kwargs).text) == (tuple(args), kwargs)
