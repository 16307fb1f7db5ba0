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
from typing import Any, NamedTuple, Protocol

import typing_extensions

from romancy.errors import DefinitionError, PayloadTooLargeError, SerializationError

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
        kind = type(value)
        if kind is str:
            return check_text(encode_basestring(value)), value
        if self.container is not None and not isinstance(value, self.container):
            raise TypeError(f"{value!r} is no {self.container.__name__}")
        if value is None or kind is bool or kind is int or kind is float:
            return dump_plain(value), value
        try:
            text = check_text(dump_plain(value))
        except TypeError:
            _refuse_parts_that_json_changes(value, "the value")
            raise
        copy = load_json(text)
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
    """``str``, ``int``, ``float``, ``bool``: exact values go straight through, others ask pydantic."""

    __slots__ = ("_annotation", "_lax")

    def __init__(self, annotation: Any) -> None:
        self._annotation = annotation
        self._lax: AdapterCodec | None = None

    def encode(self, value: Any) -> tuple[str, Any]:
        kind = type(value)
        if kind is self._annotation:
            if kind is str:
                return check_text(encode_basestring(value)), value
            if kind is not float or math.isfinite(value):
                return dump_plain(value), value
        return self._adapter().encode(value)

    def decode(self, text: str) -> Any:
        value = load_json(text)
        return value if type(value) is self._annotation else self._adapter().decode(text)

    def _adapter(self) -> AdapterCodec:
        if self._lax is None:
            self._lax = AdapterCodec(self._annotation)
        return self._lax


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
        return ScalarCodec(annotation)
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


class Arguments(NamedTuple):
    """The arguments of one call: as stored, and as the callee gets them."""

    text: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


NO_KWARGS: dict[str, Any] = {}


