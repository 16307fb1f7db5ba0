"""Exceptions to JSON text and back, so that live and replay raise the same type with the same data.

Stored are the class's name, ``args``, attributes and the cause, each as far as it is plain JSON. An exception
comes back as its own class when that class is importable from a module that is already loaded (nothing is
imported because of what the database says); else as ``RecordedError``, which keeps the name.
"""

from __future__ import annotations

import builtins
import sys
import traceback
from typing import Any

from romancy.errors import RetryExhaustedError, RomancyError, SerializationError
from romancy.model import ErrorInfo
from romancy.serde import PlainCodec, dump_plain, load_json

_MAX_TEXT = 8_000
_MAX_CAUSES = 8
_plain = PlainCodec()


class RecordedError(RomancyError):
    """Stands for a recorded exception whose class this process can't find; its message names that class."""


def describe(error: BaseException) -> ErrorInfo:
    """The exception for people."""
    return ErrorInfo(_type_name(type(error)), _message(error), _trace(error))


def encode_error(error: BaseException) -> str:
    """The exception as JSON text; never fails, whatever the exception holds."""
    return dump_plain(_record(error, _MAX_CAUSES))


def decode_error(text: str) -> BaseException:
    """The exception that :func:`encode_error` stored."""
    return _rebuild(load_json(text))


def decode_info(text: str) -> ErrorInfo:
    """The recorded exception for people, without building it."""
    data = load_json(text)
    return ErrorInfo(data["type"], data["message"], data.get("traceback", ""))


def recorded(error: BaseException) -> tuple[str, BaseException]:
    """The text to store, and the exception as replay will raise it."""
    text = encode_error(error)
    return text, decode_error(text)


def _type_name(kind: type[BaseException]) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        text = str(error)
    except Exception as second:
        text = f"<its text can't be read: {type(second).__name__}>"
    return _storable(text)


def _storable(text: str) -> str:
    return text[:_MAX_TEXT].encode("utf-8", "replace").decode()


def _trace(error: BaseException) -> str:
    frames = traceback.format_exception(type(error), error, error.__traceback__, limit=-12, chain=False)
    return _storable("".join(frames))


def _record(error: BaseException, causes: int) -> dict[str, Any]:
    data: dict[str, Any] = {
        "module": type(error).__module__,
        "name": type(error).__qualname__,
        "type": _type_name(type(error)),
        "message": _message(error),
        "args": [_plain_or_text(value) for value in error.args],
    }
    if isinstance(error, RetryExhaustedError):
        data["attrs"] = {"activity_id": error.activity_id, "attempts": error.attempts}
    else:
        attrs = {name: _plain_value(value) for name, value in vars(error).items() if name != "__notes__"}
        kept = {name: value for name, value in attrs.items() if value is not _NOT_PLAIN}
        if kept:
            data["attrs"] = kept
    trace = _trace(error)
    if trace:
        data["traceback"] = trace
    if error.__cause__ is not None and causes:
        data["cause"] = _record(error.__cause__, causes - 1)
    return data


_NOT_PLAIN = object()


def _plain_value(value: Any) -> Any:
    try:
        text, copy = _plain.encode(value)
    except (TypeError, ValueError, SerializationError, RecursionError):
        return _NOT_PLAIN
    return copy if len(text) <= _MAX_TEXT else _NOT_PLAIN


def _plain_or_text(value: Any) -> Any:
    plain = _plain_value(value)
    if plain is not _NOT_PLAIN:
        return plain
    try:
        return _storable(str(value))
    except Exception:
        return f"<{type(value).__name__}>"


def _rebuild(data: dict[str, Any]) -> BaseException:
    cause = _rebuild(data["cause"]) if "cause" in data else None
    error = _instantiate(data, cause)
    if error.__cause__ is None:
        error.__cause__ = cause
    return error


def _instantiate(data: dict[str, Any], cause: BaseException | None) -> BaseException:
    kind = _find_class(data["module"], data["name"])
    if kind is None:
        return RecordedError(f"{data['type']}: {data['message']}")
    attrs = data.get("attrs", {})
    if kind is RetryExhaustedError and cause is not None:
        return RetryExhaustedError(attrs["activity_id"], attrs["attempts"], cause)
    arguments = data["args"]
    try:
        # Not kind(*arguments): a user's __init__ may want other arguments than it handed to Exception.
        error = kind.__new__(kind, *arguments)
        error.args = tuple(arguments)
        for name, value in attrs.items():
            setattr(error, name, value)
    except Exception:
        return RecordedError(f"{data['type']}: {data['message']}")
    return error


def _find_class(module: str, name: str) -> type[BaseException] | None:
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None
