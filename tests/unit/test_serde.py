"""Values come back as what the annotation says, live and stored alike; what can't is refused by name."""

from __future__ import annotations

import datetime as dt
import json
import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, Literal, Optional, Union
from uuid import UUID

import pytest

from romancy.errors import DefinitionError, PayloadTooLargeError, SerializationError
from romancy.serde import check_size, codec_for
from romancy.signature import Signature
from tests.unit.types_for_tests import (
    Account,
    Colour,
    Deferred,
    ExtendedTypedDict,
    Level,
    Line,
    Order,
    OwnChoice,
    Pair,
    PlainTypedDict,
    Point,
    Right,
    Shape,
    Struct,
    Wrapped,
)

UUID_1 = UUID("0190a0f2-0000-7000-8000-000000000001")
NOON = dt.datetime(2024, 2, 29, 12, 0, 0, 123456, tzinfo=dt.UTC)
ORDER = Order(UUID_1, [Line("A", Decimal("1.10"), b"\xff\x00")], NOON, Colour.TWO, frozenset({"x"}), 1.5)

ROUND_TRIPS: list[tuple[Any, Any]] = [
    (str, "snow \u2603 \0 \u2028 \U0001f600"),
    (int, 2**70),
    (int, -(10**400)),
    (bool, True),
    (float, -0.0),
    (float, 5e-324),
    (float, math.inf),
    (float, -math.inf),
    (list[float], [math.inf, 1.0]),
    (None, None),
    (Optional[int], None),  # noqa: UP045  (the older spelling is stored alike)
    (int | None, 3),
    (int | str, "1"),
    (int | str, 1),
    (Union[bool, int], True),  # noqa: UP007
    (bool | int, 1),
    (float | int, 1),
    (dt.datetime | str, "tomorrow"),
    (Point | Account, Point(1, 2)),
    (Point | Account, Account(name="a")),
    (Literal["a", 1], 1),
    (Colour, Colour.TWO),
    (Colour, Colour.RED),
    (Level, Level.LOW),
    (Shape, Shape.ROUND),
    (Right, Right.READ | Right.WRITE),
    (dt.datetime, NOON),
    (dt.datetime, NOON.replace(tzinfo=None)),
    (dt.datetime, NOON.replace(tzinfo=dt.timezone(dt.timedelta(hours=5, minutes=30)))),
    (dt.date, dt.date(1, 1, 1)),
    (dt.time, dt.time(1, 2, 3, 4)),
    (dt.timedelta, dt.timedelta(days=-1, microseconds=3)),
    (Decimal, Decimal("1.10")),
    (Decimal, Decimal("1E+50")),
    (UUID, UUID_1),
    (bytes, b""),
    (bytes, bytes(range(256))),
    (bytes | None, b"\xff\xfe"),
    (bytearray, bytearray(b"\xff")),
    (dict[str, bytes], {"a": b"\x80"}),
    (set[int], {3, 1, 2}),
    (frozenset[str], frozenset("ab")),
    (set[UUID], {UUID_1}),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], (1, 2)),
    (list[Point], [Point(1), Point(2)]),
    (dict[str, Point], {"a": Point(1)}),
    (dict[int, str], {1: "a"}),
    (dict[dt.date, int], {dt.date(2020, 1, 1): 1}),
    (Order, ORDER),
    (Order, Order(UUID_1, [], NOON, parent=ORDER)),
    (Point, Point(3, 4)),
    (Account, Account(name="n", key=b"\xff", ratio=math.inf, opened=dt.date(2020, 1, 2), owner=Point(1))),
    (list[Account], [Account(name="n", key=b"\xff")]),
    (Deferred, Deferred(key=b"\xff")),
    (OwnChoice, OwnChoice(key=b"\xff")),
    (Struct, Struct(1, b"\xff", 1.5, Struct(2))),
    (list[Struct], [Struct(1, b"\xff")]),
    (dict[str, Struct], {"a": Struct(1)}),
    (Struct | None, None),
    (Struct | None, Struct(3)),
    (PlainTypedDict, {"name": "n", "key": b"\xff"}),
    (PlainTypedDict, {"name": "n"}),
    (list[PlainTypedDict], [{"name": "n"}]),
    (PlainTypedDict | None, {"name": "n"}),
    (ExtendedTypedDict, {"point": Point(1), "parts": [{"name": "p", "key": b"\xff"}]}),
    (Pair, Pair(1, b"\xff")),
    (Any, {"a": [1, 2.5, None, True, "x", {"b": []}]}),
    (object, [1, "a"]),
    (dict, {"a": 1}),
    (dict[str, Any], {"a": {"b": 1}}),
    (list, [1, [2]]),
    (list[Any], [1, None]),
]


