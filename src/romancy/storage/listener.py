"""Hears from other processes that there is work; a thread with a connection of its own.

What it hears are hints: a lost one costs a few seconds, for workers look by themselves, too. A listener that hears
nothing at all, for a pooler has taken its ear away or its connection is dead without a word, finds that out by calling
to itself now and then.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from uuid import uuid4

from romancy.storage.failures import is_driver_error
from romancy.storage.threads import Link

logger = logging.getLogger("romancy.storage")

RECONNECT_WAIT_S = 1.0
LONGEST_STOP_S = 2.0
CALL_INTERVAL_S = 60.0
LONGEST_ECHO_S = 5.0
LONGEST_WAIT_S = 20.0
LOOKS_AN_ECHO = 10

HINT = ""
"""What a hint says; anything else is somebody's call to itself."""


@dataclass(frozen=True, slots=True)
class SelfTest:
    """How a listener finds out whether it hears.

    Attributes:
        call: says this to all listeners, over another connection; the future tells when it is said.
        warning: what to log, once, when the listener does not hear itself.
    """

    call: Callable[[str], Future[None]]
    warning: str


class DeafError(Exception):
    """A connection that has heard before hears no more."""


class Listener:
    """Waits for hints until it is stopped.

    Args:
        connect: makes a connection that is ready to hear.
        wait: blocks until something is heard, and says what; or for about so many seconds (``None``).
        abort: makes a ``wait`` on this connection end, from another thread.
        on_hint: called from the listener's thread.
        self_test: by default, whether it hears is not put to the test.

    Attributes:
        is_deaf: it did not hear its own call: others' hints don't come through either.
    """

    def __init__(
        self,
        connect: Callable[[], Link],
        wait: Callable[[Link, float], str | None],
        abort: Callable[[Link], None],
        on_hint: Callable[[], None],
        self_test: SelfTest | None = None,
    ) -> None:
        self._connect = connect
        self._wait = wait
        self._abort = abort
        self._on_hint = on_hint
        self._self_test = self_test
        self.is_deaf = False
        self._is_warned = False
        self._has_heard = False
        self._word = ""
        self._called_at = 0.0
        self._call: Future[None] | None = None
        self._said_at: float | None = None
        self._is_stopped = threading.Event()
        self._link: Link | None = None
        self._thread = threading.Thread(target=self._run, name="romancy-listener", daemon=True)

    def start(self) -> None:
        """Begin to listen."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more. Blocks until the thread has ended; not for long, if it can't, for it is connecting."""
        self._is_stopped.set()
        link = self._link
        if link is not None:
            with contextlib.suppress(Exception):
                self._abort(link)
        self._thread.join(LONGEST_STOP_S)

    def _run(self) -> None:
        while not self._is_stopped.is_set():
            try:
                self._link = self._connect()
                # First listen, then look: what came in between is found by that look.
                self._on_hint()
                self._begin_test()
                while not self._is_stopped.is_set():
                    self._hear(self._wait(self._link, self._wait_s()))
            except DeafError as error:
                logger.info("%s", error)
            except Exception as error:
                if self._is_stopped.is_set():
                    break
                level = logging.INFO if is_driver_error(error) else logging.ERROR
                logger.log(level, "hints from other processes are not heard for a while: %s", error)
                self._is_stopped.wait(RECONNECT_WAIT_S)
            finally:
                self._close()

    def _hear(self, said: str | None) -> None:
        if said == HINT:
            self._on_hint()
        if self._self_test is not None:
            self._go_on_testing(self._self_test, said)

    def _wait_s(self) -> float:
        if self._self_test is None:
            return LONGEST_WAIT_S
        if self._call is not None:
            return LONGEST_ECHO_S / LOOKS_AN_ECHO
        return min(max(self._called_at + CALL_INTERVAL_S - time.monotonic(), 0.0), LONGEST_WAIT_S)

    # -- the self-test -----------------------------------------------------------------------------

    def _begin_test(self) -> None:
        self._has_heard = False
        self._call = None
        self._called_at = -CALL_INTERVAL_S

    def _go_on_testing(self, test: SelfTest, said: str | None) -> None:
        now = time.monotonic()
        if self._call is None:
            if now - self._called_at >= CALL_INTERVAL_S:
                self._word, self._called_at, self._said_at = uuid4().hex, now, None
                self._call = test.call(self._word)
                self._call.add_done_callback(self._on_said)
        elif said == self._word:
            self._call = None
            self._has_heard = True
            if self.is_deaf:
                logger.info("hints from other processes are heard again")
            self.is_deaf = False
        elif self._call.done() and self._call.exception() is not None:
            self._call = None  # nobody has said anything; the next call will tell
        elif self._said_at is not None and now - self._said_at > LONGEST_ECHO_S:
            self._call = None
            self._on_silence(test)

    def _on_said(self, call: Future[None]) -> None:
        if call is self._call:
            self._said_at = time.monotonic()

    def _on_silence(self, test: SelfTest) -> None:
        if self._has_heard:
            raise DeafError("the connection that hears hints is dead; making another one")
        self.is_deaf = True
        if not self._is_warned:
            self._is_warned = True
            logger.warning("%s", test.warning)

    def _close(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            with contextlib.suppress(Exception):
                link.close()
