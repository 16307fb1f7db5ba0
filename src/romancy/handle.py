"""``WorkflowHandle``: what a caller holds of an instance that was started."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar, cast

from romancy.definitions import Workflow
from romancy.errors import InstanceNotFoundError, WorkflowCancelledError, WorkflowFailedError, WorkflowSuspendedError
from romancy.failures import decode_error, decode_info
from romancy.model import Instance, Status
from romancy.outcomes import Outcome
from romancy.retry import Seconds
from romancy.serde import load_json
from romancy.storage.rows import StateRow

R = TypeVar("R")

COMPLETED = Status.COMPLETED.value


class HandleHost(Protocol):
    """What a handle needs of its app."""

    async def wait_for(self, outcome: Outcome, timeout: Seconds | None) -> StateRow:
        """Wait until the instance has ended or was suspended."""
        ...

    async def get_instance(self, instance_id: str) -> Instance | None:
        """One instance as the database holds it now."""
        ...

    async def cancel(self, instance_id: str, reason: str | None = None) -> bool:
        """Ask an instance to end."""
        ...


def not_found(instance_id: str) -> InstanceNotFoundError:
    """The error for an id that no instance has."""
    return InstanceNotFoundError(f"there is no instance {instance_id!r}; list_instances() shows what there is")


class WorkflowHandle(Generic[R]):
    """A started instance, from outside; made by :meth:`App.start_workflow` and :meth:`App.get_handle`."""

    __slots__ = ("_host", "_outcome", "_workflow", "instance_id")

    def __init__(self, host: HandleHost, outcome: Outcome, workflow: Workflow[..., R] | None) -> None:
        self._host = host
        self._outcome = outcome
        self._workflow = workflow
        self.instance_id = outcome.instance_id

    async def result(self, timeout: Seconds | None = None) -> R:
        """Wait until the instance has ended, on whatever worker, and return what the workflow returned.

        Args:
            timeout: how long to wait, in seconds or as a ``timedelta``; ``None``: without end.

        Raises:
            WorkflowFailedError: the workflow failed; its ``__cause__`` is what the workflow raised.
            WorkflowCancelledError: the workflow was cancelled.
            WorkflowSuspendedError: the instance is parked until somebody resumes it.
            ResultTimeoutError: the time ran out; the workflow itself goes on.
            AppNotRunningError: the app shut down meanwhile.
        """
        state = self._outcome.state
        if state is None:
            state = await self._host.wait_for(self._outcome, timeout)
        return self._decode(state)

    async def cancel(self, reason: str | None = None) -> bool:
        """Ask the instance to end; see :meth:`romancy.App.cancel`."""
        return await self._host.cancel(self.instance_id, reason)

    async def status(self) -> Status:
        """The instance's status now, as the database holds it.

        Raises:
            InstanceNotFoundError: there is no such instance.
        """
        instance = await self._host.get_instance(self.instance_id)
        if instance is None:
            raise not_found(self.instance_id)
        return instance.status

    def _decode(self, state: StateRow) -> R:
        if state.status == COMPLETED:
            text = state.result if state.result is not None else "null"
            if self._workflow is None:
                return cast("R", load_json(text))
            return cast("R", self._workflow.signature.decode_result(text))
        match Status(state.status):
            case Status.FAILED:
                assert state.error is not None
                raise WorkflowFailedError(self.instance_id, decode_info(state.error)) from decode_error(state.error)
            case Status.CANCELLED:
                why = "" if state.error is None else f": {decode_info(state.error).message}"
                raise WorkflowCancelledError(f"instance {self.instance_id} was cancelled, so it has no result{why}")
            case _:
                info = None if state.error is None else decode_info(state.error)
                raise WorkflowSuspendedError(self.instance_id, info)

    def __repr__(self) -> str:
        return f"<workflow handle {self.instance_id}>"
