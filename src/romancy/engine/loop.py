"""The deterministic event loop that workflow code runs on.

One loop an instance: a queue of ready callbacks, and timers that the instance makes durable. No I/O, no
threads, no clock of its own. The engine runs it from a plain callback of the worker's real loop: deliver one
recorded completion, run until nothing is ready, look at what the code asked for. Tasks and futures are
asyncio's own, so everything built from them (gather, TaskGroup, timeout, queues, locks) replays exactly.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from asyncio import _set_running_loop  # documented for implementers of event loops
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context, copy_context
from typing import Any, NoReturn, Protocol
from zlib import crc32

from romancy.definitions import RUNNING, WorkflowHost
from romancy.errors import ForbiddenInWorkflowError

logger = logging.getLogger("romancy.workflow")

MAX_CALLBACKS_PER_STEP = 1_000_000
"""After so many callbacks without waiting for anything recorded, the code is taken to be in an endless loop."""

LATEST_S = 1e12
"""Beyond all dates: an endless timeout is one until then."""

ORDER_BITS = 12
"""Low bits of a task's hash; sets of fewer tasks are walked in the order in which these were made."""


class ReadyCallback:
    """What ``call_soon`` returns: a callback that may be cancelled."""

    __slots__ = ("args", "callback", "context")

    def __init__(self, callback: Callable[..., Any], args: tuple[Any, ...], context: Context | None) -> None:
        self.callback: Callable[..., Any] | None = callback
        self.args = args
        self.context = copy_context() if context is None else context

    def cancel(self) -> None:
        self.callback = None
        self.args = ()

    def cancelled(self) -> bool:
        return self.callback is None


class LoopHost(WorkflowHost, Protocol):
    """What the loop needs from the instance that it runs."""

    instance_id: str

    def workflow_time_us(self) -> int:
        """The time of the last delivered event, in microseconds since the epoch."""
        ...

    def add_timer(self, deadline_us: int, callback: ReadyCallback) -> TimerCallback:
        """Ask for a durable timer."""
        ...

    def cancel_timer(self, operation: Any) -> None:
        """The code no longer waits for this timer."""
        ...


class TimerCallback:
    """What ``call_later`` and ``call_at`` return: a durable timer of the workflow.

    Args:
        host: the instance.
        deadline_us: when it is due, microseconds since the epoch.
        ready: what runs then.
        operation: the instance's own record of this timer; it doesn't know of this object, or they would form a cycle.
    """

    __slots__ = ("_deadline_us", "_host", "_operation", "_ready")

    def __init__(self, host: LoopHost, deadline_us: int, ready: ReadyCallback, operation: Any) -> None:
        self._host = host
        self._deadline_us = deadline_us
        self._ready = ready
        self._operation = operation

    def when(self) -> float:
        return self._deadline_us / 1_000_000

    def cancel(self) -> None:
        if not self._ready.cancelled():
            self._ready.cancel()
            self._host.cancel_timer(self._operation)

    def cancelled(self) -> bool:
        return self._ready.cancelled()

    def __repr__(self) -> str:
        return f"<workflow timer at {self.when()}>"


_CURES = {
    "run_in_executor": "threads (asyncio.to_thread, run_in_executor)",
    "set_default_executor": "threads",
    "call_soon_threadsafe": "calls from other threads",
    "subprocess_exec": "subprocesses",
    "subprocess_shell": "subprocesses",
    "add_signal_handler": "signal handlers",
    "remove_signal_handler": "signal handlers",
    "getaddrinfo": "name resolution",
    "getnameinfo": "name resolution",
    "create_connection": "network connections",
    "create_datagram_endpoint": "network connections",
    "create_server": "servers",
    "create_unix_connection": "network connections",
    "create_unix_server": "servers",
    "connect_accepted_socket": "network connections",
    "start_tls": "network connections",
    "sendfile": "file transfers",
    "sock_sendfile": "file transfers",
    "connect_read_pipe": "pipes",
    "connect_write_pipe": "pipes",
    "add_reader": "file descriptors",
    "remove_reader": "file descriptors",
    "add_writer": "file descriptors",
    "remove_writer": "file descriptors",
    "sock_recv": "sockets",
    "sock_recv_into": "sockets",
    "sock_recvfrom": "sockets",
    "sock_recvfrom_into": "sockets",
    "sock_sendall": "sockets",
    "sock_sendto": "sockets",
    "sock_connect": "sockets",
    "sock_accept": "sockets",
    "set_exception_handler": "exception handlers",
    "set_task_factory": "task factories",
    "get_task_factory": "task factories",
    "run_forever": "running the loop",
    "run_until_complete": "running the loop",
    "stop": "stopping the loop",
    "close": "closing the loop",
}


