"""Hears from other processes that there is work; a thread with a connection of its own.

What it hears are hints: a lost one costs a few seconds, for workers look by themselves, too.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable

from romancy.storage.failures import is_driver_error
from romancy.storage.threads import Link

logger = logging.getLogger("romancy.storage")

RECONNECT_WAIT_S = 1.0


class Listener:
    """Waits for hints until it is stopped.

    Args:
        connect: makes a connection that is ready to hear.
        wait: blocks until a hint has come (``True``), or for a while (``False``).
        abort: makes a ``wait`` on this connection end, from another thread.
        on_hint: called from the listener's thread.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        wait: Callable[[Link], bool],
        abort: Callable[[Link], None],
        on_hint: Callable[[], None],
    ) -> None:
        self._connect = connect
        self._wait = wait
        self._abort = abort
        self._on_hint = on_hint
        self._is_stopped = threading.Event()
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name="romancy-listener", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more. Blocks until the thread has ended."""
        self._is_stopped.set()
        link = self._link
        if link is not None:
            with contextlib.suppress(Exception):
                self._abort(link)
        self._thread.join()

    def _run(self) -> None:
        while not self._is_stopped.is_set():
            try:
                self._link = self._connect()
                # First listen, then look: what came in between is found by that look.
                self._on_hint()
                while not self._is_stopped.is_set():
                    if self._wait(self._link):
                        self._on_hint()
            except Exception as error:
                if self._is_stopped.is_set():
                    break
                level = logging.INFO if is_driver_error(error) else logging.ERROR
                logger.log(level, "hints from other processes are not heard for a while: %s", error)
                self._is_stopped.wait(RECONNECT_WAIT_S)
            finally:
                self._close()

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(Exception):
                link.close()
