"""Every exception that callers of Romancy catch.

The tree::

    RomancyError
    ├── DefinitionError             a @workflow or @activity that can't work
    │   └── DuplicateNameError      the name is taken; names both places
    ├── SerializationError          a value that can't be stored, or stored text that can't be read
    │   └── PayloadTooLargeError
    ├── TerminalError               raised by users: "do not retry this"
    ├── RetryExhaustedError         an activity failed for good
    ├── ActivityTimeoutError        one attempt took longer than its timeout (also a TimeoutError)
    ├── EventTimeoutError           wait_event(timeout=…) ran out (also a TimeoutError)
    ├── MessageTimeoutError         receive(timeout=…) ran out (also a TimeoutError)
    ├── ChannelModeConflictError    one channel has one mode
    ├── ChildWorkflowError          a child failed or was cancelled
    ├── NonDeterminismError         the code no longer fits the history
    ├── ForbiddenInWorkflowError    I/O, threads or endless loops in workflow code
    ├── NotInActivityError          current_activity() outside an activity
    ├── SessionError                an activity's session used in a way that can't be durable
    ├── InstanceNotFoundError       (also a LookupError)
    ├── InstanceConflictError       the id belongs to another start
    ├── InstanceStateError          the instance is not in the state that the call needs
    ├── UnknownWorkflowError        no such workflow in this app (also a LookupError)
    ├── WorkflowFailedError         result() of a failed instance
    ├── WorkflowCancelledError      result() of a cancelled instance
    ├── WorkflowSuspendedError      result() of a parked instance
    ├── ResultTimeoutError          result(timeout=…) ran out (also a TimeoutError)
    ├── InvalidFilterError          a bad path, value or limit in a query (also a ValueError)
    │   └── InvalidPageTokenError
    ├── ConfigurationError          a bad option of App (also a ValueError)
    ├── AppNotRunningError          the app has not started, or has shut down
    └── DatabaseError
        ├── DatabaseURLError        (also a ValueError)
        ├── DatabaseLockedError
        ├── DatabaseReadOnlyError
        ├── DatabaseCorruptError
        ├── DatabaseFullError
        ├── PacketTooLargeError     rows of one instance that the server does not take at once
        ├── DatabaseUnsafeError     a server that would lose what it has acknowledged
        ├── DatabaseUnavailableError
        ├── SchemaError             missing or outdated tables
        └── FencedError             this worker has lost its lease

A message names the value at fault and says what to do next.
"""

from __future__ import annotations

from romancy.model import ErrorInfo


class RomancyError(Exception):
    """The root of all errors that Romancy raises on purpose."""


class DefinitionError(RomancyError):
    """A workflow or activity was defined in a way that can't work."""


class DuplicateNameError(DefinitionError):
    """A second workflow or activity took a name that is in use."""


class SerializationError(RomancyError):
    """A value can't be stored as JSON, or stored JSON doesn't fit the annotation."""


class PayloadTooLargeError(SerializationError):
    """A stored value would be larger than ``App(max_payload_bytes=…)``."""


class TerminalError(RomancyError):
    """Raise this in an activity for a failure that no retry can mend.

    The workflow sees the very same exception (subclasses too), live and on replay.

    Example:
        >>> raise TerminalError("order 17 is cancelled")
        Traceback (most recent call last):
        ...
        romancy.errors.TerminalError: order 17 is cancelled
    """


def text_of(error: BaseException) -> str:
    """The exception's text, also when its ``__str__`` raises."""
    try:
        return str(error)
    except Exception as second:  # noqa: BLE001  (whatever a user's __str__ does)
        return f"<its text can't be read: {type(second).__name__}>"


class RetryExhaustedError(RomancyError):
    """An activity failed for good: its retry policy allows no further attempt.

    Attributes:
        activity_id: which call it was, for example ``"charge:1"``.
        attempts: how many attempts were made.
        last_error: what the last attempt raised; also the ``__cause__``.
    """

    def __init__(self, activity_id: str, attempts: int, last_error: BaseException) -> None:
        self.activity_id = activity_id
        self.attempts = attempts
        self.last_error = last_error
        plural = "attempt" if attempts == 1 else "attempts"
        super().__init__(
            f"activity {activity_id} failed after {attempts} {plural}: "
            f"{type(last_error).__name__}: {text_of(last_error)}. Catch this error in the workflow, "
            f"or give the activity another RetryPolicy"
        )
        self.__cause__ = last_error

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.activity_id, self.attempts, self.last_error)


class ActivityTimeoutError(RomancyError, TimeoutError):
    """One attempt of an activity ran longer than its ``timeout``."""


class EventTimeoutError(RomancyError, TimeoutError):
    """``wait_event(timeout=…)`` ran out; the event, should it still come, is kept for the next wait."""


class MessageTimeoutError(RomancyError, TimeoutError):
    """``receive(timeout=…)`` ran out; the message, should it still come, is kept for the next one."""