@pytest.mark.parametrize(
    ("annotation", "value"),
    ROUND_TRIPS,
    ids=[f"{n}-{getattr(a, '__name__', a)}" for n, (a, _) in enumerate(ROUND_TRIPS)],
)
def test_value_comes_back_as_its_annotation_says_live_and_stored(annotation: Any, value: Any) -> None:
    text, live = codec_for(annotation).encode(value)
    stored = codec_for(annotation).decode(text)
    assert type(live) is type(stored) is type(value)
    assert live == stored == value
    json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize("annotation", [float, list[float], dict[str, float], float | None, Account, Order])
def test_nan_in_a_typed_float_is_faithful(annotation: Any) -> None:
    values: dict[Any, tuple[Any, Any]] = {
        float: (math.nan, lambda value: value),
        list[float]: ([math.nan], lambda value: value[0]),
        dict[str, float]: ({"a": math.nan}, lambda value: value["a"]),
        float | None: (math.nan, lambda value: value),
        Account: (Account(name="a", ratio=math.nan), lambda value: value.ratio),
        Order: (Order(UUID_1, [], NOON, weight=math.nan), lambda value: value.weight),
    }
    value, read = values[annotation]
    text, live = codec_for(annotation).encode(value)
    assert math.isnan(read(live))
    assert math.isnan(read(codec_for(annotation).decode(text)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.nan], {"a": {"b": math.inf}}])
