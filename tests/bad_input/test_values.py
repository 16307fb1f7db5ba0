"""Bad values are refused where they are given, by name; nothing is stored and nothing is retried."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from romancy import (
    App,
    AppNotRunningError,
    Catalogue,
    ConfigurationError,
    DuplicateNameError,
    HistoryKind,
    InstanceConflictError,
    InstanceNotFoundError,
    InstanceStateError,
    InvalidFilterError,
    InvalidPageTokenError,
    PayloadTooLargeError,
    RetryExhaustedError,
    RetryPolicy,
    SerializationError,
    Status,
    UnknownWorkflowError,
    WorkflowContext,
    WorkflowFailedError,
    activity,
    workflow,
)

MIB = 1024 * 1024
TIMEOUT_S = 20.0


class Opaque:
    """Nothing that could be stored."""


async def _stored(app: App) -> int:
    return len((await app.list_instances()).instances)


# -- values that can't be stored ----------------------------------------------------------------------------------


async def test_input_that_cannot_be_serialised_is_refused_at_the_call_and_nothing_is_stored() -> None:
    @workflow
    async def flow(ctx: WorkflowContext, thing: Any) -> None: ...

    async with App(":memory:") as app:
        for value in (Opaque(), {"a": Opaque()}, {1: 2}, float("nan"), "\ud800", {1, 2}, b"x"):
            with pytest.raises(
                SerializationError, match=f"workflow 'flow': argument 'thing' of type {type(value).__name__}"
            ):
                await app.start_workflow(flow, value)
        assert await _stored(app) == 0


async def test_input_of_a_wrong_type_is_refused_at_the_call() -> None:
    @workflow
    async def flow(ctx: WorkflowContext, number: int) -> None: ...

    async with App(":memory:") as app:
        with pytest.raises(SerializationError, match="argument 'number' of type str can't be stored"):
            await app.start_workflow(flow, "seven")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="missing a required argument: 'number'"):
            await app.start_workflow(flow)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="too many positional arguments"):
            await app.start_workflow(flow, 1, 2)  # type: ignore[call-overload]
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            await app.start_workflow(flow, 1, other=2)
        assert await _stored(app) == 0


async def test_activity_argument_that_cannot_be_serialised_fails_at_the_call_site_without_an_attempt() -> None:
    attempts: list[Any] = []

    @activity
    async def act(first: int, thing: Any) -> None:
        attempts.append(thing)

    caught: list[SerializationError] = []

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await act(1, Opaque())
        except SerializationError as error:
            caught.append(error)
        return "went on"

    async with App(":memory:") as app:
        handle = await app.start_workflow(flow)
        assert await handle.result(timeout=TIMEOUT_S) == "went on"
        assert "activity 'act': argument 'thing' of type Opaque can't be stored" in str(caught[0])
        assert attempts == []
        assert await app.get_history(handle.instance_id) == []


async def test_activity_argument_of_a_wrong_type_fails_at_the_call_site() -> None:
    @activity
    async def act(number: int) -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await act("seven")  # type: ignore[arg-type]

    async with App(":memory:") as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowFailedError) as failed:
            await handle.result(timeout=TIMEOUT_S)
        assert isinstance(failed.value.__cause__, SerializationError)
        assert "argument 'number' of type str" in str(failed.value)


async def test_activity_result_that_cannot_be_serialised_fails_at_once_and_is_not_retried() -> None:
    attempts: list[int] = []

    @activity(retry=RetryPolicy(max_attempts=0))
    async def act() -> Any:
        attempts.append(1)
        return Opaque()

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await act()

    async with App(":memory:") as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowFailedError, match="activity 'act': its result of type Opaque") as failed:
            await handle.result(timeout=TIMEOUT_S)
        assert type(failed.value.__cause__) is SerializationError
        assert attempts == [1]
        kinds = [event.kind for event in await app.get_history(handle.instance_id)]
        assert kinds == [HistoryKind.ACTIVITY_FAILED, HistoryKind.WORKFLOW_FAILED]


async def test_workflow_result_that_cannot_be_serialised_fails_the_workflow_by_name() -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> Any:
        return Opaque()

    async with App(":memory:") as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowFailedError, match="workflow 'flow': its result of type Opaque"):
            await handle.result(timeout=TIMEOUT_S)


async def test_exception_that_cannot_be_printed_or_serialised_does_not_stop_the_instance() -> None:
    class OddError(Exception):
        def __init__(self) -> None:
            super().__init__(Opaque(), float("nan"), "\ud800")
            self.thing = Opaque()
            self.__dict__["\ud800"] = 1

        def __str__(self) -> str:
            raise RuntimeError("no text")

    @activity(retry=RetryPolicy.fixed(2, 0))
    async def act() -> None:
        raise OddError

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        try:
            await act()
        except RetryExhaustedError as error:
            return f"{error.attempts} attempts"
        return "not reached"

    @workflow
    async def fails(ctx: WorkflowContext) -> None:
        raise OddError

    async with App(":memory:") as app:
        assert await (await app.start_workflow(flow)).result(timeout=TIMEOUT_S) == "2 attempts"
        with pytest.raises(WorkflowFailedError, match="its text can't be read"):
            await (await app.start_workflow(fails)).result(timeout=TIMEOUT_S)


# -- payloads that are too large ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "options"), [(2 * MIB, {}), (1_000, {"max_payload_bytes": 1_000})])
async def test_input_over_the_limit_is_refused_and_at_the_limit_taken(limit: int, options: dict[str, Any]) -> None:
    @workflow
    async def flow(ctx: WorkflowContext, text: str) -> int:
        return len(text)

    room = limit - len('{"text":""}')
    async with App(":memory:", **options) as app:
        with pytest.raises(PayloadTooLargeError, match=rf"the input of workflow 'flow' takes .* limit of {limit:,}"):
            await app.start_workflow(flow, "x" * (room + 1))
        assert await _stored(app) == 0
        handle = await app.start_workflow(flow, "x" * room)
        assert await handle.result(timeout=TIMEOUT_S) == room


@pytest.mark.parametrize(("limit", "options"), [(2 * MIB, {}), (1_000, {"max_payload_bytes": 1_000})])
@pytest.mark.parametrize("what", ["argument", "result", "workflow result"])
async def test_payload_over_the_limit_fails_by_name_and_is_not_retried(
    what: str, limit: int, options: dict[str, Any]
) -> None:
    attempts: list[int] = []

    @activity(retry=RetryPolicy(max_attempts=0))
    async def act(text: str, size: int) -> str:
        attempts.append(size)
        return "x" * size

    @workflow
    async def flow(ctx: WorkflowContext) -> str:
        match what:
            case "argument":
                await act("x" * limit, 0)
            case "result":
                await act("", limit)
            case _:
                return "x" * limit
        return ""

    async with App(":memory:", **options) as app:
        handle = await app.start_workflow(flow)
        with pytest.raises(WorkflowFailedError, match=r"more than the limit of") as failed:
            await handle.result(timeout=TIMEOUT_S)
        named = {
            "argument": "the input of activity 'act'",
            "result": "the result of activity 'act'",
            "workflow result": "the result of workflow 'flow'",
        }[what]
        assert named in str(failed.value)
        assert type(failed.value.__cause__) is PayloadTooLargeError
        assert attempts == ([limit] if what == "result" else [])


# -- names and ids ------------------------------------------------------------------------------------------------


async def test_unknown_workflow_is_refused_with_the_known_names() -> None:
    @workflow
    async def known(ctx: WorkflowContext) -> None: ...

    @workflow(catalogue=Catalogue())
    async def foreign(ctx: WorkflowContext) -> None: ...

    async with App(":memory:") as app:
        with pytest.raises(UnknownWorkflowError, match="no workflow 'nothing'; it has: known"):
            await app.start_workflow("nothing")
        with pytest.raises(UnknownWorkflowError, match="no workflow 'foreign'"):
            await app.start_workflow(foreign)
        with pytest.raises(UnknownWorkflowError):
            await app.start_workflow(42)  # type: ignore[call-overload]
        with pytest.raises(LookupError):
            await app.start_workflow("")
        assert await _stored(app) == 0


async def test_workflow_defined_after_the_start_is_refused_with_the_reason() -> None:
    @workflow
    async def early(ctx: WorkflowContext) -> None: ...

    async with App(":memory:") as app:

        @workflow
        async def late(ctx: WorkflowContext) -> None: ...

        for _ in range(2):
            with pytest.raises(UnknownWorkflowError, match="workflow 'late' was defined after the app started"):
                await asyncio.wait_for(app.start_workflow(late), TIMEOUT_S / 4)
        assert await _stored(app) == 0


async def test_another_workflow_of_a_known_name_is_refused() -> None:
    @workflow(name="same")
    async def mine(ctx: WorkflowContext) -> None: ...

    @workflow(name="same", catalogue=Catalogue())
    async def other(ctx: WorkflowContext) -> None: ...

    async with App(":memory:") as app:
        with pytest.raises(UnknownWorkflowError, match="another workflow named 'same', defined at"):
            await app.start_workflow(other)


async def test_activity_id_used_twice_in_a_run_is_refused() -> None:
    @activity
    async def act() -> None: ...

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        await act.options(id="x")()
        await act.options(id="x")()

    async with App(":memory:") as app:
        with pytest.raises(WorkflowFailedError, match="the activity id 'x' is used twice") as failed:
            await (await app.start_workflow(flow)).result(timeout=TIMEOUT_S)
        assert isinstance(failed.value.__cause__, DuplicateNameError)


@pytest.mark.parametrize("id", ["", "x" * 201, "a\nb", "\0", "\ud800", 5])
async def test_bad_instance_id_is_refused(id: Any) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(":memory:") as app:
        with pytest.raises(ConfigurationError, match="id="):
            await app.start_workflow(flow, id=id)
        assert await _stored(app) == 0


async def test_id_of_another_start_is_a_conflict() -> None:
    @workflow
    async def flow(ctx: WorkflowContext, number: int) -> int:
        return number

    @workflow
    async def other(ctx: WorkflowContext, number: int) -> int:
        return number

    async with App(":memory:") as app:
        first = await app.start_workflow(flow, 1, id="a")
        again = await app.start_workflow(flow, 1, id="a")
        assert await first.result(timeout=TIMEOUT_S) == await again.result(timeout=TIMEOUT_S) == 1
        with pytest.raises(InstanceConflictError, match="'a' was started with another input"):
            await app.start_workflow(flow, 2, id="a")
        with pytest.raises(InstanceConflictError, match="'a' is of workflow 'flow', not 'other'"):
            await app.start_workflow(other, 1, id="a")
        assert await _stored(app) == 1


async def test_id_that_nobody_has_is_not_found() -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(":memory:") as app:
        assert await app.get_instance("nobody") is None
        for call in (app.get_handle, app.get_history, app.resume):
            with pytest.raises(InstanceNotFoundError, match="there is no instance 'nobody'"):
                await call("nobody")
        handle = await app.start_workflow(flow)
        await handle.result(timeout=TIMEOUT_S)
        with pytest.raises(InstanceStateError, match="is completed, not suspended"):
            await app.resume(handle.instance_id)


# -- queries ------------------------------------------------------------------------------------------------------


async def test_bad_filter_path_is_a_value_error_that_names_it() -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(":memory:", worker=False) as app:
        for path in ("", "a..b", 'x"y', "a\\b", 5):
            with pytest.raises(InvalidFilterError, match="the path"):
                await app.find_instances({path: 1})  # type: ignore[dict-item]
        with pytest.raises(ValueError, match="of type list"):
            await app.find_instances({"a": [1]})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ({"limit": 0}, "limit=0"),
        ({"limit": 1_001}, "limit=1001: give a whole number from 1 to 1000"),
        ({"limit": "5"}, "limit='5'"),
        ({"limit": True}, "limit=True"),
        ({"status": "nope"}, "status='nope': give one of pending, running"),
        ({"status": 5}, "status=5"),
        ({"workflow_name": 5}, "5 is no text"),
        ({"workflow_name": "\ud800"}, "no valid text"),
        ({"instance_id": b"x"}, "no text"),
        ({"started_after": "2024-01-01"}, "started_after='2024-01-01': give an aware datetime"),
        ({"started_before": 5}, "started_before=5"),
        ({"page_token": "nonsense"}, "page_token='nonsense' is none"),
        ({"page_token": ""}, "page_token='' is none"),
        ({"page_token": "ü"}, "page_token='ü' is none"),
        ({"page_token": 5}, "page_token=5 is none"),
        ({"page_token": "WzEsMl0"}, "is none"),
        ({"page_token": "WzEsICJhIiwgIngiXQ"}, "belongs to another query"),
    ],
    ids=lambda part: str(part)[:30].replace("\ud800", "?") if isinstance(part, str) else next(iter(part)),
)
async def test_bad_query_is_refused_by_name(query: dict[str, Any], says: str) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(":memory:", worker=False) as app:
        with pytest.raises(InvalidFilterError, match=says) as caught:
            await app.list_instances(**query)
        assert isinstance(caught.value, InvalidPageTokenError) == ("page_token" in query)


async def test_naive_time_in_a_query_is_refused() -> None:
    from datetime import datetime

    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(":memory:", worker=False) as app:
        with pytest.raises(InvalidFilterError, match="has no time zone"):
            await app.list_instances(started_after=datetime(2024, 1, 1))


# -- the app itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"max_payload_bytes": 0},
        {"max_instances": -1},
        {"max_hot_instances": "5"},
        {"max_activities": True},
        {"activity_threads": 1.5},
        {"lease_ttl": 0.01},
        {"lease_ttl": -1},
        {"shutdown_grace": "1"},
        {"stall_warning": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_bad_option_of_the_app_is_refused_by_name(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=f"^{name}="):
        App(":memory:", **options)


async def test_app_that_does_not_run_says_how_to_start_it(database: Path) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    app = App(database)
    calls: list[Any] = [
        lambda: app.start_workflow(flow),
        lambda: app.get_instance("x"),
        lambda: app.list_instances(),
        lambda: app.find_instances({}),
        lambda: app.get_history("x"),
        lambda: app.get_handle("x"),
        lambda: app.resume("x"),
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(AppNotRunningError, match="async with App"):
                await call()
        async with app:
            with pytest.raises(InstanceStateError, match="running already"):
                await app.start()
    await app.shutdown()


async def test_app_without_any_workflow_can_still_read(database: Path) -> None:
    @workflow
    async def flow(ctx: WorkflowContext) -> None: ...

    async with App(database) as app:
        handle = await app.start_workflow(flow, id="done")
        await handle.result(timeout=TIMEOUT_S)
    for has_worker in (False, True):
        async with App(database, workflows=[], worker=has_worker) as app:
            instance = await app.get_instance("done")
            assert instance is not None
            assert instance.status is Status.COMPLETED