def caller_location() -> str | None:
    """``file:line`` of the nearest caller outside asyncio and this package."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(("asyncio", "romancy.", "contextlib", "concurrent")):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        if frame.f_back is None:
            return None
        frame = frame.f_back
    return None


def _refusal(method: str, what: str) -> Callable[..., NoReturn]:
    def refuse(self: asyncio.AbstractEventLoop, *args: Any, **kwargs: Any) -> NoReturn:
        del self, args, kwargs
        place = caller_location()
        raise ForbiddenInWorkflowError(
            f"workflow code must not use {what}{f' ({place})' if place else ''}: it runs again on every replay. "
            f"Do this in an activity, and await the activity in the workflow"
        )

    refuse.__name__ = method
    return refuse


class _RefusingLoop(asyncio.AbstractEventLoop):
    """Says no to everything that can't be replayed."""


for _method, _what in _CURES.items():
    setattr(_RefusingLoop, _method, _refusal(_method, _what))


class WorkflowTask(asyncio.Task[Any]):
    """A task whose hash is its number, so that sets of tasks are walked in the same order on every replay.

    ``TaskGroup`` cancels its tasks in the order of a set; by address, that order would differ from run to run.
    Each instance counts from another number, for asyncio keeps all tasks of the process in one set; the low bits
    count from zero in all of them, so that a set of tasks is walked in the order in which they were made.
    """

    def __init__(
        self, number: int, coro: Any, loop: asyncio.AbstractEventLoop, name: str, context: Context | None
    ) -> None:
        self._number = number
        super().__init__(coro, loop=loop, name=name, context=context)

    def __hash__(self) -> int:
        return self._number


def _refuse_unordered_start(coroutine: Any) -> None:
    """``as_completed`` puts coroutines into a set and begins them in its order, which is that of addresses."""
    frame = sys._getframe(2)
    if frame.f_code.co_name not in ("ensure_future", "_ensure_future"):
        return
    for _ in range(4):
        if frame.f_back is None:
            return
        frame = frame.f_back
        if frame.f_code is asyncio.as_completed.__code__:
            break
    else:
        return
    if getattr(coroutine, "__name__", "") != "_await_activity":
        coroutine.close()
        raise ForbiddenInWorkflowError(
            "asyncio.as_completed begins coroutines in an order that differs from run to run: give it activities, or "
            "tasks made in order, such as [asyncio.create_task(step(x)) for x in items]"
        )


