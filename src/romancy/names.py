"""What the database can hold as a name or an id."""

from __future__ import annotations

from typing import Any

from romancy.errors import ConfigurationError

MAX_NAME = 200


def is_name(text: Any) -> bool:
    """Whether it can be one: a text that is not too long, without control characters."""
    return isinstance(text, str) and 1 <= len(text) <= MAX_NAME and not _holds_control(text)


def plain(name: str) -> str:
    """The very text, also of an enum or the like, which may say something else of itself."""
    return str.__str__(name)


def checked_name(what: str, name: Any, *, may_be_empty: bool = False) -> str:
    """A name of the user's, as a plain text.

    Raises:
        ConfigurationError: it can be none.
    """
    if may_be_empty and name is None:
        return ""
    if not isinstance(name, str) or not 1 <= len(name) <= MAX_NAME:
        raise ConfigurationError(f"{what}={name!r}: give a text of 1 to {MAX_NAME} characters")
    if _holds_control(name):
        raise ConfigurationError(f"{what}={name!r} holds a control character: leave it out")
    return plain(name)


def _holds_control(text: str) -> bool:
    return any(ord(char) < 32 or 0xD800 <= ord(char) <= 0xDFFF for char in text)
