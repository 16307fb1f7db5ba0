"""Exceptions that the failure tests record; they stand in a module, so that replay finds them."""

from __future__ import annotations

from datetime import datetime

from romancy.errors import TerminalError


class CardDeclinedError(Exception):
    """Its ``__init__`` wants other arguments than it hands to ``Exception``."""

    def __init__(self, code: int, *, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


class UnreadableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


class StorageError(OSError):
    def __init__(self, errno: int, message: str, bucket: str) -> None:
        super().__init__(errno, message)
        self.bucket = bucket


class NewError(Exception):
    """Its ``__new__`` can't be called with what is in ``args``."""

    def __new__(cls, first: int, second: int) -> NewError:
        return super().__new__(cls, first, second)

    def __init__(self, first: int, second: int) -> None:
        super().__init__(first)
        self.second = second


class ReadOnlyPropertyError(Exception):
    @property
    def code(self) -> int:
        return int(self.args[0])


class BoundError(Exception):
    """Its text needs an attribute that is no JSON value."""

    def __init__(self, when: datetime) -> None:
        self.when = when

    def __str__(self) -> str:
        return f"bound until {self.when}"


class SoldOutError(TerminalError):
    pass


class Outer:
    class InnerError(ValueError):
        pass


class HiddenError(Exception):
    """The tests take this one out of the module."""