class WorkflowLoop(_RefusingLoop):
    """The event loop of one workflow instance.

    Args:
        host: the instance; activities called on this loop go there.
        outer: the real loop, whose callbacks run this one.

    Attributes:
        is_discarded: it runs no more; what its tasks still ask for is not wanted.
    """

    def __init__(self, host: LoopHost, outer: asyncio.AbstractEventLoop) -> None:
        self.workflow_host: LoopHost = host
        self._outer = outer
        self._hooks: tuple[None, Callable[[Any], None] | None] = (None, self._finalize_asyncgen)
        self.tasks: list[asyncio.Task[Any]] = []
        self._ready: deque[ReadyCallback] = deque()
        self._prune_at = 16
        self._last_number = crc32(host.instance_id.encode()) << ORDER_BITS
        self.is_discarded = False

    # -- driven by the engine ----------------------------------------------------------------------

    def run_ready(self) -> None:
        """Run callbacks until none is ready.

        Raises:
            ForbiddenInWorkflowError: they never come to an end.
        """
        ready = self._ready
        outer = self._outer
        hooks = sys.get_asyncgen_hooks()
        _set_running_loop(self)
        RUNNING.host = self.workflow_host
        sys.set_asyncgen_hooks(*self._hooks)
        budget = MAX_CALLBACKS_PER_STEP
        try:
            while ready:
                callback = ready.popleft()
                if callback.callback is not None:
                    try:
                        callback.context.run(callback.callback, *callback.args)
                    except SystemExit:
                        logger.warning("workflow code called sys.exit() in a task; taken as its failure")
                    except KeyboardInterrupt:
                        raise
                    except BaseException as error:
                        self.call_exception_handler(
                            {"message": f"a callback raised: {callback.callback!r}", "exception": error}
                        )
                budget -= 1
                if budget == 0:
                    ready.clear()
                    raise ForbiddenInWorkflowError(
                        f"the workflow ran {MAX_CALLBACKS_PER_STEP:,} callbacks without waiting for an activity, a "
                        f"timer or a message: it loops without end. Wait for something durable in the loop, such as "
                        f"asyncio.sleep(1)"
                    )
        finally:
            sys.set_asyncgen_hooks(*hooks)
            RUNNING.host = None
            _set_running_loop(outer)

    def make_ready(self, callback: ReadyCallback) -> None:
        """Queue a timer's callback once its firing is recorded."""
        self._ready.append(callback)

    def discard(self) -> None:
        """End all tasks without letting them ask for anything more; their results are not wanted.

        Python closes a suspended coroutine by raising ``GeneratorExit`` in it, so ``finally`` blocks run; they
        are cut off at their first ``await`` or call into the loop.
        """
        self.is_discarded = True
        self._ready.clear()
        pending = [task for task in self.tasks if not task.done()]
        if pending:
            _set_running_loop(self)
            RUNNING.host = self.workflow_host
            try:
                for task in pending:
                    _close(task)
            finally:
                RUNNING.host = None
                _set_running_loop(self._outer)
        self._ready.clear()
        self.tasks.clear()
        self._hooks = (None, None)  # they hold this loop
        del self.workflow_host

    def _finalize_asyncgen(self, agen: Any) -> None:
        if not self.is_discarded:
            self.create_task(agen.aclose())

    # -- used by asyncio ---------------------------------------------------------------------------

    def call_soon(  # type: ignore[override]  # typeshed wants TypeVarTuples here
        self, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        ready = ReadyCallback(callback, args, context)
        self._ready.append(ready)
        return ready

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        host = self.workflow_host
        deadline_us = host.workflow_time_us() + max(0, round(min(delay, LATEST_S) * 1_000_000))
        return host.add_timer(deadline_us, ReadyCallback(callback, args, context))

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., Any], *args: Any, context: Context | None = None
    ) -> Any:
        deadline_us = round(min(when, LATEST_S) * 1_000_000)
        return self.workflow_host.add_timer(deadline_us, ReadyCallback(callback, args, context))

    def time(self) -> float:
        return self.workflow_host.workflow_time_us() / 1_000_000

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self, coro: Any, *, name: str | None = None, context: Context | None = None, **_options: Any
    ) -> asyncio.Task[Any]:
        if self.is_discarded:
            coro.close()
            raise GeneratorExit
        _refuse_unordered_start(coro)
        return self.begin_task(coro, name or "workflow", context)

    def begin_task(self, coro: Any, name: str, context: Context | None) -> asyncio.Task[Any]:
        """Begin a task of this loop, from wherever."""
        self._last_number += 1
        task = WorkflowTask(self._last_number, coro, self, name, context)
        if len(self.tasks) >= self._prune_at:
            self.tasks = [known for known in self.tasks if not known.done()]
            self._prune_at = max(16, 2 * len(self.tasks))
        self.tasks.append(task)
        return task

    def get_debug(self) -> bool:
        return False

    def set_debug(self, enabled: bool) -> None:
        pass

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return self.is_discarded

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self.is_discarded:
            error = context.get("exception")
            logger.error("in workflow code: %s", context.get("message"), exc_info=error)

    def default_exception_handler(self, context: dict[str, Any]) -> None:
        self.call_exception_handler(context)

    def get_exception_handler(self) -> None:
        return None

    async def shutdown_asyncgens(self) -> None:
        pass

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        del timeout


_LET_GO: Callable[..., None] | None = getattr(asyncio, "future_discard_from_awaited_by", None)
"""From Python 3.14 on a future also knows by whom it is awaited, for pictures of who waits for whom."""


def _close(task: asyncio.Task[Any]) -> None:
    """Close a pending task's coroutine, silently."""
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    coroutine: Any = task.get_coro()
    awaited: asyncio.Future[Any] | None = getattr(task, "_fut_waiter", None)
    try:
        coroutine.close()
    except BaseException:
        logger.debug("workflow code objected to being discarded", exc_info=True)
    if awaited is not None:
        # They hold each other: a future that is over lets go of who waits for it.
        awaited.cancel()
        if _LET_GO is not None:
            _LET_GO(awaited, task)


RUN_READY_CODE = WorkflowLoop.run_ready.__code__
"""Where the engine ends and workflow code begins, on the stack."""


def make_loop(host: LoopHost, outer: asyncio.AbstractEventLoop) -> WorkflowLoop:
    """A loop for one instance, run by the loop ``outer``."""
    kind: Any = WorkflowLoop  # type checkers don't see the methods that _RefusingLoop got by setattr
    loop: WorkflowLoop = kind(host, outer)
    return loop


def start_task(loop: WorkflowLoop, coroutine: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
    """The main task of a workflow, in a context of its own."""
    return loop.begin_task(coroutine, name, Context())
