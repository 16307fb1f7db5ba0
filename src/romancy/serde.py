"""Values to JSON text and back, by annotation.

A codec's ``encode`` returns the text to store *and* the value as reading the text would give it, so that
a workflow sees the same on the first run as on every replay. Plain JSON values take a short way of their
own; everything else goes through pydantic (or msgspec, for its structs). Never pickle.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from json.encoder import encode_basestring
from typing import Any, Protocol

import typing_extensions

from romancy.errors import DefinitionError, PayloadTooLargeError

_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":"))


def _chunk_encoder() -> Callable[[Any, int], Iterable[str]]:
    """What ``JSONEncoder.iterencode`` makes anew for each value, at several times the cost of a small value."""
    make: Any = getattr(json.encoder, "c_make_encoder", None)
    if make is None:
        return lambda value, _level: _encoder.iterencode(value)
    encoder: Callable[[Any, int], Iterable[str]] = make(
        None, _encoder.default, encode_basestring, None, ":", ",", False, False, False
    )
    return encoder


_encode_chunks = _chunk_encoder()
_decoder: Any = json.JSONDecoder()
_scan: Callable[[str, int], tuple[Any, int]] = _decoder.scan_once


def dump_plain(value: Any) -> str:
    """Plain JSON values as compact text.

    Raises:
        TypeError, ValueError, RecursionError: it holds something else.
    """
    return "".join(_encode_chunks(value, 0))


def load_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none.
    """
    try:
        value, end = _scan(text, 0)
    except StopIteration:
        return json.loads(text)
    return value if end == len(text) else json.loads(text)


MISSING = inspect.Parameter.empty


class Codec(Protocol):
    """How values of one annotation are stored.

    Raises (both methods): any exception; :class:`Signature` turns it into a ``SerializationError``
    that names the argument or result.
    """

    def encode(self, value: Any) -> tuple[str, Any]:
        """The text to store, and the value as :meth:`decode` will give it."""
        ...

    def decode(self, text: str) -> Any:
        """The value that the text stands for."""
        ...


def check_text(text: str) -> str:
    """The text, once it is sure that it can be stored as UTF-8."""
    if not text.isascii():
        text.encode()
    return text


def _refuse_parts_that_json_changes(value: Any, path: str) -> None:
    """Find the part of a plain value that would come back as something else."""
    match value:
        case None | bool() | int() | float() | str():
            return
        case dict():
            for key, part in value.items():
                if not isinstance(key, str):
                    raise TypeError(f"{path} has the key {key!r} of type {type(key).__name__}; JSON keys are strings")
                _refuse_parts_that_json_changes(part, f"{path}.{key}")
        case list() | tuple():
            for index, part in enumerate(value):
                _refuse_parts_that_json_changes(part, f"{path}[{index}]")
        case _:
            raise TypeError(f"{path} is of type {type(value).__name__}, which is no JSON value")


class PlainCodec:
    """Plain JSON values: what an absent annotation, ``Any``, ``object`` or ``dict[str, Any]`` may hold.

    Tuples are stored as lists, and come back as lists the first time too.
    """

    __slots__ = ("container",)

    def __init__(self, container: type | None = None) -> None:
        self.container = container

    def encode(self, value: Any) -> tuple[str, Any]:
        if self.container is None:
            kind = type(value)
            if kind is str:
                return check_text(encode_basestring(value)), value
            if kind is int:
                return str(value), value
            if value is None or kind is bool or kind is float:
                return dump_plain(value), value
        elif not isinstance(value, self.container):
            raise TypeError(f"{value!r} is no {self.container.__name__}")
        try:
            text = "".join(_encode_chunks(value, 0))
        except TypeError:
            _refuse_parts_that_json_changes(value, "the value")
            raise
        if not text.isascii():
            text.encode()
        copy, _ = _scan(text, 0)
        if copy != value:
            _refuse_parts_that_json_changes(value, "the value")
        return text, copy

    def decode(self, text: str) -> Any:
        value = load_json(text)
        if self.container is not None and not isinstance(value, self.container):
            raise TypeError(f"{value!r} is no {self.container.__name__}")
        return value


