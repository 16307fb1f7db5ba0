"""What events, messages and outcomes of children look like on their way: JSON objects, made and read here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from romancy.errors import SerializationError, text_of
from romancy.model import Event, Message, from_micros, to_micros
from romancy.serde import PlainCodec, codec_for, load_json

T = TypeVar("T")

_plain = PlainCodec()
_CONTAINERS = (dict, list, tuple, set, frozenset)


class EventHead(NamedTuple):
    """The attributes of an event beside its data; times in microseconds since the epoch."""

    type: str
    source: str
    id: str
    subject: str
    time_us: int
    extensions: Mapping[str, Any]


def encode_data(what: str, value: Any) -> str:
    """A value of any type that Romancy can store, as JSON text.

    Raises:
        SerializationError: it can't be stored; names ``what`` and the type.
    """
    try:
        try:
            return _plain.encode(value)[0]
        except TypeError:
            if type(value) in _CONTAINERS:
                from pydantic_core import to_json  # noqa: PLC0415  (plain values never need it)

                return to_json(value, bytes_mode="base64", inf_nan_mode="strings").decode()
            return codec_for(type(value)).encode(value)[0]
    except Exception as error:
        raise SerializationError(
            f"{what} of type {type(value).__name__} can't be stored as JSON: {text_of(error)}"
        ) from error


def decode_data(what: str, text: str, annotation: Any) -> Any:
    """The value that a text stands for, as the annotation says.

    Raises:
        SerializationError: it is no such value.
    """
    if annotation is None:
        return load_json(text)
    try:
        return codec_for(annotation).decode(text)
    except Exception as error:
        raise SerializationError(f"{what} does not fit type={annotation!r}: {text_of(error)}") from error


def event_body(head: EventHead, data: str) -> str:
    """The text of an event; its data are JSON text already."""
    attributes = json.dumps([*head[:5], dict(head.extensions)], ensure_ascii=False, separators=(",", ":"))
    return f"[{attributes},{data}]"


def read_event(body: str, annotation: Any) -> Event[Any]:
    """The event of a text.

    Raises:
        SerializationError: its data do not fit the annotation.
    """
    (kind, source, event_id, subject, time_us, extensions), data = load_json(body)
    value = data if annotation is None else decode_data(f"the data of event {kind!r}", json.dumps(data), annotation)
    return Event(kind, source, event_id, subject or None, from_micros(time_us), value, extensions)


def event_digest(head: EventHead) -> str:
    """The same for the same source and id; CloudEvents says that such events are one
    (https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/spec.md#id)."""
    return hashlib.sha256(f"{head.source}\0{head.id}".encode()).hexdigest()


def message_body(
    message_id: str, channel: str, data: str, metadata: Mapping[str, Any] | None, sender: str | None, sent_us: int
) -> str:
    """The text of a message; its data are JSON text already."""
    beside = encode_data("the metadata of a message", dict(metadata or {}))
    attributes = json.dumps([message_id, channel, sender, sent_us], ensure_ascii=False, separators=(",", ":"))
    return f"[{attributes},{beside},{data}]"


def read_message(body: str, annotation: Any) -> Message[Any]:
    """The message of a text.

    Raises:
        SerializationError: its data do not fit the annotation.
    """
    (message_id, channel, sender, sent_us), metadata, data = load_json(body)
    if annotation is not None:
        data = decode_data(f"the data of a message of channel {channel!r}", json.dumps(data), annotation)
    return Message(message_id, channel, data, metadata, sender, from_micros(sent_us))


def checked_time(time: datetime | None, now_us: int) -> int:
    """A time of the user's in microseconds since the epoch; now, if there is none.

    Raises:
        ValueError: it has no time zone.
    """
    return now_us if time is None else to_micros(time)
