"""What ties a worker process to the parent that started it: a socket that ends when the parent does."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from romancy.errors import ConfigurationError

Message = Literal["started", "failed"]


class Lifeline:
    """The child's end. Cut by the parent it asks this process to stop, and so it does when the parent is killed.

    Not a signal: an init system signals all processes of a service, and a second signal ends a worker at once.
    """

    def __init__(self, end: socket.socket) -> None:
        self._end = end
        self._stop: Callable[[], None] | None = None
        self._limit_s = 0.0
        threading.Thread(target=self._watch, name="romancy-lifeline", daemon=True).start()

    @classmethod
    def of_stdin(cls) -> Lifeline:
        """The one that the parent handed on as standard input, which is empty from then on.

        Raises:
            ConfigurationError: there is none.
        """
        try:
            end = socket.socket(fileno=os.dup(0))
        except OSError as error:
            raise ConfigurationError("--process is for what --processes starts: use that") from error
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        return cls(end)

    def when_cut(self, stop: Callable[[], None], limit_s: float) -> None:
        """Call this, from a thread, once the line is cut; whatever has not ended ``limit_s`` later is killed.

        A line that is cut earlier ends the process at once, for it has nothing to hand back.
        """
        self._limit_s = limit_s
        self._stop = stop

    def tell(self, message: Message, stop_s: float = 0.0) -> None:
        """Tell the parent; ``stop_s`` is how long this process may take to stop."""
        with suppress(OSError):
            self._end.sendall(json.dumps({"message": message, "stop_s": stop_s}).encode() + b"\n")

    def _watch(self) -> None:
        with suppress(OSError):
            while self._end.recv(64):
                pass
        if self._stop is not None:
            self._stop()
            time.sleep(self._limit_s)
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(0 if self._stop is None else 1)
