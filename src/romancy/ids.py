"""Instance ids: UUIDs of version 7, which sort by time."""

from __future__ import annotations

import os
import threading
import time

BLOCK = 64
"""Random parts that are drawn together, for each draw costs."""


class IdSource:
    """Makes UUIDs of version 7 (RFC 9562, section 5.7) that also sort within one millisecond.

    The twelve bits after the time count up within a millisecond; the rest is random.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._millisecond = -1
        self._head = ""
        self._tails: list[str] = []
        self._process_id = 0

    def new_id(self) -> str:
        """A new id as text."""
        with self._lock:
            moment = time.time_ns() // 1_000_000 << 12
            if moment <= self._last:
                moment = self._last + 1
            self._last = moment
            millisecond = moment >> 12
            if millisecond != self._millisecond:
                self._millisecond = millisecond
                self._head = f"{millisecond >> 16:08x}-{millisecond & 0xFFFF:04x}-7"
            if not self._tails or self._process_id != os.getpid():
                # Anew after a fork, or two processes would share them. Not every fork runs Python's hooks.
                self._tails, self._process_id = _draw(), os.getpid()
            return f"{self._head}{moment & 0xFFF:03x}-{self._tails.pop()}"


def _draw() -> list[str]:
    """The last two groups of some ids, of 62 random bits each."""
    digits = os.urandom(8 * BLOCK).hex()
    return [
        f"{'89ab'[int(digits[at], 16) & 3]}{digits[at + 1 : at + 4]}-{digits[at + 4 : at + 16]}"
        for at in range(0, 16 * BLOCK, 16)
    ]
