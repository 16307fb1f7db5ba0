"""An exception comes back from its record as the same type with the same data, or as a named stand-in."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from romancy import App, ErrorInfo, WorkflowContext, WorkflowFailedError, activity, workflow
from romancy.errors import (
    InstanceNotFoundError,
    NonDeterminismError,
    RetryExhaustedError,
    TerminalError,
    WorkflowSuspendedError,
)
from romancy.failures import RecordedError, decode_error, decode_info, describe, encode_error, recorded
from romancy.retry import RetryPolicy
from tests.unit import errors_for_tests
from tests.unit.errors_for_tests import (
    BoundError,
    CardDeclinedError,
    HiddenError,
    NewError,
    Outer,
    ReadOnlyPropertyError,
    SoldOutError,
    StorageError,
    UnreadableError,
)


def _raised(cause: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        cause()
    return caught.value


SAME = [
    ValueError("x"),
    ValueError("x", 1, None, [2.5, {"a": True}]),
    KeyError("k"),
    TimeoutError(),
    KeyboardInterrupt(),
    OSError(2, "missing"),
    OSError(2, "missing", "a.txt", None, "b.txt"),
    FileNotFoundError("just text"),
    _raised(lambda: open("/nonexistent/file")),  # noqa: SIM115
    ImportError("m", name="n", path="p"),
    _raised(lambda: [].nothing),  # type: ignore[attr-defined]
    StopIteration(5),
    SystemExit(3),
    _raised(lambda: b"\xff".decode()),
    _raised(lambda: json.loads("{")),
    _raised(lambda: compile("x =", "f", "exec")),
    CardDeclinedError(17, detail="stolen"),
    StorageError(13, "denied", "b1"),
    NewError(1, 2),
    ReadOnlyPropertyError("5"),
    SoldOutError("none left"),
    Outer.InnerError("inner"),
    TerminalError("stop"),
    InstanceNotFoundError("gone"),
    NonDeterminismError("i", "this", "that", "f.py:1"),
    WorkflowFailedError("i", ErrorInfo("a.B", "m", "trace")),
    WorkflowSuspendedError("i", None),
]


@pytest.mark.parametrize("error", SAME, ids=[f"{n}-{type(error).__name__}" for n, error in enumerate(SAME)])
def test_exception_comes_back_with_its_type_text_and_attributes(error: BaseException) -> None:
    text, back = recorded(error)
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)
    for name in ("errno", "strerror", "filename", "filename2", "name", "path", "value", "code", "start", "lineno"):
        if name != "code" or isinstance(error, SystemExit):
            assert getattr(back, name, None) == getattr(error, name, None), name
    assert encode_error(decode_error(text)) == encode_error(decode_error(encode_error(back)))


def test_arguments_that_are_json_come_back_equal_and_others_as_text() -> None:
    error = Exception(1, "a", b"\xff", {1: 2}, math.nan, object, [None], "\ud800")
    back = recorded(error)[1]
    assert back.args == (1, "a", b"\xff", "{1: 2}", "nan", "<class 'object'>", [None], "?")


def test_attribute_that_is_no_json_comes_back_as_its_text_so_that_the_message_survives() -> None:
    error = BoundError(datetime(2024, 1, 2, tzinfo=UTC))
    back = recorded(error)[1]
    assert type(back) is BoundError
    assert str(back) == str(error) == "bound until 2024-01-02 00:00:00+00:00"


def test_causes_come_back_as_a_chain_and_a_circle_of_them_ends() -> None:
    error = ValueError("outer")
    error.__cause__ = CardDeclinedError(1, detail="inner")
    error.__cause__.__cause__ = KeyError("innermost")
    back = recorded(error)[1]
    assert type(back.__cause__) is CardDeclinedError
    assert back.__cause__.code == 1
    assert type(back.__cause__.__cause__) is KeyError
    assert back.__cause__.__cause__.__cause__ is None
    error.__cause__.__cause__.__cause__ = error
    assert type(recorded(error)[1]) is ValueError


def test_exception_group_comes_back_with_its_members() -> None:
    error = ExceptionGroup("both", [CardDeclinedError(1, detail="d"), ExceptionGroup("in", [KeyError("k")])])
    back = recorded(error)[1]
    assert isinstance(back, ExceptionGroup)
    assert str(back) == str(error)
    declined, inner = back.exceptions
    assert isinstance(declined, CardDeclinedError)
    assert isinstance(inner, ExceptionGroup)
    assert isinstance(inner.exceptions[0], KeyError)
    assert back.split(KeyError)[0] is not None


def test_group_without_end_is_cut_off() -> None:
    error: Exception = ValueError("core")
    for _ in range(50):
        error = ExceptionGroup("layer", [error] * 2 if isinstance(error, ValueError) else [error])
    assert len(encode_error(error)) < 2_000_000
    assert isinstance(recorded(error)[1], ExceptionGroup)


def test_exhausted_retries_come_back_with_the_last_error_as_their_cause() -> None:
    error = RetryExhaustedError("charge:1", 3, CardDeclinedError(17, detail="stolen"))
    back = recorded(error)[1]
    assert isinstance(back, RetryExhaustedError)
    assert (back.activity_id, back.attempts) == ("charge:1", 3)
    assert type(back.last_error) is CardDeclinedError
    assert back.last_error is back.__cause__
    assert back.last_error.code == 17
    assert str(back) == str(error)


def test_exception_whose_text_cannot_be_read_is_recorded_all_the_same() -> None:
    error = UnreadableError("a")
    assert type(recorded(error)[1]) is UnreadableError
    assert describe(error).message == "<its text can't be read: RuntimeError>"
    exhausted = RetryExhaustedError("a:1", 1, error)
    assert "its text can't be read" in str(exhausted)
    assert type(recorded(exhausted)[1].__cause__) is UnreadableError


def test_class_that_is_not_found_becomes_a_recorded_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = encode_error(HiddenError("secret"))
    monkeypatch.delattr(errors_for_tests, "HiddenError")
    back = decode_error(text)
    assert type(back) is RecordedError
    assert str(back) == "tests.unit.errors_for_tests.HiddenError: secret"

    class LocalError(Exception):
        pass

    assert "LocalError: here" in str(recorded(LocalError("here"))[1])


def test_stored_name_never_imports_a_module_nor_calls_what_is_no_exception() -> None:
    import sys

    assert "antigravity" not in sys.modules
    record = json.loads(encode_error(ValueError("x")))
    for module, name in (("antigravity", "fly"), ("builtins", "print"), ("os", "system"), ("builtins", "int")):
        back = decode_error(json.dumps({**record, "module": module, "name": name}))
        assert type(back) is RecordedError
    assert "antigravity" not in sys.modules


def test_record_of_an_older_shape_is_read() -> None:
    back = decode_error('{"module":"builtins","name":"ValueError","type":"ValueError","message":"m","args":["m"]}')
    assert type(back) is ValueError
    assert back.args == ("m",)


def test_description_for_people_has_type_message_and_the_last_frames() -> None:
    def fail() -> None:
        raise CardDeclinedError(17, detail="stolen")

    error = _raised(fail)
    info = describe(error)
    assert info.type == "tests.unit.errors_for_tests.CardDeclinedError"
    assert info.message == "17: stolen"
    assert "in fail" in info.traceback
    assert decode_info(encode_error(error)) == info


def test_long_texts_are_cut_so_that_a_record_stays_small() -> None:
    error = ValueError("x" * 100_000)
    error.notes = "y" * 100_000  # type: ignore[attr-defined]
    assert len(encode_error(error)) < 60_000
    assert type(recorded(error)[1]) is ValueError


class _Hostile(Exception):
    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args)
        self.__dict__.update(attributes)


class _Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError

    __str__ = __repr__


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.builds(_Unprintable),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=40)
@given(st.lists(anything, max_size=3), st.dictionaries(st.text(max_size=5), anything, max_size=3))
def test_recording_never_fails_and_a_second_record_is_the_same_as_the_first(args: list[Any], attrs: Any) -> None:
    attrs.pop("__cause__", None)
    text, back = recorded(_Hostile(*args, **attrs))
    text.encode()
    assert type(back) is _Hostile
    again = recorded(back)[1]
    assert again.args == back.args
    assert vars(again) == vars(back)


async def test_live_and_replayed_workflow_catch_the_same_types_with_the_same_data() -> None:
    raising = [CardDeclinedError(17, detail="stolen"), SoldOutError("none"), UnreadableError("a"), OSError(2, "m", "f")]

    @activity(retry=RetryPolicy.no_retry())
    async def fail(number: int) -> None:
        raise raising[number]

    seen: list[list[str]] = []

    @workflow
    async def catch_all(ctx: WorkflowContext) -> None:
        caught: list[str] = []
        seen.append(caught)
        for number in range(len(raising)):
            try:
                await fail(number)
            except SoldOutError as error:
                caught.append(f"{type(error)} {error} {error.args}")
            except RetryExhaustedError as error:
                last = error.last_error
                caught.append(f"{error} {type(last)} {last.args} {vars(last)} {getattr(last, 'filename', '')}")
        raise ExceptionGroup("end", [raising[0]])

    async with App(":memory:") as app:
        handle = await app.start_workflow(catch_all)
        with pytest.raises(WorkflowFailedError) as failed:
            await handle.result(timeout=10)
        assert isinstance(failed.value.__cause__, ExceptionGroup)
        history = await app.get_history(handle.instance_id)
        assert [event.error.type.rpartition(".")[2] for event in history if event.error] == [
            "RetryExhaustedError",
            "SoldOutError",
            "RetryExhaustedError",
            "RetryExhaustedError",
            "ExceptionGroup",
        ]
    assert len(seen[0]) == 4