@pytest.mark.parametrize("annotation", [Any, object])
def test_nan_and_infinity_are_refused_in_plain_values(annotation: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec_for(annotation).encode(value)


@pytest.mark.parametrize("value", [Struct(1, ratio=math.nan), Struct(1, inner=Struct(2, ratio=math.inf))])
def test_nan_in_a_struct_is_refused_instead_of_becoming_none(value: Struct) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        codec_for(Struct).encode(value)


@pytest.mark.parametrize(
    ("value", "like_stored"),
    [((1, 2), [1, 2]), ({"a": (1, (2,))}, {"a": [1, [2]]}), ([Level.LOW, Shape.ROUND], [1, "round"])],
)
def test_plain_tuples_and_enums_are_the_same_live_as_when_they_are_read_back(value: Any, like_stored: Any) -> None:
    text, live = codec_for(Any).encode(value)
    assert live == like_stored
    assert json.loads(text) == like_stored
    assert json.dumps(live) == json.dumps(json.loads(text))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1: 2}, "the value has the key 1 of type int"),
        ({"a": [{True: 1}]}, r"the value\.a\[0\] has the key True of type bool"),
        ({None: 1}, "the key None of type NoneType"),
        ({"a": 1, 1: 2}, "the key 1 of type int"),
        ({"a": {1.0: 1}}, r"the value\.a has the key 1\.0"),
        ({"a": b"x"}, r"the value\.a is of type bytes"),
        ([{1, 2}], r"the value\[0\] is of type set"),
        (NOON, "the value is of type datetime"),
        (Point(), "the value is of type Point"),
        ([object()], r"the value\[0\] is of type object"),
    ],
)
def test_part_that_is_no_json_is_refused_with_its_path(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        codec_for(Any).encode(value)


@pytest.mark.parametrize("annotation", [Any, str, list[str], dict[str, str], Account, Struct, dict])
def test_lone_surrogate_is_refused_before_the_database_sees_it(annotation: Any) -> None:
    bad = "\ud800"
    value = {
        Any: [bad],
        str: bad,
        list[str]: [bad],
        dict[str, str]: {"a": bad},
        Account: Account.model_construct(name=bad),
        Struct: {"a": bad},
        dict: {bad: 1},
    }[annotation]
    with pytest.raises(Exception, match=r"surrogates|utf-8|UTF-8"):
        codec_for(annotation).encode(value)


@pytest.mark.parametrize("annotation", [Any, int, list[int], dict])
def test_integer_too_long_to_be_read_again_is_refused(annotation: Any) -> None:
    huge = 10**5_000
    value = {Any: huge, int: huge, list[int]: [huge], dict: {"a": huge}}[annotation]
    with pytest.raises(ValueError):
        codec_for(annotation).encode(value)


def test_circular_and_bottomless_values_are_refused() -> None:
    circle: list[Any] = []
    circle.append(circle)
    with pytest.raises((ValueError, RecursionError)):
        codec_for(Any).encode(circle)
    deep: list[Any] = []
    for _ in range(200_000):
        deep = [deep]
    with pytest.raises(RecursionError):
        codec_for(Any).encode(deep)
    while deep:
        deep = deep[0]


@pytest.mark.parametrize(
    ("annotation", "value", "wanted"),
    [
        (Point, {"x": 1}, Point(1)),
        (Decimal, 5, Decimal(5)),
        (float, 1, 1.0),
        (list[Point], ({"x": 1},), [Point(1)]),
        (Struct, {"count": 1}, Struct(1)),
        (tuple[int, ...], [1, 2], (1, 2)),
        (Account, {"name": "a"}, Account(name="a")),
    ],
)
def test_value_that_fits_after_conversion_is_converted_at_once(annotation: Any, value: Any, wanted: Any) -> None:
    text, live = codec_for(annotation).encode(value)
    assert type(live) is type(wanted)
    assert live == codec_for(annotation).decode(text) == wanted


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 1.5),
        (int, "x"),
        (str, 1),
        (Point, Point("x")),  # type: ignore[arg-type]
        (Point, Line("a", Decimal(1))),
        (Account, {"key": b""}),
        (Struct, Struct("x")),  # type: ignore[arg-type]
        (list[int], ["x"]),
        (dict, [1]),
        (list, {"a": 1}),
        (None, 0),
        (Colour, "blue"),
        (Decimal, Decimal("NaN")),
    ],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_value_of_another_type_than_the_annotation_is_refused(annotation: Any, value: Any) -> None:
    with pytest.raises(Exception) as caught:
        codec_for(annotation).encode(value)
    assert not isinstance(caught.value, AssertionError)


@pytest.mark.parametrize("annotation", [bytes | str, str | bytes | None, list[str | bytes]])
def test_text_beside_bytes_is_refused_because_json_cannot_tell_them_apart(annotation: Any) -> None:
    with pytest.raises(DefinitionError, match="choose one of them"):
        codec_for(annotation)


def test_annotation_that_nothing_can_store_is_a_definition_error() -> None:
    class Opaque:
        pass

    with pytest.raises(DefinitionError, match="can't be stored as JSON"):
        codec_for(Opaque)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [(Any, {"a": [1]}), (dict, {"a": [1]}), (list[Any], [[1]]), (dict[str, list[int]], {"a": [1]})],
)
def test_the_callee_gets_a_copy(annotation: Any, value: Any) -> None:
    _, live = codec_for(annotation).encode(value)
    before = json.dumps(value)
    inner = live["a"] if isinstance(live, dict) else live[0]
    inner.append(2)
    assert json.dumps(value) == before


def test_the_callee_gets_a_copy_of_mutable_objects() -> None:
    line = Line("a", Decimal(1))
    account = Account(name="n")
    struct = Struct(1)
    for value in (line, account, struct):
        _, live = codec_for(type(value)).encode(value)
        assert live == value
        assert live is not value


# -- one call's arguments ---------------------------------------------------------------------------------------


