"""Exceptions to JSON text and back, so that live and replay raise the same type with the same data.

Stored are the class's name, ``args``, attributes, the cause and a group's members. What is no plain JSON there is
kept as its text. An exception comes back as its own class when that class is found in a module that is already
loaded (nothing is imported because of what the database says); else as ``RecordedError``, which keeps the name.
"""

from __future__ import annotations

import base64
import builtins
import contextlib
import dataclasses
import sys
import traceback
from typing import Any

from romancy.errors import (
    RetryExhaustedError,
    RomancyError,
    SerializationError,
    WorkflowFailedError,
    WorkflowSuspendedError,
    text_of,
)
from romancy.model import ErrorInfo
from romancy.serde import PlainCodec, dump_plain, load_json

_MAX_TEXT = 8_000
_MAX_CAUSES = 8
_MAX_MEMBERS = 32
_BUILTIN_FIELDS: tuple[tuple[type[BaseException], tuple[str, ...]], ...] = (
    (OSError, ("filename", "filename2")),
    (ImportError, ("name", "path")),
    (NameError, ("name",)),
    (AttributeError, ("name",)),
)
"""What builtin exceptions keep beside ``args`` and ``__dict__``."""
_WITH_INFO = (WorkflowFailedError, WorkflowSuspendedError)
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
    return _storable(text_of(error))


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
    in_base64 = [n for n, value in enumerate(error.args) if type(value) is bytes and len(value) <= _MAX_TEXT]
    if in_base64:
        data["args"] = [
            base64.b64encode(value).decode() if n in in_base64 else data["args"][n]
            for n, value in enumerate(error.args)
        ]
        data["bytes"] = in_base64
    if isinstance(error, RetryExhaustedError):
        data["attrs"] = {"activity_id": error.activity_id, "attempts": error.attempts}
    elif attrs := _attributes(error):
        data["attrs"] = attrs
    if isinstance(error, BaseExceptionGroup) and causes:
        data["message"] = _storable(error.message)
        data["members"] = [_record(member, causes - 1) for member in error.exceptions[:_MAX_MEMBERS]]
    trace = _trace(error)
    if trace:
        data["traceback"] = trace
    if error.__cause__ is not None and causes:
        data["cause"] = _record(error.__cause__, causes - 1)
    return data


def _attributes(error: BaseException) -> dict[str, Any]:
    found = {name: value for name, value in vars(error).items() if name.isidentifier() and name != "__notes__"}
    for kind, names in _BUILTIN_FIELDS:
        if isinstance(error, kind):
            found |= {name: value for name in names if (value := getattr(error, name, None)) is not None}
    return {name: _plain_or_text(value) for name, value in found.items()}


_NOT_PLAIN = object()


def _plain_value(value: Any) -> Any:
    if isinstance(value, ErrorInfo):
        value = dataclasses.asdict(value)
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
    try:
        error = _make(kind, data)
        for name, value in attrs.items():
            setattr(error, name, _info(value) if name == "error" and issubclass(kind, _WITH_INFO) else value)
    except Exception:
        return RecordedError(f"{data['type']}: {data['message']}")
    return error


def _info(value: Any) -> Any:
    return ErrorInfo(**value) if isinstance(value, dict) else value


def _make(kind: type[BaseException], data: dict[str, Any]) -> BaseException:
    """A new exception of this class, by the builtin class that it derives from.

    Not ``kind(*args)``: a user's ``__init__`` may want other arguments than it handed to ``Exception``.
    """
    if "members" in data:
        members = [_rebuild(member) for member in data["members"]]
        return kind.__new__(kind, data["message"], members)
    in_base64 = data.get("bytes", ())
    arguments = [base64.b64decode(value) if n in in_base64 else value for n, value in enumerate(data["args"])]
    base: type[BaseException] = next(parent for parent in kind.__mro__ if parent.__module__ == "builtins")
    error = base.__new__(kind, *arguments)
    # An argument that was kept as its text may not fit; the class and the arguments come back all the same.
    with contextlib.suppress(Exception):
        base.__init__(error, *arguments)
    error.args = tuple(arguments)
    return error


def _find_class(module: str, name: str) -> type[BaseException] | None:
    found: Any = builtins if module == "builtins" else sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, BaseException) else None