class AdapterCodec:
    """Whatever pydantic understands: dataclasses, models, unions, enums, dates, bytes …"""

    __slots__ = ("_adapter", "_serializer", "_validator")

    def __init__(self, annotation: Any) -> None:
        from pydantic import TypeAdapter  # noqa: PLC0415  (150 ms that plain values never need)
        from pydantic_core import SchemaSerializer, SchemaValidator  # noqa: PLC0415

        self._adapter: TypeAdapter[Any] = TypeAdapter(annotation)
        # A model with defer_build, or with names that its module defines later, has no schema before this.
        self._adapter.rebuild()
        options: Any = dict(_JSON_OPTIONS)
        schema = _with_json_options(self._adapter.core_schema)
        # Prebuilt ones would be the model's own, which know nothing of these options.
        self._serializer = SchemaSerializer(schema, options, _use_prebuilt=False)
        self._validator = SchemaValidator(schema, options, _use_prebuilt=False)

    def encode(self, value: Any) -> tuple[str, Any]:
        try:
            data = self._serializer.to_json(value, warnings="error")
        except Exception:
            # Perhaps a mapping where a dataclass is wanted, or an int for a Decimal: take what validates.
            data = self._serializer.to_json(self._validator.validate_python(value), warnings="error")
        text = data.decode()
        return text, self._validator.validate_json(text)

    def decode(self, text: str) -> Any:
        return self._validator.validate_json(text)


_JSON_OPTIONS = {"ser_json_bytes": "base64", "val_json_bytes": "base64", "ser_json_inf_nan": "strings"}
_OWN_CONFIG = frozenset({"model", "dataclass", "typed-dict"})


def _with_json_options(schema: Any) -> Any:
    """The schema with base64 for bytes and faithful NaN everywhere, where its author chose nothing else.

    Models, dataclasses and typed dicts carry a configuration of their own, which hides the outer one.
    """
    match schema:
        case dict():
            if schema.get("type") == "union":
                _refuse_text_beside_bytes(schema["choices"])
            copy = {key: _with_json_options(part) for key, part in schema.items()}
            if schema.get("type") in _OWN_CONFIG:
                copy["config"] = {**_JSON_OPTIONS, **(schema.get("config") or {})}
            return copy
        case list():
            return [_with_json_options(part) for part in schema]
        case tuple():
            return tuple(_with_json_options(part) for part in schema)
        case _:
            return schema


def _refuse_text_beside_bytes(choices: Sequence[Any]) -> None:
    """Bytes are stored as base64: beside ``str``, the text "abcd" would come back as three bytes."""
    kinds = {choice["type"] for choice in choices if isinstance(choice, dict)}
    if {"str", "bytes"} <= kinds:
        raise TypeError("str and bytes in one union can't be told apart in JSON; choose one of them")


class ScalarCodec:
    """``float``, ``bool``, and the two below: exact values go straight through, others ask pydantic."""

    __slots__ = ("_annotation", "_lax")

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation
        self._lax: AdapterCodec | None = None

    def encode(self, value: Any) -> tuple[str, Any]:
        if type(value) is self._annotation and math.isfinite(value):
            return dump_plain(value), value
        return self._adapter().encode(value)

    def decode(self, text: str) -> Any:
        value = load_json(text)
        return value if type(value) is self._annotation else self._adapter().decode(text)

    def _adapter(self) -> AdapterCodec:
        if self._lax is None:
            self._lax = AdapterCodec(self._annotation)
        return self._lax


class TextCodec(ScalarCodec):
    """``str``."""

    __slots__ = ()

    def encode(self, value: Any) -> tuple[str, Any]:
        if type(value) is not str:
            return self._adapter().encode(value)
        text = encode_basestring(value)
        if not text.isascii():
            text.encode()
        return text, value


class IntCodec(ScalarCodec):
    """``int``."""

    __slots__ = ()

    def encode(self, value: Any) -> tuple[str, Any]:
        if type(value) is int:
            return str(value), value
        return self._adapter().encode(value)


_SCALARS: dict[type, type[ScalarCodec]] = {str: TextCodec, int: IntCodec}


class NoneCodec:
    """``-> None``: nothing else may be returned."""

    __slots__ = ()

    def encode(self, value: Any) -> tuple[str, Any]:
        if value is not None:
            raise TypeError(f"{value!r} where the annotation says None")
        return "null", None

    def decode(self, text: str) -> Any:
        del text


class MsgspecCodec:
    """Msgspec structs, alone or inside containers."""

    __slots__ = ("_annotation", "_msgspec")

    def __init__(self, annotation: Any) -> None:
        self._msgspec = sys.modules["msgspec"]
        self._annotation = annotation

    def encode(self, value: Any) -> tuple[str, Any]:
        text: str = self._msgspec.json.encode(value).decode()
        if "null" in text:
            # msgspec writes NaN and the infinities as null, which would come back as None: refuse them.
            dump_plain(self._msgspec.to_builtins(value, str_keys=True))
        return text, self.decode(text)

    def decode(self, text: str) -> Any:
        return self._msgspec.json.decode(text, type=self._annotation)


