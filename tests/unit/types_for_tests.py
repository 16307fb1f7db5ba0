"""Structured types that the serialisation tests store; they stand in a module, so that annotations find them."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import typing
from decimal import Decimal
from uuid import UUID

import msgspec
import pydantic
import typing_extensions


class Colour(enum.Enum):
    RED = "red"
    TWO = 2


class Level(enum.IntEnum):
    LOW = 1


class Shape(enum.StrEnum):
    ROUND = "round"


class Right(enum.Flag):
    READ = 1
    WRITE = 2


@dataclasses.dataclass
class Line:
    sku: str
    price: Decimal
    note: bytes = b""


@dataclasses.dataclass
class Order:
    order_id: UUID
    lines: list[Line]
    placed_at: dt.datetime
    colour: Colour = Colour.RED
    tags: frozenset[str] = frozenset()
    weight: float = 0.0
    parent: Order | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Point:
    x: int = 0
    y: int = 0


@dataclasses.dataclass
class Wrapped:
    """Its only field is named as the parameter that takes it."""

    order: dict[str, int]


class Account(pydantic.BaseModel):
    name: str
    key: bytes = b""
    ratio: float = 0.0
    opened: dt.date | None = None
    owner: Point | None = None


class Deferred(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(defer_build=True)

    key: bytes


class OwnChoice(pydantic.BaseModel):
    """Its author chose how bytes are written."""

    model_config = pydantic.ConfigDict(ser_json_bytes="hex", val_json_bytes="hex")

    key: bytes


class Struct(msgspec.Struct):
    count: int
    key: bytes = b""
    ratio: float | None = None
    inner: Struct | None = None


class PlainTypedDict(typing.TypedDict, total=False):
    name: typing.Required[str]
    key: bytes


class ExtendedTypedDict(typing_extensions.TypedDict):
    point: Point
    parts: typing_extensions.NotRequired[list[PlainTypedDict]]


class Pair(typing.NamedTuple):
    left: int
    right: bytes
