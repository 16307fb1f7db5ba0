"""Instance ids: UUIDs of version 7, which sort by time."""

from __future__ import annotations

import os
import threading
import time

BLOCK_BYTES = 512


class IdSource:
    """Makes UUIDs of version 7 (RFC 9562, section 5.7) that also sort within one millisecond.

    The twelve bits after the time count up within a millisecond; the rest is random.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._random = b""
        self._process_id = 0

    def new_id(self) -> str:
        """A new id as text."""
        with self._lock:
            moment = time.time_ns() // 1_000_000 << 12
            moment = self._last = max(moment, self._last + 1)
            if not self._random or self._process_id != os.getpid():
                # Drawn in blocks, for each call costs; and anew after a fork, or two processes would share it.
                self._random, self._process_id = os.urandom(BLOCK_BYTES), os.getpid()
            random, self._random = self._random[:8], self._random[8:]
        millisecond, order = moment >> 12, moment & 0xFFF
        tail = int.from_bytes(random, "big") & 0x3FFF_FFFF_FFFF_FFFF | 0x8000_0000_0000_0000
        text = f"{millisecond:012x}7{order:03x}{tail:016x}"
        return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
