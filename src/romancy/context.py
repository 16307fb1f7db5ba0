"""What user code holds while it runs: ``WorkflowContext`` in workflows, ``ActivityContext`` in activities."""

from __future__ import annotations

import asyncio
import logging
import uuid
from contextvars import ContextVar
from datetime import datetime, timedelta
from random import Random
from typing import Protocol, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from romancy.errors import NotInActivityError, SessionError
from romancy.model import from_micros, to_micros
from romancy.storage.sessions import ActivityTransaction, SessionEngines


class RunningWorkflow(Protocol):
    """What a context reads of the instance that runs."""

    @property
    def instance_id(self) -> str: ...
    @property
    def run(self) -> int: ...
    @property
    def workflow_name(self) -> str: ...
    @property
    def is_replaying(self) -> bool: ...
    def workflow_time_us(self) -> int: ...


class WorkflowContext:
    """A workflow's first parameter: its identity, and the deterministic forms of time and chance."""

    __slots__ = ("_random", "_workflow")

    def __init__(self, workflow: RunningWorkflow) -> None:
        self._workflow = workflow
        self._random: Random | None = None

    @property
    def instance_id(self) -> str:
        """The id of this instance."""
        return self._workflow.instance_id

    @property
    def run(self) -> int:
        """The number of this run of the instance, from 1."""
        return self._workflow.run

    @property
    def workflow_name(self) -> str:
        """The name that the workflow is registered under."""
        return self._workflow.workflow_name

    @property
    def is_replaying(self) -> bool:
        """Whether the code is being brought back to where it was. For logging only: decisions must not depend on it."""
        return self._workflow.is_replaying

    @property
    def logger(self) -> logging.LoggerAdapter[logging.Logger]:
        """A logger that names the instance and is silent during replay."""
        return _WorkflowLogger(self._workflow)

    def now(self) -> datetime:
        """Workflow time, an aware UTC datetime: when the latest recorded event (at first: the start) happened.

        It is the same on every replay, and stands still while workflow code runs.
        """
        return from_micros(self._workflow.workflow_time_us())

    async def sleep(self, seconds: float | timedelta) -> None:
        """Wait durably; never shorter than that, across crashes and restarts. ``asyncio.sleep`` does the same.

        Args:
            seconds: how long, in seconds or as a ``timedelta``; not above zero: at once.
        """
        if isinstance(seconds, timedelta):
            seconds = seconds.total_seconds()
        await asyncio.sleep(seconds)

    async def sleep_until(self, when: datetime) -> None:
        """Wait durably until a time; a past one: at once.

        Args:
            when: an aware datetime.

        Raises:
            ValueError: it has no time zone.
        """
        wait_us = to_micros(when) - self._workflow.workflow_time_us()
        await asyncio.sleep(wait_us / 1_000_000)

    def random(self) -> Random:
        """A random number generator that gives the same numbers on every replay. Not for secrets."""
        if self._random is None:
            self._random = Random(f"{self.instance_id}\0{self.run}")
        return self._random

    def uuid4(self) -> uuid.UUID:
        """A UUID that is the same on every replay. Not for secrets."""
        return uuid.UUID(int=self.random().getrandbits(128), version=4)


class _WorkflowLogger(logging.LoggerAdapter[logging.Logger]):
    def __init__(self, workflow: RunningWorkflow) -> None:
        super().__init__(logging.getLogger("romancy.workflow"), {"instance_id": workflow.instance_id})
        self._workflow = workflow

    def isEnabledFor(self, level: int) -> bool:  # noqa: N802  (the name is logging's)
        return not self._workflow.is_replaying and self.logger.isEnabledFor(level)

    def process(self, msg: object, kwargs: object) -> tuple[object, object]:  # type: ignore[override]
        return f"[{self._workflow.workflow_name} {self._workflow.instance_id}] {msg}", kwargs


class ActivityContext:
    """What an activity knows of the attempt that it is; see :func:`current_activity`.

    Attributes:
        instance_id: the instance that asked for it.
        run: the run of that instance.
        workflow_name: the workflow's name.
        activity_id: which call of the run this is, for example ``"charge:1"``.
        attempt: the number of this attempt, from 1.
    """

    __slots__ = (
        "_engines",
        "_is_async",
        "_transaction",
        "activity_id",
        "attempt",
        "instance_id",
        "run",
        "workflow_name",
    )

    def __init__(
        self,
        instance_id: str,
        run: int,
        workflow_name: str,
        activity_id: str,
        attempt: int,
        engines: SessionEngines | None,
        is_async: bool,
    ) -> None:
        self.instance_id = instance_id
        self.run = run
        self.workflow_name = workflow_name
        self.activity_id = activity_id
        self.attempt = attempt
        self._engines = engines
        self._is_async = is_async
        self._transaction: ActivityTransaction | None = None

    @property
    def idempotency_key(self) -> str:
        """The same for every attempt of this call, and for no other call: for services that take such keys."""
        return f"{self.instance_id}/{self.run}/{self.activity_id}"

    @property
    def session(self) -> AsyncSession:
        """The SQLAlchemy session of this attempt: an ``AsyncSession``; in a plain ``def`` activity a ``Session``.

        What is written through it commits together with the activity's recorded outcome, exactly once, or not at
        all. It opens at its first use; on SQLite it then holds the database's one write lock until the activity
        ends, so do slow things before. ``commit`` and ``rollback`` on it touch a savepoint only.

        Type checkers see an ``AsyncSession``; in a plain ``def`` take :attr:`sync_session`, which is the same object.

        Raises:
            SessionError: the activity is not transactional.
        """
        return cast("AsyncSession", self._open())

    @property
    def sync_session(self) -> Session:
        """The session of a plain ``def`` activity, for type checkers; see :attr:`session`.

        Raises:
            SessionError: the activity is an ``async def``, or not transactional.
        """
        session = self._open()
        if isinstance(session, AsyncSession):
            raise SessionError(f"activity {self.activity_id} is an async def: use .session, and await its methods")
        return session

    @property
    def has_open_transaction(self) -> bool:
        """Whether the session has begun its transaction."""
        return self._transaction is not None and self._transaction.is_open

    @property
    def holds_everybody_up(self) -> bool:
        """For the engine: whether nobody else can write until this attempt's transaction has ended."""
        return self._transaction is not None and self._transaction.holds_everybody_up

    @property
    def transaction(self) -> ActivityTransaction | None:
        """For the engine: the attempt's transaction, once the session was asked for."""
        return self._transaction

    def _open(self) -> AsyncSession | Session:
        if self._transaction is None:
            if self._engines is None:
                raise SessionError(
                    f"activity {self.activity_id} is defined with transactional=False, so it has no session"
                )
            self._transaction = self._engines.transaction(is_async=self._is_async)
        return self._transaction.session()


CURRENT_ACTIVITY: ContextVar[ActivityContext] = ContextVar("romancy_current_activity")


def current_activity() -> ActivityContext:
    """The context of the activity that is running in this task or thread.

    Raises:
        NotInActivityError: none is.

    Example:
        ``await current_activity().session.execute(insert(orders).values(id=order_id))``
    """
    try:
        return CURRENT_ACTIVITY.get()
    except LookupError:
        raise NotInActivityError(
            "no activity is running here: call current_activity() inside an @activity that a workflow runs"
        ) from None