_ANYTHING = (Any, object, MISSING)


def codec_for(annotation: Any) -> Codec:
    """The codec for an annotation; made once, kept for good where the annotation is hashable.

    Raises:
        DefinitionError: nothing knows how to store values of this annotation.
    """
    try:
        return _cached_codec(annotation)
    except TypeError:
        return _make_codec(annotation)


@cache
def _cached_codec(annotation: Any) -> Codec:
    return _make_codec(annotation)


def _make_codec(annotation: Any) -> Codec:
    if annotation in _ANYTHING:
        return PlainCodec()
    if annotation is None or annotation is type(None):
        return NoneCodec()
    if annotation in (str, int, float, bool):
        return _SCALARS.get(annotation, ScalarCodec)(annotation)
    if annotation in (dict, list):
        return PlainCodec(annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is dict and arguments[0] is str and arguments[1] in _ANYTHING:
        return PlainCodec(dict)
    if origin is list and arguments[0] in _ANYTHING:
        return PlainCodec(list)
    if is_struct(annotation):
        return MsgspecCodec(annotation)
    try:
        return AdapterCodec(_with_own_typed_dicts(annotation))
    except Exception as error:
        if "msgspec" in sys.modules and _msgspec_takes(annotation):
            return MsgspecCodec(annotation)
        raise DefinitionError(
            f"values annotated {annotation!r} can't be stored as JSON: {error}. Use dataclasses, pydantic models, "
            f"msgspec structs, TypedDicts, enums, datetime, Decimal, UUID, bytes or plain JSON values"
        ) from error


def is_struct(annotation: Any) -> bool:
    """Whether this is a msgspec struct class; msgspec itself need not be installed."""
    msgspec = sys.modules.get("msgspec")
    return msgspec is not None and isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def _msgspec_takes(annotation: Any) -> bool:
    try:
        # A decoder would take any class and leave it to hooks; a schema shows what is really known.
        sys.modules["msgspec"].json.schema(annotation)
    except Exception:
        return False
    return True


def _with_own_typed_dicts(annotation: Any) -> Any:
    """Put ``typing_extensions.TypedDict`` in place of ``typing.TypedDict``, which pydantic refuses before 3.12."""
    if typing_extensions.is_typeddict(annotation):
        if sys.version_info >= (3, 12) or type(annotation).__module__ == "typing_extensions":
            return annotation
        hints = {
            key: _with_own_typed_dicts(hint)
            for key, hint in typing.get_type_hints(annotation, include_extras=True).items()
        }
        marked = {
            key: hint if key in annotation.__required_keys__ else typing_extensions.NotRequired[hint]
            for key, hint in hints.items()
        }
        make: Any = typing_extensions.TypedDict
        return make(annotation.__name__, marked)
    arguments = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    if not arguments or origin is typing.Literal or origin is collections.abc.Callable:
        return annotation
    changed = tuple(_with_own_typed_dicts(part) for part in arguments)
    if changed == arguments:
        return annotation
    if isinstance(annotation, types.UnionType):
        return typing.Union[changed]  # noqa: UP007  (made of values)
    return annotation.copy_with(changed) if hasattr(annotation, "copy_with") else origin[changed]


def is_object_shaped(annotation: Any) -> bool:
    """Whether every value of this annotation is stored as a JSON object (so it needs no parameter name)."""
    origin = typing.get_origin(annotation) or annotation
    if typing_extensions.is_typeddict(origin) or dataclasses.is_dataclass(origin) or is_struct(origin):
        return True
    if not isinstance(origin, type):
        return False
    if issubclass(origin, Mapping):
        return True
    pydantic = sys.modules.get("pydantic")
    return (
        pydantic is not None and issubclass(origin, pydantic.BaseModel) and not issubclass(origin, pydantic.RootModel)
    )


def check_size(what: str, texts: Sequence[str | None], limit: int) -> None:
    """Refuse texts that are together longer than ``limit`` bytes of UTF-8.

    Raises:
        PayloadTooLargeError: they are.
    """
    length = sum(len(text) for text in texts if text)
    if length * 4 <= limit:
        return
    size = sum(len(text.encode()) for text in texts if text)
    if size > limit:
        raise PayloadTooLargeError(
            f"{what} takes {size:,} bytes, more than the limit of {limit:,}. Store large data elsewhere and pass "
            f"a reference, or raise App(max_payload_bytes=…)"
        )