def _of_point(ctx: Any, order: Point) -> None: ...
def _of_wrapped(ctx: Any, order: Wrapped) -> None: ...
def _of_account(ctx: Any, order: Account) -> None: ...
def _of_struct(ctx: Any, order: Struct) -> None: ...
def _of_typed_dict(ctx: Any, order: PlainTypedDict) -> None: ...
def _of_dict(ctx: Any, order: dict[str, Any]) -> None: ...
def _of_mapping(ctx: Any, order: Mapping[str, int]) -> None: ...
def _of_optional(ctx: Any, order: Point | None = None) -> None: ...
def _of_anything(ctx: Any, order) -> None: ...  # type: ignore[no-untyped-def]
def _of_anything_or_one(ctx: Any, order: Any = 1) -> None: ...
def _of_text(ctx: Any, order: str) -> None: ...
def _of_list(ctx: Any, order: list[int]) -> None: ...
def _of_default_point(ctx: Any, order: Point = Point(5, 6)) -> None: ...  # noqa: B008
def _of_default_dict(ctx: Any, order: dict[str, int] = {"a": 1}) -> None: ...  # noqa: B006
def _of_default_text(ctx: Any, order: str = "x") -> None: ...
def _of_keyword(ctx: Any, *, order: Point) -> None: ...
def _of_keyword_text(ctx: Any, *, order: str = "x") -> None: ...
def _of_position(ctx: Any, order: Point, /) -> None: ...
def _of_args(ctx: Any, *order: int) -> None: ...
def _of_kwargs(ctx: Any, **order: int) -> None: ...
def _of_nothing(ctx: Any) -> None: ...
def _of_many(ctx: Any, a: int, b: Point = Point(1), *rest: bytes, c: Decimal = Decimal(1), **more: dt.date) -> None: ...  # noqa: B008
def _of_defaults(ctx: Any, a: int = 1, b: int = 2, *, c: int = 3) -> None: ...
def _of_pair(ctx: Any, order: Pair) -> None: ...


def signature(function: Any) -> Signature:
    return Signature("workflow 'w'", function, skip=1)


