"""Runs attempts of activities: starts them, bounds them, and hands their outcome to the instance."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import Context, copy_context
from functools import partial
from random import Random
from threading import Thread
from typing import Any, Protocol

from sqlalchemy.exc import DBAPIError, IntegrityError

from romancy.context import CURRENT_ACTIVITY, ActivityContext
from romancy.engine.attempt import Attempt, SendingHost
from romancy.engine.instance import LiveInstance, exhausted
from romancy.engine.operations import ActivityOperation
from romancy.errors import (
    ActivityTimeoutError,
    DatabaseError,
    FencedError,
    PacketTooLargeError,
    RomancyError,
    SerializationError,
    TerminalError,
)
from romancy.serde import check_size
from romancy.storage.failures import HistoryConflictError, database_error, is_lost
from romancy.storage.mail import Post
from romancy.storage.rows import HistoryRow
from romancy.storage.sessions import (
    LONG_TRANSACTION_S,
    ActivityTransaction,
    CommitUnsureError,
    SessionEngines,
)
from romancy.storage.writer import Writer

logger = logging.getLogger("romancy.engine")

DATABASE_RETRY_WAIT_S = 0.1
LONGEST_ENDING_S = 5.0


class RunnerHost(SendingHost, Protocol):
    """What the runner needs of its worker."""

    worker_id: str
    writer: Writer

    def lease_deadline_us(self) -> int:
        """Until when a lease renewed now would hold."""
        ...

    def on_fenced(self, error: DatabaseError) -> None:
        """The worker has lost its lease."""
        ...

    def on_post(self, post: Post) -> None:
        """What became of mail that is durable."""
        ...

    def hint(self) -> None:
        """There may be mail: look."""
        ...


class ActivityRunner:
    """Runs the attempts of one worker.

    Args:
        host: the worker.
        engines: where sessions come from.
        limit: how many attempts may run at a time; more wait in line.
        threads: how many plain ``def`` activities may run at a time.
    """

    def __init__(self, host: RunnerHost, engines: SessionEngines, limit: int, threads: int) -> None:
        self.host = host
        self._engines = engines
        self._limit = limit
        self.loop = asyncio.get_running_loop()
        self._base_context: Context = copy_context()
        self._running: set[Attempt] = set()
        self._queue: deque[Attempt] = deque()
        self._endings: dict[asyncio.Task[None], ActivityTransaction] = {}
        self._random = Random()
        self._is_stopping = False
        self._by_thread: dict[Future[Any], Attempt] = {}
        self._threads = ThreadPoolExecutor(threads, "romancy-activity")
        # Commits of sessions must not wait in line behind threads that wait for the lock that they hold.
        self._commit_threads = ThreadPoolExecutor(2, "romancy-commit")

    # -- starting ----------------------------------------------------------------------------------

    def start(self, instance: LiveInstance, operation: ActivityOperation) -> None:
        """Run the next attempt, now or once there is a place."""
        attempt = Attempt(self, instance, operation)
        operation.running = attempt
        if self._is_stopping:
            return  # the instance leaves soon, and the attempt begins where it goes on
        if len(self._running) >= self._limit:
            self._queue.append(attempt)
        else:
            self._run(attempt)

    def _run(self, attempt: Attempt) -> None:
        operation, instance = attempt.operation, attempt.instance
        activity, arguments, options = operation.activity, operation.arguments, operation.options
        if not operation.first_attempt_us:
            operation.first_attempt_us = self.host.clock.now_us()
        else:
            # The attempt before may have changed what it was given.
            arguments = activity.signature.copy_arguments(arguments)
        current = attempt.context = ActivityContext(
            instance.instance_id,
            instance.run,
            instance.workflow_name,
            operation.id,
            operation.attempt + 1,
            self._engines if activity.transactional else None,
            activity.is_async,
            attempt,
        )
        context = self._base_context.copy()
        context.run(CURRENT_ACTIVITY.set, current)
        self._running.add(attempt)
        timeout_s = options.timeout_s or activity.timeout_s
        silence_s = options.heartbeat_timeout_s or activity.heartbeat_timeout_s
        if activity.is_async:
            coroutine = activity.fn(*arguments.args, **arguments.kwargs)
            task = asyncio.Task(coroutine, loop=self.loop, name=operation.id, context=context)
            attempt.handle = task
            task.add_done_callback(partial(self._on_task_done, attempt), context=self._base_context)
            if timeout_s is not None or silence_s is not None:
                self._arm(attempt, timeout_s, silence_s)
        else:
            function = partial(activity.fn, *arguments.args, **arguments.kwargs)
            if timeout_s is not None or silence_s is not None:
                function = partial(self._in_time, attempt, timeout_s, silence_s, function)
            thread = self._threads.submit(context.run, function)
            attempt.handle = thread
            self._by_thread[thread] = attempt
            # Its future keeps its callbacks: with the attempt, which has the future, they would form a cycle.
            thread.add_done_callback(self._post)

    def _in_time(
        self, attempt: Attempt, timeout_s: float | None, silence_s: float | None, function: Callable[[], Any]
    ) -> Any:
        """In a thread: the time counts from here, not from when the attempt began to wait for the thread."""
        self.loop.call_soon_threadsafe(self._arm, attempt, timeout_s, silence_s)
        return function()

    def _arm(self, attempt: Attempt, timeout_s: float | None, silence_s: float | None) -> None:
        if attempt not in self._running:
            return
        if silence_s is not None:
            attempt.expect_heartbeats(silence_s)
        if timeout_s is not None:
            operation = attempt.operation
            error = ActivityTimeoutError(
                f"attempt {operation.attempt + 1} of activity {operation.id} took longer than its timeout of "
                f"{timeout_s} s"
            )
            attempt.timeout = self.loop.call_later(timeout_s, self.time_out, attempt, error)

    def time_out(self, attempt: Attempt, error: ActivityTimeoutError) -> None:
        """See :class:`romancy.engine.attempt.Attempts`."""
        attempt.timed_out = error
        handle = attempt.handle
        self.loop.call_later(LONGEST_ENDING_S, self._cut_if_stuck, attempt)
        if isinstance(handle, asyncio.Task):
            handle.cancel()
        elif handle is not None and not handle.cancel():
            # A thread can't be interrupted: the attempt has failed, its thread runs on.
            attempt.is_over = True
            self._leave(attempt)
            self._settle_failure(attempt, error)

    def cancel(self, operation: ActivityOperation) -> None:
        """Nobody waits for this outcome any more: end the attempt if it is an ``async def`` or has not begun."""
        attempt: Attempt | None = operation.running
        if attempt is None:
            return
        attempt.is_given_up = True
        if attempt.handle is None:
            attempt.instance.on_attempt_dropped(operation)  # and passed over when its turn comes
        else:
            attempt.handle.cancel()
            self.loop.call_later(LONGEST_ENDING_S, self._cut_if_stuck, attempt)

    @staticmethod
    def _cut_if_stuck(attempt: Attempt) -> None:
        """Drivers wait for the server's answer even when cancelled: let those hear an error who are to end."""
        transaction = attempt.context.transaction
        if transaction is not None and attempt.handle is not None and not attempt.handle.done():
            transaction.cut()

    # -- ending ------------------------------------------------------------------------------------

    def _post(self, thread: Future[Any]) -> None:
        """From an activity's thread back to the loop."""
        try:
            self.loop.call_soon_threadsafe(self._on_thread_done, thread)
        except RuntimeError:
            attempt = self._by_thread.pop(thread)
            logger.debug("the event loop closed before activity %s ended", attempt.operation.id)
            self._close_late(attempt)

    def _on_thread_done(self, thread: Future[Any]) -> None:
        attempt = self._by_thread.pop(thread)
        if attempt.is_over:
            self._close_late(attempt)
            return
        self._leave(attempt)
        if thread.cancelled():
            self._on_cancelled(attempt)
            return
        error = thread.exception()
        if error is None:
            self._on_returned(attempt, thread.result())
        else:
            self._on_raised(attempt, error)

    @staticmethod
    def _close_late(attempt: Attempt) -> None:
        """Roll back what a thread has left behind that ended when nobody waited for it any more."""
        transaction = attempt.context.transaction
        if transaction is not None:
            Thread(target=transaction.close_quietly, name="romancy-late", daemon=True).start()

    def _on_task_done(self, attempt: Attempt, task: asyncio.Task[Any]) -> None:
        self.host.writer.hurry()
        self._leave(attempt)
        if task.cancelled():
            self._on_cancelled(attempt)
            return
        error = task.exception()
        if error is None:
            self._on_returned(attempt, task.result())
        else:
            self._on_raised(attempt, error)

    def _leave(self, attempt: Attempt) -> None:
        self._running.discard(attempt)
        attempt.leave()
        while self._queue and len(self._running) < self._limit and not self._is_stopping:
            waiting = self._queue.popleft()
            if not waiting.is_given_up:
                self._run(waiting)

    def _on_cancelled(self, attempt: Attempt) -> None:
        if attempt.is_given_up or attempt.instance.is_gone:
            self._roll_back_then(attempt, lambda: attempt.instance.on_attempt_dropped(attempt.operation))
        elif attempt.timed_out is not None:
            self._on_raised(attempt, attempt.timed_out)
        else:
            self._on_raised(attempt, RuntimeError("the activity was cancelled, by something within it"))

    def _on_returned(self, attempt: Attempt, result: Any) -> None:
        operation = attempt.operation
        try:
            text, value = operation.activity.signature.encode_result(result)
            if len(text) * 4 > self.host.max_payload_bytes:
                what = f"the result of activity {operation.activity.name!r}"
                check_size(what, [text], self.host.max_payload_bytes)
        except RomancyError as error:
            self._on_raised(attempt, error)
            return
        transaction = attempt.context.transaction
        if transaction is None:
            operation.attempt += 1
            attempt.instance.on_completed(operation, text, value, attempt.context.outgoing)
        else:
            self._spawn(self._commit(attempt, transaction, text, value), transaction)

    def _on_raised(self, attempt: Attempt, error: BaseException) -> None:
        failure = self._failure_of_ours(attempt, error)
        if failure is not None:
            self._roll_back_then(attempt, lambda: self._again(attempt, failure))
        else:
            self._roll_back_then(attempt, lambda: self._settle_failure(attempt, error))

    def _failure_of_ours(self, attempt: Attempt, error: BaseException) -> DatabaseError | None:
        """Whether our database, and not the activity, is to blame: such an attempt does not count."""
        transaction = attempt.context.transaction
        if transaction is None:
            return None
        if transaction.is_open and isinstance(error, DBAPIError) and is_lost(error):
            return database_error(error, self._engines.name)
        # The very error, not one like it: an activity may have other databases, and other apps.
        return transaction.failure if error is transaction.failure else None

    def _settle_failure(self, attempt: Attempt, error: BaseException) -> None:
        operation, instance = attempt.operation, attempt.instance
        operation.attempt += 1
        if isinstance(error, TerminalError | SerializationError):
            instance.on_failed(operation, error)
            return
        elapsed_s = (self.host.clock.now_us() - operation.first_attempt_us) / 1_000_000
        wait_s = instance.effective_retry(operation).next_wait(operation.attempt, elapsed_s, error, self._random)
        if wait_s is None:
            instance.on_failed(operation, exhausted(operation, error))
        else:
            instance.on_retry(operation, error, wait_s)

    def _again(self, attempt: Attempt, error: DatabaseError) -> None:
        operation, instance = attempt.operation, attempt.instance
        if instance.is_gone or attempt.is_given_up:
            instance.on_attempt_dropped(operation)
            return
        logger.warning("activity %s runs again, for the database failed: %s", operation.id, error)
        self.loop.call_later(DATABASE_RETRY_WAIT_S, self._start_again, attempt)

    def _start_again(self, attempt: Attempt) -> None:
        if attempt.instance.is_gone or attempt.is_given_up:
            attempt.instance.on_attempt_dropped(attempt.operation)
        else:
            self.start(attempt.instance, attempt.operation)

    # -- transactions ------------------------------------------------------------------------------

    async def _commit(self, attempt: Attempt, transaction: ActivityTransaction, text: str, value: Any) -> None:
        """Commit the user's rows and the outcome together, or run the attempt's failure path."""
        operation, instance = attempt.operation, attempt.instance
        is_async = operation.activity.is_async
        try:
            await self._flush(transaction, is_async=is_async)
        except Exception as error:
            self._on_raised(attempt, error)
            return
        operation.attempt += 1
        if not transaction.is_open:
            await self._close(attempt, transaction)
            self.loop.call_soon(instance.on_completed, operation, text, value, attempt.context.outgoing)
            return
        row = await instance.reserve(operation, text)
        is_committed = False
        try:
            if instance.is_gone:
                await self._close(attempt, transaction)
            else:
                self._warn_of_length(operation, transaction)
                is_committed = await self._commit_outcome(attempt, transaction, row)
        finally:
            # Workflow code must not run inside this task's step.
            done = self.loop.create_future()
            callbacks = transaction.after_commit if is_committed else []
            if is_committed and attempt.context.outgoing:
                # After an unsure commit, what has met is not known here: look.
                post = transaction.post
                callbacks.append(self.host.hint if post is None else partial(self.host.on_post, post))
            self.loop.call_soon(self._after_commit, instance, operation, is_committed, value, callbacks, done)
        await done

    async def _commit_outcome(self, attempt: Attempt, transaction: ActivityTransaction, row: HistoryRow) -> bool:
        """Commit the user's rows, the outcome and what was sent; returns whether they are there."""
        operation = attempt.operation
        arguments = (self.host.worker_id, row, self.host.lease_deadline_us(), attempt.context.outgoing)
        try:
            if operation.activity.is_async:
                await transaction.commit(*arguments)
            else:
                await self._in_thread(transaction.commit_in_thread, *arguments)
        except FencedError as error:
            self.host.on_fenced(error)
        except (HistoryConflictError, PacketTooLargeError) as error:
            attempt.instance.on_refused(error)
        except IntegrityError as error:
            operation.attempt -= 1
            self._on_raised(attempt, error)
        except CommitUnsureError as error:
            if await self._find_out(attempt, row):
                return True
            operation.attempt -= 1
            self._again(attempt, error)
        except DatabaseError as error:
            operation.attempt -= 1
            self._again(attempt, error)
        else:
            return True
        return False

    async def _flush(self, transaction: ActivityTransaction, *, is_async: bool) -> None:
        if is_async:
            await transaction.flush()
            return
        # A flush that begins the transaction waits for the write lock, maybe behind one that must commit.
        pool = self._commit_threads if transaction.is_open else self._threads
        await asyncio.wrap_future(pool.submit(transaction.flush_in_thread))

    async def _find_out(self, attempt: Attempt, row: HistoryRow) -> bool:
        """Whether a commit whose connection was lost has taken place; asks until the database answers. It never will
        take place afterwards: the attempt can safely run again."""
        while not attempt.instance.is_gone:
            try:
                return await asyncio.wrap_future(self._engines.store.settle_event(self.host.worker_id, row))
            except FencedError as error:
                self.host.on_fenced(error)
            except DatabaseError as error:
                logger.warning("whether activity %s was committed is not known yet: %s", attempt.operation.id, error)
                await asyncio.sleep(DATABASE_RETRY_WAIT_S)
        return False

    @staticmethod
    def _after_commit(
        instance: LiveInstance,
        operation: ActivityOperation,
        is_committed: bool,
        value: Any,
        callbacks: list[Callable[[], None]],
        done: asyncio.Future[None],
    ) -> None:
        for callback in callbacks:
            callback()
        instance.settle_reserved(operation, is_committed=is_committed, value=value)
        if not done.done():
            done.set_result(None)

    def _roll_back_then(self, attempt: Attempt, action: Any) -> None:
        transaction = attempt.context.transaction
        if transaction is None:
            action()
        else:
            self._spawn(self._roll_back(attempt, transaction, action), transaction)

    async def _roll_back(self, attempt: Attempt, transaction: ActivityTransaction, action: Any) -> None:
        self._warn_of_length(attempt.operation, transaction)
        await self._close(attempt, transaction)
        self.loop.call_soon(action)

    async def _close(self, attempt: Attempt, transaction: ActivityTransaction) -> None:
        try:
            if attempt.operation.activity.is_async:
                await transaction.close()
            else:
                await self._in_thread(transaction.close_in_thread)
        except Exception:
            logger.warning("the session of activity %s closed with an error", attempt.operation.id, exc_info=True)

    @staticmethod
    def _warn_of_length(operation: ActivityOperation, transaction: ActivityTransaction) -> None:
        if transaction.holds_everybody_up and transaction.open_for_s > LONG_TRANSACTION_S:
            logger.warning(
                "activity %s (%s) held the database's write lock for %.1f s: nobody else could write meanwhile. "
                "Do slow things before the session's first use",
                operation.id,
                operation.activity.place,
                transaction.open_for_s,
            )

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.wrap_future(self._commit_threads.submit(function, *arguments))

    def _spawn(self, coroutine: Coroutine[Any, Any, None], transaction: ActivityTransaction) -> None:
        task = self.loop.create_task(coroutine)
        self._endings[task] = transaction
        task.add_done_callback(self._on_ending_done)

    def _on_ending_done(self, task: asyncio.Task[None]) -> None:
        self._endings.pop(task, None)
        if not task.cancelled() and task.exception() is not None:
            logger.error("an activity's ending failed in an unforeseen way", exc_info=task.exception())

    # -- stopping ----------------------------------------------------------------------------------

    @property
    def running_count(self) -> int:
        """How many attempts run now."""
        return len(self._running)

    async def finish(self, grace_s: float) -> None:
        """Begin no attempt any more, and let the running ones end by themselves for that many seconds."""
        self._is_stopping = True
        deadline = self.loop.time() + grace_s
        while (self._running or self._endings) and self.loop.time() < deadline:
            handles = [self._as_awaitable(attempt) for attempt in self._running if attempt.handle is not None]
            await asyncio.wait([*handles, *self._endings], timeout=deadline - self.loop.time())
            await asyncio.sleep(0)

    @staticmethod
    def _as_awaitable(attempt: Attempt) -> asyncio.Future[Any]:
        handle = attempt.handle
        return handle if isinstance(handle, asyncio.Task) else asyncio.wrap_future(handle)  # type: ignore[arg-type]

    async def close(self) -> None:
        """Cancel what still runs and wait a while for its transactions to end; threads are left to themselves."""
        self._is_stopping = True
        attempts = list(self._running)
        for attempt in attempts:
            attempt.is_given_up = True
            attempt.is_over = not isinstance(attempt.handle, asyncio.Task)
            if attempt.handle is not None:
                attempt.handle.cancel()
        self._queue.clear()
        tasks = [attempt.handle for attempt in attempts if isinstance(attempt.handle, asyncio.Task)]
        if tasks:
            await asyncio.wait(tasks, timeout=LONGEST_ENDING_S)
        for attempt in attempts:
            self._cut_if_stuck(attempt)
        if stuck := [task for task in tasks if not task.done()]:
            await asyncio.wait(stuck, timeout=LONGEST_ENDING_S)
        await asyncio.sleep(0)
        await self._wait_for_endings()
        for ending, transaction in list(self._endings.items()):
            logger.warning("an activity's transaction has not ended within %.0f s; it is cut off", LONGEST_ENDING_S)
            transaction.cut()
            ending.cancel()
        await self._wait_for_endings()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._commit_threads.shutdown(wait=False)

    async def _wait_for_endings(self) -> None:
        deadline = self.loop.time() + LONGEST_ENDING_S
        while self._endings and self.loop.time() < deadline:
            await asyncio.wait(set(self._endings), timeout=deadline - self.loop.time())
