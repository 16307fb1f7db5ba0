"""``@workflow`` and ``@activity``: what users define, and the catalogue of names.

Definitions hold no running state. Calling an activity looks for a workflow that is running on this thread;
without one, the call is the plain function.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, cast, overload
from weakref import WeakKeyDictionary

from romancy.errors import ConfigurationError, DefinitionError, DuplicateNameError
from romancy.names import MAX_NAME, is_name, plain
from romancy.retry import RetryPolicy, Seconds, as_seconds
from romancy.signature import Signature

P = ParamSpec("P")
R = TypeVar("R")


class WorkflowContextLike(Protocol):
    """The first parameter of every workflow; see :class:`romancy.WorkflowContext`."""

    @property
    def instance_id(self) -> str: ...


C = TypeVar("C", bound=WorkflowContextLike)


@dataclasses.dataclass(frozen=True, slots=True)
class CallOptions:
    """What ``activity.options(…)`` overrides for one call; ``None`` means: as defined."""

    id: str | None = None
    retry: RetryPolicy | None = None
    timeout_s: float | None = None
    heartbeat_timeout_s: float | None = None


DEFAULT_OPTIONS = CallOptions()


class WorkflowHost(Protocol):
    """What a running workflow's event loop offers to activity calls."""

    def call_activity(
        self,
        activity: Activity[..., Any],
        options: CallOptions,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Coroutine[Any, Any, Any]:
        """A coroutine that asks for the activity and waits for its outcome."""
        ...


class _Running(threading.local):
    """What runs on this thread just now."""

    host: WorkflowHost | None = None


RUNNING = _Running()
"""Set by a workflow's event loop while it runs. (Asking asyncio for the running loop costs a system call.)"""


def place_of(fn: Callable[..., Any]) -> str:
    """``file:line`` of a function."""
    code = inspect.unwrap(fn).__code__
    return f"{code.co_filename}:{code.co_firstlineno}"


def source_hash(fn: Callable[..., Any]) -> str:
    """A short digest of a function's source, or of its code where there is no source."""
    try:
        text = inspect.getsource(fn).encode()
    except (OSError, TypeError):
        text = fn.__code__.co_code
    return hashlib.sha256(text).hexdigest()[:16]


CODE_NAMES: WeakKeyDictionary[CodeType, str] = WeakKeyDictionary()
"""What to call a running piece of user code in reports."""


class Activity(Generic[P, R]):
    """An activity: the place for side effects; made by :func:`activity`.

    ``await act(args…)`` inside a workflow runs it durably. Outside a workflow the call is the plain
    function: an ``async def`` returns its coroutine, a plain ``def`` its value.
    """

    def __init__(
        self,
        fn: Callable[P, Any],
        name: str,
        *,
        retry: RetryPolicy | None = None,
        transactional: bool = True,
        timeout: Seconds | None = None,
        heartbeat_timeout: Seconds | None = None,
        compensate: Activity[..., Any] | None = None,
    ) -> None:
        self.fn = fn
        self.name = name
        self.compensate = _checked_compensation(name, fn, compensate)
        self.retry = _checked_retry(f"activity {name!r}", retry)
        self.transactional = transactional
        self.timeout_s = _checked_timeout("timeout", timeout)
        self.heartbeat_timeout_s = _checked_timeout("heartbeat_timeout", heartbeat_timeout)
        self.is_async = inspect.iscoroutinefunction(fn)
        self.place = place_of(fn)
        self.signature = Signature(f"activity {name!r}", fn)
        CODE_NAMES[fn.__code__] = f"activity {name!r}"
        self.__wrapped__ = fn
        self.__doc__ = fn.__doc__
        self.__name__ = fn.__name__
        self.__qualname__ = fn.__qualname__
        self.__module__ = fn.__module__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        host = RUNNING.host
        if host is None:
            return cast("Coroutine[Any, Any, R]", self.fn(*args, **kwargs))
        return host.call_activity(self, DEFAULT_OPTIONS, args, kwargs)

    def options(
        self,
        *,
        id: str | None = None,
        retry: RetryPolicy | None = None,
        timeout: Seconds | None = None,
        heartbeat_timeout: Seconds | None = None,
    ) -> BoundActivity[P, R]:
        """The activity with other options for one call.

        Args:
            id: the activity id to record instead of ``name:counter``; unique within the run.
            retry: another retry policy.
            timeout: seconds (or a ``timedelta``) that one attempt may take.
            heartbeat_timeout: seconds (or a ``timedelta``) that may pass between two heartbeats.

        Example:
            ``await charge.options(id="charge-deposit", retry=RetryPolicy.no_retry())(order)``
        """
        if id is not None and not is_name(id):
            raise DefinitionError(
                f"{self.name}.options(id={id!r}): give a text of 1 to {MAX_NAME} characters without control characters"
            )
        retry = _checked_retry(f"{self.name}.options", retry)
        options = CallOptions(
            None if id is None else plain(id),
            retry,
            _checked_timeout("timeout", timeout),
            _checked_timeout("heartbeat_timeout", heartbeat_timeout),
        )
        return BoundActivity(self, options)

    def __repr__(self) -> str:
        return f"<activity {self.name!r} at {self.place}>"


class BoundActivity(Generic[P, R]):
    """An activity with options for one call; made by :meth:`Activity.options`."""

    __slots__ = ("_activity", "_options")

    def __init__(self, activity: Activity[P, R], options: CallOptions) -> None:
        self._activity = activity
        self._options = options

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        host = RUNNING.host
        if host is None:
            return self._activity(*args, **kwargs)
        return host.call_activity(self._activity, self._options, args, kwargs)


class Workflow(Generic[P, R]):
    """A workflow: deterministic orchestration; made by :func:`workflow`.

    Calling it with a context runs the plain function: for unit tests, or as a part of another workflow.
    """

    def __init__(
        self,
        fn: Callable[..., Coroutine[Any, Any, R]],
        name: str,
        *,
        event_handler: bool,
        compare_inputs: bool,
    ) -> None:
        self.fn = fn
        self.name = name
        self.event_handler = event_handler
        self.compare_inputs = compare_inputs
        self.place = place_of(fn)
        self.source_hash = source_hash(fn)
        self.signature = Signature(f"workflow {name!r}", fn, skip=1)
        CODE_NAMES[fn.__code__] = f"workflow {name!r}"
        self.__wrapped__ = fn
        self.__doc__ = fn.__doc__
        self.__name__ = fn.__name__
        self.__qualname__ = fn.__qualname__
        self.__module__ = fn.__module__

    def __call__(self, ctx: WorkflowContextLike, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        return self.fn(ctx, *args, **kwargs)

    def __repr__(self) -> str:
        return f"<workflow {self.name!r} at {self.place}>"


Definition = Activity[..., Any] | Workflow[..., Any]


class Catalogue:
    """The names of workflows and activities; each is unique in its catalogue.

    ``@workflow`` and ``@activity`` register in a default catalogue. An app takes the workflows of that one, or
    those of ``App(workflows=[…])``. A catalogue of one's own keeps definitions apart, in tests for example:

    Example:
        >>> mine = Catalogue()
        >>> @activity(catalogue=mine)
        ... async def greet(name: str) -> str:
        ...     return f"hello {name}"
        >>> [definition.name for definition in mine]
        ['greet']
    """

    def __init__(self) -> None:
        self._workflows: dict[str, Workflow[..., Any]] = {}
        self._activities: dict[str, Activity[..., Any]] = {}
        self._lock = threading.Lock()

    def add_workflow(self, definition: Workflow[..., Any]) -> None:
        """Register a workflow.

        Raises:
            DuplicateNameError: the name is taken by another definition.
        """
        self._add(self._workflows, "workflow", definition)

    def add_activity(self, definition: Activity[..., Any]) -> None:
        """Register an activity; see :meth:`add_workflow`."""
        self._add(self._activities, "activity", definition)

    def _add(self, names: dict[str, Any], kind: str, definition: Definition) -> None:
        with self._lock:
            first = names.get(definition.name)
            if first is not None and first is not definition and not _is_reload(first, definition):
                raise DuplicateNameError(
                    f"a second {kind} is named {definition.name!r}: the first stands at {first.place}, this one at "
                    f"{definition.place}. Rename one of them, or give it another name with @{kind}(name=…)"
                )
            names[definition.name] = definition

    @property
    def workflows(self) -> dict[str, Workflow[..., Any]]:
        """A copy of the workflows by name."""
        return dict(self._workflows)

    @property
    def activities(self) -> dict[str, Activity[..., Any]]:
        """A copy of the activities by name."""
        return dict(self._activities)

    @classmethod
    def of(cls, workflows: Iterable[Workflow[..., Any]]) -> Self:
        """A catalogue of just these workflows."""
        catalogue = cls()
        for definition in workflows:
            if not isinstance(definition, Workflow):
                raise DefinitionError(f"{definition!r} is no workflow: give functions that carry @workflow")
            catalogue.add_workflow(definition)
        return catalogue

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Forget, at the end of the block, what was added in it."""
        workflows, activities = self.workflows, self.activities
        try:
            yield
        finally:
            self._workflows, self._activities = workflows, activities

    def __iter__(self) -> Iterator[Definition]:
        yield from self._workflows.values()
        yield from self._activities.values()


def _is_reload(first: Definition, second: Definition) -> bool:
    """The same top-level definition, read again: a module reloaded, or run as ``__main__`` and imported."""
    return (
        first.place == second.place
        and first.__qualname__ == second.__qualname__
        and "<locals>" not in second.__qualname__
    )


DEFAULT_CATALOGUE = Catalogue()


@overload
def activity(fn: Callable[P, Coroutine[Any, Any, R]], /) -> Activity[P, R]: ...
@overload
def activity(fn: Callable[P, R], /) -> Activity[P, R]: ...
@overload
def activity(
    *,
    name: str | None = None,
    retry: RetryPolicy | None = None,
    transactional: bool = True,
    timeout: Seconds | None = None,
    heartbeat_timeout: Seconds | None = None,
    compensate: Activity[..., Any] | None = None,
    catalogue: Catalogue = DEFAULT_CATALOGUE,
) -> ActivityDecorator: ...
def activity(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    retry: RetryPolicy | None = None,
    transactional: bool = True,
    timeout: Seconds | None = None,
    heartbeat_timeout: Seconds | None = None,
    compensate: Activity[..., Any] | None = None,
    catalogue: Catalogue = DEFAULT_CATALOGUE,
) -> Any:
    """Define an activity: a function with side effects, run at least once, with one recorded outcome.

    An ``async def`` runs on the app's event loop, a plain ``def`` in the app's thread pool.

    Args:
        name: how history calls it; by default the function's name.
        retry: when a failed attempt is tried again; by default the app's policy.
        transactional: whether ``current_activity().session`` is offered. What is written through it commits
            together with the recorded outcome, or not at all.
        timeout: seconds (or a ``timedelta``) that one attempt may take. A plain ``def`` can't be
            interrupted: its attempt counts as failed, while its thread runs on.
        heartbeat_timeout: seconds (or a ``timedelta``) that may pass between two calls of
            ``current_activity().heartbeat()``: an attempt that falls silent for longer has failed. For activities that
            last, so that a stuck one is noticed before its ``timeout``.
        compensate: another activity that undoes this one, when the workflow fails or is cancelled after it has
            completed. It gets this one's arguments by name, and what it returned as ``result``, as far as it takes
            them.
        catalogue: where the name is registered.

    Raises:
        DuplicateNameError: the name is taken.
        DefinitionError: this can't be an activity, or can't be undone by that one.

    Example:
        >>> @activity(retry=RetryPolicy.fixed(3, 0.5), catalogue=Catalogue())
        ... async def charge(order_id: str, amount: int) -> str:
        ...     return f"receipt for {order_id}"
    """

    def define(function: Callable[..., Any]) -> Activity[..., Any]:
        _check_function(function, "activity")
        definition: Activity[..., Any] = Activity(
            function,
            _checked_name(name, function),
            retry=retry,
            transactional=transactional,
            timeout=timeout,
            heartbeat_timeout=heartbeat_timeout,
            compensate=compensate,
        )
        catalogue.add_activity(definition)
        return definition

    return define if fn is None else define(fn)


class ActivityDecorator(Protocol):
    """What ``@activity(…)`` with options returns."""

    @overload
    def __call__(self, fn: Callable[P, Coroutine[Any, Any, R]], /) -> Activity[P, R]: ...
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Activity[P, R]: ...


@overload
def workflow(fn: Callable[Concatenate[C, P], Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *,
    name: str | None = None,
    event_handler: bool = False,
    compare_inputs: bool = True,
    catalogue: Catalogue = DEFAULT_CATALOGUE,
) -> WorkflowDecorator: ...
def workflow(
    fn: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    event_handler: bool = False,
    compare_inputs: bool = True,
    catalogue: Catalogue = DEFAULT_CATALOGUE,
) -> Any:
    """Define a workflow: an ``async def`` that takes ``ctx: WorkflowContext`` first, then its input.

    Its code must be deterministic: side effects belong in activities; time, randomness and ids come
    from ``ctx``. Plain asyncio (``gather``, ``TaskGroup``, ``wait``, ``timeout``, ``sleep``) is durable.

    Args:
        name: how instances name it; by default the function's name.
        event_handler: whether a CloudEvent of this type may start it. Off by default, for security.
        compare_inputs: whether replay also compares the arguments of activities with the recorded ones, and
            parks the instance when they differ. Off, only ids, names and order are compared.
        catalogue: where the name is registered.

    Raises:
        DuplicateNameError: the name is taken.
        DefinitionError: this can't be a workflow.

    Example:
        >>> @workflow(catalogue=Catalogue())
        ... async def onboarding(ctx, user_id: str) -> str:
        ...     await ctx.sleep(60)
        ...     return user_id
    """

    def define(function: Callable[..., Any]) -> Workflow[..., Any]:
        _check_function(function, "workflow")
        if not inspect.iscoroutinefunction(function):
            raise DefinitionError(f"workflow {function.__name__!r} at {place_of(function)} must be an async def")
        first = next(iter(inspect.signature(function).parameters.values()), None)
        if first is None or first.kind not in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD):
            raise DefinitionError(
                f"workflow {function.__name__!r} at {place_of(function)} must take ctx: WorkflowContext first"
            )
        definition: Workflow[..., Any] = Workflow(
            function,
            _checked_name(name, function),
            event_handler=event_handler,
            compare_inputs=compare_inputs,
        )
        catalogue.add_workflow(definition)
        return definition

    return define if fn is None else define(fn)


class WorkflowDecorator(Protocol):
    """What ``@workflow(…)`` with options returns."""

    def __call__(self, fn: Callable[Concatenate[C, P], Coroutine[Any, Any, R]], /) -> Workflow[P, R]: ...


def _check_function(function: Any, kind: str) -> None:
    if isinstance(function, Activity | Workflow):
        raise DefinitionError(f"{function!r} is defined already; use one decorator, on the plain function")
    if not inspect.isfunction(function):
        raise DefinitionError(
            f"@{kind} takes a function, not {function!r}; wrap methods and callables in a module-level function"
        )
    if inspect.isasyncgenfunction(function) or inspect.isgeneratorfunction(function):
        raise DefinitionError(f"{kind} {function.__name__!r} at {place_of(function)} yields; return one value instead")


def _checked_name(name: str | None, function: Callable[..., Any]) -> str:
    chosen = function.__name__ if name is None else name
    if not is_name(chosen):
        raise DefinitionError(f"{chosen!r} is no name: give 1 to {MAX_NAME} characters without control characters")
    return plain(chosen)


def _checked_compensation(
    name: str, fn: Callable[..., Any], compensate: Activity[..., Any] | None
) -> Activity[..., Any] | None:
    if compensate is None:
        return None
    if not isinstance(compensate, Activity):
        raise DefinitionError(
            f"activity {name!r}: compensate={compensate!r} is no activity; give it @activity, for it runs durably, too"
        )
    known = {*inspect.signature(fn).parameters, "result"}
    for parameter in inspect.signature(compensate.fn).parameters.values():
        is_needed = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
            parameter.POSITIONAL_ONLY,
        )
        if is_needed and (parameter.name not in known or parameter.kind is parameter.POSITIONAL_ONLY):
            raise DefinitionError(
                f"activity {name!r} can't be undone by {compensate.name!r}, which needs {parameter.name!r}: there is "
                f"no argument of that name. It gets the arguments by name ({', '.join(sorted(known))})"
            )
    return compensate


def _checked_retry(owner: str, retry: RetryPolicy | None) -> RetryPolicy | None:
    if retry is not None and not isinstance(retry, RetryPolicy):
        raise DefinitionError(
            f"{owner}: retry={retry!r} is no RetryPolicy; for one attempt give RetryPolicy.no_retry()"
        )
    return retry


def _checked_timeout(name: str, timeout: Seconds | None) -> float | None:
    if timeout is None:
        return None
    timeout_s = as_seconds(timeout, name)
    if not timeout_s:
        raise ConfigurationError(f"{name}={timeout!r} leaves no time at all: give more than 0 seconds, or None")
    return timeout_s
