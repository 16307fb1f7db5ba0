"""The parameters and the result of a workflow or activity: how one call is stored, and read back."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from json.encoder import encode_basestring
from typing import Any

from romancy.errors import DefinitionError, SerializationError
from romancy.serde import MISSING, Codec, codec_for, dump_plain, is_object_shaped, load_json


class Arguments:
    """The arguments of one call.

    Attributes:
        text: as stored.
        args: as the callee gets them, with ``kwargs``.
    """

    __slots__ = ("args", "kwargs", "text")

    def __init__(self, text: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.text = text
        self.args = args
        self.kwargs = kwargs

    def stored_as(self, text: str) -> Arguments:
        """The same, stored otherwise."""
        return Arguments(text, self.args, self.kwargs)


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
        self._encode: Callable[..., Arguments]
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
        self._encode = _encoder([(key, codec) for _, key, codec in codecs])
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
        if kwargs or not self._simple or len(args) != len(self._codecs):
            return self._encode_bound(args, kwargs)
        try:
            return self._encode(*args)
        except Exception as error:
            raise self._refusal(args, error) from error

    def _refusal(self, args: tuple[Any, ...], first: Exception) -> SerializationError:
        """Which of these can't be stored; if it's none at the second look, what was wrong with the first."""
        assert self._codecs is not None
        for (name, _, codec), value in zip(self._codecs, args, strict=True):
            try:
                codec.encode(value)
            except Exception as error:
                return self._argument_error(name, value, error)
        return SerializationError(f"{self.owner}: an argument can't be stored: {_brief(first)}")

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

    def encode_input(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
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
            return arguments.stored_as(self._default_text(name, codec)) if self._object_shaped else arguments
        bare = keyed[len(key) + 1 : -1]
        if self._object_shaped or (bare.startswith("{") and bare != "{}" and not _has_single_key(bare, name)):
            return arguments.stored_as(bare)
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

    def copy_arguments(self, arguments: Arguments) -> Arguments:
        """The same arguments, read from their stored form anew."""
        args, kwargs = self._decode_keyed(arguments.text)
        return Arguments(arguments.text, args, kwargs)

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


def _encoder(codecs: list[tuple[str, Codec]]) -> Callable[..., Arguments]:
    """Stores just so many values, by position, each with its key and by its codec.

    Written out, as dataclasses write their methods: it's needed for every step, and a loop takes 1.7 times as long.
    """
    known: dict[str, Any] = {"Arguments": Arguments, "NO_KWARGS": NO_KWARGS, "begin": "{", "end": "}"}
    text, copies, lines = "{begin}", "", []
    for number, (key, codec) in enumerate(codecs):
        known[f"encode_{number}"] = codec.encode
        known[f"key_{number}"] = f",{key}" if number else key
        lines.append(f"text_{number}, copy_{number} = encode_{number}(value_{number})")
        text += f"{{key_{number}}}{{text_{number}}}"
        copies += f"copy_{number}, "
    lines.append(f"return Arguments(f'{text}{{end}}', ({copies}), NO_KWARGS)")
    values = ", ".join(f"value_{number}" for number in range(len(codecs)))
    source = f"def encode({values}):\n " + "\n ".join(lines)
    exec(source, known)  # noqa: S102  # of numbers alone; no name or value of the user's is in it
    encode: Callable[..., Arguments] = known.pop("encode")  # or it would hold itself
    return encode


def _brief(error: Exception) -> str:
    """An error's text on one line; pydantic's are long."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:300] + " …"


def _has_single_key(text: str, name: str) -> bool:
    value = load_json(text)
    return isinstance(value, dict) and value.keys() == {name}
