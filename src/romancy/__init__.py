"""Durable execution as a library: async workflows that survive crashes, restarts and deployments.

Start with :class:`App`, :func:`workflow` and :func:`activity`.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from romancy._version import __version__

if TYPE_CHECKING:
    from romancy.app import App
    from romancy.context import ActivityContext, ChildHandle, WorkflowContext, current_activity
    from romancy.definitions import Activity, Catalogue, Workflow, activity, workflow
    from romancy.errors import (
        ActivityTimeoutError,
        AppNotRunningError,
        ChannelModeConflictError,
        ChildWorkflowError,
        ConfigurationError,
        DatabaseCorruptError,
        DatabaseError,
        DatabaseFullError,
        DatabaseLockedError,
        DatabaseReadOnlyError,
        DatabaseUnavailableError,
        DatabaseUnsafeError,
        DatabaseURLError,
        DefinitionError,
        DuplicateNameError,
        EventTimeoutError,
        FencedError,
        ForbiddenInWorkflowError,
        InstanceConflictError,
        InstanceNotFoundError,
        InstanceStateError,
        InvalidFilterError,
        InvalidPageTokenError,
        MessageTimeoutError,
        NonDeterminismError,
        NotInActivityError,
        PacketTooLargeError,
        PayloadTooLargeError,
        ResultTimeoutError,
        RetryExhaustedError,
        RomancyError,
        SchemaError,
        SerializationError,
        SessionError,
        TerminalError,
        UnknownWorkflowError,
        WorkflowCancelledError,
        WorkflowFailedError,
        WorkflowSuspendedError,
    )
    from romancy.handle import WorkflowHandle
    from romancy.model import (
        ErrorInfo,
        Event,
        HistoryEvent,
        HistoryKind,
        Instance,
        InstancePage,
        Message,
        PendingActivity,
        Status,
    )
    from romancy.retry import RetryPolicy

__all__ = [
    "Activity",
    "ActivityContext",
    "ActivityTimeoutError",
    "App",
    "AppNotRunningError",
    "Catalogue",
    "ChannelModeConflictError",
    "ChildHandle",
    "ChildWorkflowError",
    "ConfigurationError",
    "DatabaseCorruptError",
    "DatabaseError",
    "DatabaseFullError",
    "DatabaseLockedError",
    "DatabaseReadOnlyError",
    "DatabaseURLError",
    "DatabaseUnavailableError",
    "DatabaseUnsafeError",
    "DefinitionError",
    "DuplicateNameError",
    "ErrorInfo",
    "Event",
    "EventTimeoutError",
    "FencedError",
    "ForbiddenInWorkflowError",
    "HistoryEvent",
    "HistoryKind",
    "Instance",
    "InstanceConflictError",
    "InstanceNotFoundError",
    "InstancePage",
    "InstanceStateError",
    "InvalidFilterError",
    "InvalidPageTokenError",
    "Message",
    "MessageTimeoutError",
    "NonDeterminismError",
    "NotInActivityError",
    "PacketTooLargeError",
    "PayloadTooLargeError",
    "PendingActivity",
    "ResultTimeoutError",
    "RetryExhaustedError",
    "RetryPolicy",
    "RomancyError",
    "SchemaError",
    "SerializationError",
    "SessionError",
    "Status",
    "TerminalError",
    "UnknownWorkflowError",
    "Workflow",
    "WorkflowCancelledError",
    "WorkflowContext",
    "WorkflowFailedError",
    "WorkflowHandle",
    "WorkflowSuspendedError",
    "__version__",
    "activity",
    "current_activity",
    "workflow",
]

# Where the public names are, the lightest modules first. They are imported when they are first asked for, so that
# the command line can answer, and be interrupted, before SQLAlchemy is there.
_HOMES = ("model", "errors", "retry", "definitions", "context", "handle", "app")

if not TYPE_CHECKING:  # type checkers would take every name for one of these

    def __getattr__(name: str) -> Any:
        if name in __all__:
            for home in _HOMES:
                found = vars(import_module(f"romancy.{home}"))
                if name in found:
                    return globals().setdefault(name, found[name])
        elif not name.startswith("_") and find_spec(f"romancy.{name}") is not None:
            return import_module(f"romancy.{name}")
        raise AttributeError(f"module 'romancy' has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