class ChannelModeConflictError(RomancyError):
    """A channel is used in another mode than the one that it has."""


class ChildWorkflowError(RomancyError):
    """A child workflow ended without a result; ``__cause__`` is what it raised.

    Attributes:
        instance_id: the child.
        status: ``failed`` or ``cancelled``.
    """

    def __init__(self, instance_id: str, status: str, reason: str) -> None:
        self.instance_id = instance_id
        self.status = status
        self.reason = reason
        super().__init__(f"child workflow {instance_id} {status}: {reason}")

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.instance_id, self.status, self.reason)


class NonDeterminismError(RomancyError):
    """The workflow's code asks for something else than its history records.

    The instance is parked as ``suspended`` with its history untouched.

    Attributes:
        instance_id: whose history it is.
        expected: what the history records next.
        found: what the code asked for.
        location: ``file:line`` of the request in the workflow's code, or ``None``.
    """

    def __init__(self, instance_id: str, expected: str, found: str, location: str | None) -> None:
        self.instance_id = instance_id
        self.expected = expected
        self.found = found
        self.location = location
        place = f" at {location}" if location else ""
        super().__init__(
            f"instance {instance_id}: the history expects {expected}, the code has {found}{place}. "
            f"Restore code that fits the history, then call app.resume({instance_id!r})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.instance_id, self.expected, self.found, self.location)


class ForbiddenInWorkflowError(RomancyError):
    """Workflow code tried something that can't be replayed: I/O, a thread, a process, an endless loop."""


class NotInActivityError(RomancyError):
    """``current_activity()`` was called outside a running activity."""


class SessionError(RomancyError):
    """An activity's session was used where it can't keep its promise."""


class InstanceNotFoundError(RomancyError, LookupError):
    """No instance has this id."""


class InstanceConflictError(RomancyError):
    """``start_workflow(id=…)`` met an instance of another workflow or with another input."""


class InstanceStateError(RomancyError):
    """The instance is not in the state that this call needs."""


class UnknownWorkflowError(RomancyError, LookupError):
    """The app knows no workflow of this name."""


class WorkflowFailedError(RomancyError):
    """``result()`` of an instance that failed; ``__cause__`` is what the workflow raised.

    Attributes:
        instance_id: which instance failed.
        error: the recorded error: type, message and traceback as text.
    """

    def __init__(self, instance_id: str, error: ErrorInfo) -> None:
        self.instance_id = instance_id
        self.error = error
        super().__init__(
            f"instance {instance_id} failed with {error.type}: {error.message}. "
            f"Its history tells more: app.get_history({instance_id!r})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.instance_id, self.error)


class WorkflowCancelledError(RomancyError):
    """``result()`` of an instance that was cancelled."""


class WorkflowSuspendedError(RomancyError):
    """``result()`` of an instance that is parked until somebody resumes it.

    Attributes:
        instance_id: which instance is parked.
        error: why, as it was recorded, or ``None``.
    """

    def __init__(self, instance_id: str, error: ErrorInfo | None) -> None:
        self.instance_id = instance_id
        self.error = error
        why = f": {error.type}: {error.message}" if error else ""
        super().__init__(
            f"instance {instance_id} is suspended{why}. Mend the cause, then call app.resume({instance_id!r})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.instance_id, self.error)


class ResultTimeoutError(RomancyError, TimeoutError):
    """``result(timeout=…)`` ran out; the workflow itself goes on."""


class InvalidFilterError(RomancyError, ValueError):
    """A query was given a path, value or limit that it can't use."""


class InvalidPageTokenError(InvalidFilterError):
    """A page token that no ``list_instances`` or ``find_instances`` of this query returned."""


class ConfigurationError(RomancyError, ValueError):
    """An option has a value that can't work."""


class AppNotRunningError(RomancyError):
    """The call needs a started app."""


class DatabaseError(RomancyError):
    """The database refused or failed; nothing that was acknowledged is lost."""


class DatabaseURLError(DatabaseError, ValueError):
    """The database's address can't be understood, or names a database that is not supported."""


class DatabaseLockedError(DatabaseError):
    """Another process held the database's write lock for too long."""


class DatabaseReadOnlyError(DatabaseError):
    """The database, or the folder that it lives in, can't be written."""


class DatabaseCorruptError(DatabaseError):
    """The file is damaged, or is no database."""


class DatabaseFullError(DatabaseError):
    """The disk (or the database's quota) is full."""


class PacketTooLargeError(DatabaseError):
    """A row is larger than what the server takes at once (``max_allowed_packet`` of MySQL and MariaDB)."""


class DatabaseUnsafeError(DatabaseError):
    """The server is too old, or its settings would lose what it has acknowledged; the message says what to set."""


class DatabaseUnavailableError(DatabaseError):
    """The database can't be opened or reached."""


class SchemaError(DatabaseError):
    """Romancy's tables are missing, or of another version."""


class FencedError(DatabaseError):
    """This worker lost its lease: others own its instances, so it must not write."""