class Signature:
    """The parameters and the result of one workflow or activity, with their codecs.

    Args:
        owner: how messages call it, for example ``activity 'charge'``.
        fn: the user's function.
        skip: how many leading parameters are not stored (a workflow's ``ctx``).
    """

    def __init__(self, owner: str, fn: Callable[..., Any], skip: int = 0) -> None:
        self.owner = owner
        self._fn = fn
        self._parameters = list(inspect.signature(fn).parameters.values())[skip:]
        self._signature = inspect.Signature(self._parameters)
        self._simple = all(p.kind is p.POSITIONAL_OR_KEYWORD for p in self._parameters)
        self._is_single = len(self._parameters) == 1 and self._parameters[0].kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        )
        self._codecs: list[tuple[str, str, Codec]] | None = None
        self._result: Codec | None = None
        self._object_shaped = False

    def resolve(self) -> None:
        """Read the annotations (late, so that they may name what is defined further down).

        Raises:
            DefinitionError: an annotation can't be resolved, or its values can't be stored.
        """
        if self._codecs is not None:
            return
        try:
            hints = typing.get_type_hints(self._fn, include_extras=True)
        except Exception as error:
            raise DefinitionError(
                f"{self.owner}: its annotations can't be resolved ({error}). They are read at the first use; "
                f"every name in them must exist in the module by then"
            ) from error
        codecs = []
        for parameter in self._parameters:
            hint = hints.get(parameter.name, MISSING)
            if parameter.kind is parameter.VAR_POSITIONAL:
                hint = list if hint is MISSING else types.GenericAlias(list, (hint,))
            elif parameter.kind is parameter.VAR_KEYWORD:
                hint = dict if hint is MISSING else types.GenericAlias(dict, (str, hint))
            codecs.append((parameter.name, encode_basestring(parameter.name) + ":", self._codec(hint, parameter.name)))
        self._result = self._codec(hints.get("return", MISSING), "its result")
        if self._is_single:
            self._object_shaped = is_object_shaped(hints.get(self._parameters[0].name, MISSING))
        self._codecs = codecs

    def _codec(self, hint: Any, what: str) -> Codec:
        try:
            return codec_for(hint)
        except DefinitionError as error:
            raise DefinitionError(f"{self.owner}, {what}: {error}") from error

    def encode_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Store the arguments as an object keyed by parameter name.

        Raises:
            SerializationError: a value can't be stored; names the argument and the type.
            TypeError: the call does not fit the function's parameters.
        """
        if self._codecs is None:
            self.resolve()
        assert self._codecs is not None
        if self._simple and not kwargs and len(args) == len(self._codecs):
            return self._encode_positional(args)
        return self._encode_bound(args, kwargs)

    def _encode_positional(self, args: tuple[Any, ...]) -> Arguments:
        texts: list[str] = []
        copies: list[Any] = []
        assert self._codecs is not None
        for (name, key, codec), value in zip(self._codecs, args, strict=True):
            try:
                text, copy = codec.encode(value)
            except Exception as error:
                raise self._argument_error(name, value, error) from error
            texts.append(key + text)
            copies.append(copy)
        return Arguments("{" + ",".join(texts) + "}", tuple(copies), NO_KWARGS)

    def _encode_bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.owner}: {error}; its parameters are {self._signature}") from None
        texts: list[str] = []
        assert self._codecs is not None
        for name, key, codec in self._codecs:
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL:
                value = list(value)
            try:
                text, copy = codec.encode(value)
            except Exception as error:
                raise self._argument_error(name, value, error) from error
            bound.arguments[name] = copy
            texts.append(key + text)
        return Arguments("{" + ",".join(texts) + "}", bound.args, bound.kwargs)

    def encode_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """The text that :meth:`store_input` stores."""
        return self.store_input(args, kwargs).text

    def store_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
        """Store a workflow's input: one structured input as itself, all else keyed by parameter name.

        One value whose annotation does not say that it is an object (``Any``, a union) is stored as itself
        when it is an object, save where that object could be taken for the keyed form.
        """
        arguments = self.encode_arguments(args, kwargs)
        assert self._codecs is not None
        if not self._is_single:
            return arguments
        keyed = arguments.text
        name, key, codec = self._codecs[0]
        if keyed == "{}":
            # Left to its default. An object as such reads like an empty one, so that the default must be stored.
            return arguments._replace(text=self._default_text(name, codec)) if self._object_shaped else arguments
        bare = keyed[len(key) + 1 : -1]
        if self._object_shaped or (bare.startswith("{") and bare != "{}" and not _has_single_key(bare, name)):
            return arguments._replace(text=bare)
        return arguments

    def _default_text(self, name: str, codec: Codec) -> str:
        default = self._parameters[0].default
        try:
            return codec.encode(default)[0]
        except Exception as error:
            raise self._argument_error(name, default, error) from error

    def decode_input(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that a stored input stands for.

        Raises:
            SerializationError: it does not fit the parameters.
        """
        if self._codecs is None:
            self.resolve()
        assert self._codecs is not None
        if self._is_single:
            name, _, codec = self._codecs[0]
            if self._object_shaped or not (text == "{}" or _has_single_key(text, name)):
                value = self._decode(codec, text, f"input {name!r}")
                is_keyword = self._parameters[0].kind is inspect.Parameter.KEYWORD_ONLY
                return ((), {name: value}) if is_keyword else ((value,), {})
        return self._decode_keyed(text)

    def _decode_keyed(self, text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        try:
            stored = load_json(text)
        except ValueError as error:
            raise SerializationError(f"{self.owner}: the stored input is no JSON: {error}") from error
        if not isinstance(stored, dict):
            raise SerializationError(
                f"{self.owner}: the input must be an object keyed by parameter name, not {text[:80]}"
            )
        bound = self._signature.bind_partial()
        assert self._codecs is not None
        for name, _, codec in self._codecs:
            if name in stored:
                value = self._decode(codec, dump_plain(stored.pop(name)), f"input {name!r}")
                bound.arguments[name] = value
        if stored:
            raise SerializationError(f"{self.owner} has no parameter {sorted(stored)[0]!r}; it takes {self._signature}")
        try:
            self._signature.bind(*bound.args, **bound.kwargs)
        except TypeError as error:
            raise SerializationError(f"{self.owner}: the stored input does not fit: {error}") from None
        return bound.args, bound.kwargs

    def encode_result(self, value: Any) -> tuple[str, Any]:
        """Store a result.

        Raises:
            SerializationError: it can't be stored; names its type.
        """
        if self._result is None:
            self.resolve()
        assert self._result is not None
        try:
            return self._result.encode(value)
        except Exception as error:
            raise SerializationError(
                f"{self.owner}: its result of type {type(value).__name__} can't be stored: {_brief(error)}. "
                f"Return what the annotation says (an annotation makes dataclasses, dates and the like possible)"
            ) from error

    def decode_result(self, text: str) -> Any:
        """The result that a stored text stands for."""
        if self._result is None:
            self.resolve()
        assert self._result is not None
        return self._decode(self._result, text, "result")

    def _decode(self, codec: Codec, text: str, what: str) -> Any:
        try:
            return codec.decode(text)
        except Exception as error:
            raise SerializationError(
                f"{self.owner}: the {what} {text[:80]} does not fit its annotation: {_brief(error)}. "
                f"Let the annotation take it, then resume the instance"
            ) from error

    def same_arguments(self, stored: str, text: str) -> bool:
        """Whether two stored arguments mean the same, whatever the order of a set's or a mapping's parts."""
        if stored == text:
            return True
        try:
            return self._decode_keyed(stored) == self._decode_keyed(text)
        except SerializationError:
            return False

    def _argument_error(self, name: str, value: Any, error: Exception) -> SerializationError:
        return SerializationError(
            f"{self.owner}: argument {name!r} of type {type(value).__name__} can't be stored: {_brief(error)}. "
            f"Pass what the annotation says (an annotation makes dataclasses, dates and the like possible)"
        )


def _brief(error: Exception) -> str:
    """An error's text on one line; pydantic's are long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"


def _has_single_key(text: str, name: str) -> bool:
    value = load_json(text)
    return isinstance(value, dict) and value.keys() == {name}


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