def call(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs


INPUTS: list[tuple[Any, Any, str]] = [
    (_of_point, call(Point(1, 2)), '{"x":1,"y":2}'),
    (_of_point, call(order=Point(1, 2)), '{"x":1,"y":2}'),
    (_of_wrapped, call(Wrapped({"a": 1})), '{"order":{"a":1}}'),
    (_of_account, call(Account(name="n")), '{"name":"n","key":"","ratio":0.0,"opened":null,"owner":null}'),
    (_of_struct, call(Struct(1)), '{"count":1,"key":"","ratio":null,"inner":null}'),
    (_of_typed_dict, call({"name": "n"}), '{"name":"n"}'),
    (_of_dict, call({"a": 1}), '{"a":1}'),
    (_of_dict, call({}), "{}"),
    (_of_dict, call({"order": {"a": 1}}), '{"order":{"a":1}}'),
    (_of_mapping, call({"order": 1}), '{"order":1}'),
    (_of_optional, call(Point(1)), '{"x":1,"y":0}'),
    (_of_optional, call(None), '{"order":null}'),
    (_of_optional, call(), "{}"),
    (_of_anything, call({"a": 1}), '{"a":1}'),
    (_of_anything, call({"order": {"a": 1}}), '{"order":{"order":{"a":1}}}'),
    (_of_anything, call({"order": 1, "b": 2}), '{"order":1,"b":2}'),
    (_of_anything, call({}), '{"order":{}}'),
    (_of_anything, call([1]), '{"order":[1]}'),
    (_of_anything, call("{}"), '{"order":"{}"}'),
    (_of_anything, call(None), '{"order":null}'),
    (_of_anything_or_one, call(), "{}"),
    (_of_anything_or_one, call({}), '{"order":{}}'),
    (_of_text, call("x"), '{"order":"x"}'),
    (_of_list, call([1]), '{"order":[1]}'),
    (_of_default_point, call(), '{"x":5,"y":6}'),
    (_of_default_point, call(Point()), '{"x":0,"y":0}'),
    (_of_default_dict, call(), '{"a":1}'),
    (_of_default_dict, call({}), "{}"),
    (_of_default_text, call(), "{}"),
    (_of_keyword, call(order=Point(1)), '{"x":1,"y":0}'),
    (_of_keyword_text, call(), "{}"),
    (_of_keyword_text, call(order="y"), '{"order":"y"}'),
    (_of_position, call(Point(1)), '{"x":1,"y":0}'),
    (_of_args, call(1, 2), '{"order":[1,2]}'),
    (_of_args, call(), "{}"),
    (_of_kwargs, call(a=1, order=2), '{"order":{"a":1,"order":2}}'),
    (_of_kwargs, call(), "{}"),
    (_of_nothing, call(), "{}"),
    (_of_many, call(1), '{"a":1}'),
    (
        _of_many,
        call(1, Point(2), b"\xff", c=Decimal("1.0"), d=dt.date(2020, 1, 1)),
        '{"a":1,"b":{"x":2,"y":0},"rest":["_w=="],"c":"1.0","more":{"d":"2020-01-01"}}',
    ),
    (_of_defaults, call(), "{}"),
    (_of_defaults, call(b=5), '{"b":5}'),
    (_of_defaults, call(7, c=8), '{"a":7,"c":8}'),
]

INPUT_IDS = [f"{n}{function.__name__}" for n, (function, _, _) in enumerate(INPUTS)]


def _seen(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """What the function's parameters would hold."""
    bound = signature(function)._signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


@pytest.mark.parametrize(("function", "given", "text"), INPUTS, ids=INPUT_IDS)
def test_input_is_stored_bare_or_by_parameter_name_and_read_as_it_was_given(
    function: Any, given: Any, text: str
) -> None:
    args, kwargs = given
    stored = signature(function).encode_input(args, kwargs).text
    assert stored == text
    assert _seen(function, *signature(function).decode_input(stored)) == _seen(function, args, kwargs)


@pytest.mark.parametrize(("function", "given", "text"), INPUTS, ids=INPUT_IDS)
def test_arguments_of_an_activity_are_stored_by_parameter_name_and_handed_over_alike(
    function: Any, given: Any, text: str
) -> None:
    del text
    args, kwargs = given
    arguments = signature(function).encode_arguments(args, kwargs)
    assert _seen(function, arguments.args, arguments.kwargs) == _seen(function, args, kwargs)
    assert set(json.loads(arguments.text)) <= set(_seen(function, args, kwargs))


def test_tuple_passed_by_keyword_is_stored_like_one_passed_by_position() -> None:
    by_position = signature(_of_pair).encode_arguments((Pair(1, b"\xff"),), {})
    by_keyword = signature(_of_pair).encode_arguments((), {"order": Pair(1, b"\xff")})
    assert by_keyword.text == by_position.text
    assert by_keyword.args == by_position.args == (Pair(1, b"\xff"),)


def test_keyed_form_of_a_structured_optional_input_is_read_too() -> None:
    assert signature(_of_optional).decode_input('{"order":{"x":1,"y":2}}') == ((Point(1, 2),), {})
    assert signature(_of_optional).decode_input('{"x":1}') == ((Point(1),), {})


@pytest.mark.parametrize(
    ("function", "text", "named"),
    [
        (_of_text, '{"other":1}', "does not fit"),
        (_of_defaults, '{"z":1}', "no parameter 'z'"),
        (_of_defaults, "[1]", "keyed by parameter name"),
        (_of_defaults, '{"a":"x"}', "input 'a'"),
        (_of_point, '{"x":"y"}', "input 'order'"),
        (_of_many, "{}", "missing a required argument: 'a'"),
        (_of_many, "{", "no JSON"),
    ],
)
def test_stored_input_that_does_not_fit_is_refused_by_name(function: Any, text: str, named: str) -> None:
    with pytest.raises(SerializationError, match=named) as caught:
        signature(function).decode_input(text)
    assert "workflow 'w'" in str(caught.value)


def test_argument_that_cannot_be_stored_is_named_with_its_type() -> None:
    with pytest.raises(SerializationError, match="workflow 'w': argument 'order' of type object can't be stored"):
        signature(_of_anything).encode_input((object(),), {})
    with pytest.raises(SerializationError, match="argument 'rest' of type list"):
        signature(_of_many).encode_input((1, Point(), "no bytes \ud800"), {})


def test_default_that_does_not_fit_its_annotation_is_refused_when_it_is_needed() -> None:
    def function(ctx: Any, order: Point = "nothing") -> None: ...  # type: ignore[assignment]

    with pytest.raises(SerializationError, match="argument 'order' of type str"):
        signature(function).encode_input((), {})


def test_call_that_does_not_fit_the_parameters_is_a_type_error_that_shows_them() -> None:
    with pytest.raises(TypeError, match=r"workflow 'w': too many positional arguments; its parameters are \(a: "):
        signature(_of_defaults).encode_input((1, 2, 3), {})
    with pytest.raises(TypeError, match="missing a required argument: 'order'"):
        signature(_of_point).encode_input((), {})
    with pytest.raises(TypeError, match="unexpected keyword argument 'z'"):
        signature(_of_point).encode_input((Point(),), {"z": 1})


def test_result_that_cannot_be_stored_names_its_type() -> None:
    def function() -> int:
        return 1

    with pytest.raises(SerializationError, match="activity 'a': its result of type object can't be stored"):
        Signature("activity 'a'", function).encode_result(object())


def test_unresolvable_annotation_is_a_definition_error_that_says_when_it_is_read() -> None:
    def function(ctx: Any, order: Missing) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(DefinitionError, match="workflow 'w': its annotations can't be resolved"):
        signature(function).encode_input((1,), {})


def test_message_of_an_error_stays_short_and_on_one_line() -> None:
    with pytest.raises(SerializationError) as caught:
        signature(_of_point).encode_input(({"x": "y" * 10_000},), {})
    assert len(str(caught.value)) < 1_000
    assert "\n" not in str(caught.value)


def test_same_arguments_do_not_depend_on_the_order_of_a_set() -> None:
    def function(tags: set[str], n: int = 1) -> None: ...

    signature = Signature("activity 'a'", function)
    signature.resolve()
    same = signature.same_arguments
    assert same('{"tags":["a","b"]}', '{"tags":["b","a"]}')
    assert not same('{"tags":["a","b"]}', '{"tags":["b"]}')
    assert not same('{"tags":["a"]}', "no JSON")


def test_size_counts_bytes_of_utf8_not_characters() -> None:
    check_size("it", ["x" * 100], 100)
    check_size("it", ["\u2603" * 10], 30)
    check_size("it", [None, "x"], 1)
    with pytest.raises(PayloadTooLargeError, match="it takes 33 bytes, more than the limit of 30"):
        check_size("it", ["\u2603" * 11], 30)
    with pytest.raises(PayloadTooLargeError):
        check_size("it", ["x" * 60, "y" * 60], 100)


def test_argument_that_fails_but_once_is_an_error_of_ours_all_the_same() -> None:
    class Fickle(dict[str, int]):
        asked = 0

        def items(self) -> Any:
            self.asked += 1
            if self.asked == 1:
                raise RuntimeError("dictionary changed size during iteration")
            return super().items()

    def take(a: Any) -> None: ...

    with pytest.raises(SerializationError, match="activity 'take': an argument can't be stored: dictionary changed"):
        Signature("activity 'take'", take).encode_arguments((Fickle(a=1),), {})


def test_function_may_have_very_many_parameters() -> None:
    names = [f"p{number}" for number in range(2_000)]
    space: dict[str, Any] = {}
    exec(f"def take({', '.join(names)}): ...", space)
    given = Signature("activity 'take'", space["take"]).encode_arguments(tuple(range(2_000)), {})
    assert json.loads(given.text) == dict(zip(names, range(2_000), strict=True))


@pytest.mark.parametrize("annotation", [dict, list, dict[str, Any], list[Any]])
def test_text_is_no_container(annotation: Any) -> None:
    """It would be stored, and could not be read back."""
    with pytest.raises(TypeError, match="is no"):
        codec_for(annotation).encode("{}")
