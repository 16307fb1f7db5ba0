"""What may be defined, under which name, and what a definition is outside of a workflow."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from romancy import (
    Activity,
    App,
    Catalogue,
    ConfigurationError,
    DefinitionError,
    DuplicateNameError,
    NotInActivityError,
    RetryPolicy,
    Workflow,
    WorkflowContext,
    activity,
    current_activity,
    workflow,
)
from romancy.definitions import DEFAULT_CATALOGUE
from romancy.testing import isolated_catalogue


def test_name_is_the_functions_or_the_given_one() -> None:
    @activity
    async def charge() -> None: ...

    @activity(name="other name")
    def refund() -> None: ...

    @workflow(name="flow")
    async def whole(ctx: WorkflowContext) -> None: ...

    assert (charge.name, refund.name, whole.name) == ("charge", "other name", "flow")
    assert {"charge", "other name"} <= set(DEFAULT_CATALOGUE.activities)
    assert DEFAULT_CATALOGUE.workflows["flow"] is whole


@pytest.mark.parametrize("kind", ["workflow", "activity"])
def test_second_definition_of_a_name_is_an_error_that_names_both_places(kind: str) -> None:
    decorate: Any = {"workflow": workflow, "activity": activity}[kind]

    @decorate(name="twice")
    async def first(ctx: Any) -> None: ...

    async def second(ctx: Any) -> None: ...

    with pytest.raises(DuplicateNameError) as caught:
        decorate(name="twice")(second)
    text = str(caught.value)
    assert first.place in text
    assert f"{__file__}:{second.__code__.co_firstlineno}" in text
    assert first.place != f"{__file__}:{second.__code__.co_firstlineno}"
    assert "'twice'" in text


def test_local_function_defined_again_at_the_same_place_is_a_second_definition() -> None:
    def define() -> None:
        @activity
        async def local() -> None: ...

    define()
    with pytest.raises(DuplicateNameError):
        define()


def test_a_workflow_and_an_activity_may_share_a_name() -> None:
    @workflow(name="same")
    async def one(ctx: WorkflowContext) -> None: ...

    @activity(name="same")
    async def two() -> None: ...

    assert one.name == two.name


def test_module_may_be_reloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "reloaded_flows.py").write_text(
        "from romancy import activity, workflow\n"
        "@activity\nasync def step() -> int: return 1\n"
        "@workflow\nasync def flow(ctx) -> int: return await step()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        module = importlib.import_module("reloaded_flows")
        first = module.flow
        module = importlib.reload(module)
        assert module.flow is not first
        assert DEFAULT_CATALOGUE.workflows["flow"] is module.flow
    finally:
        sys.modules.pop("reloaded_flows", None)


class _Callable:
    def __call__(self, ctx: Any) -> None: ...


async def _agen(ctx: Any) -> AsyncIterator[int]:
    yield 1


def _gen(ctx: Any) -> Iterator[int]:
    yield 1


async def _plain(ctx: Any) -> None: ...


@pytest.mark.parametrize("kind", ["workflow", "activity"])
@pytest.mark.parametrize(
    ("thing", "says"),
    [
        (_Callable(), "takes a function"),
        (functools.partial(_plain), "takes a function"),
        (len, "takes a function"),
        (_Callable, "takes a function"),
        ("name", "takes a function"),
        (_agen, "yields"),
        (_gen, "yields"),
    ],
    ids=["callable", "partial", "builtin", "class", "text", "async-generator", "generator"],
)
def test_what_is_no_plain_function_cannot_be_defined(kind: str, thing: Any, says: str) -> None:
    decorate: Any = {"workflow": workflow, "activity": activity}[kind]
    with pytest.raises(DefinitionError, match=says):
        decorate(thing)


@pytest.mark.parametrize("kind", ["workflow", "activity"])
def test_definition_cannot_be_defined_again(kind: str) -> None:
    decorate: Any = {"workflow": workflow, "activity": activity}[kind]

    @activity
    async def once(ctx: Any) -> None: ...

    with pytest.raises(DefinitionError, match="defined already"):
        decorate(once)


def test_workflow_must_be_async() -> None:
    with pytest.raises(DefinitionError, match=r"workflow 'sync' at .*must be an async def"):

        @workflow  # type: ignore[arg-type]
        def sync(ctx: WorkflowContext) -> None: ...


def test_workflow_must_take_its_context_first() -> None:
    async def nothing() -> None: ...
    async def only_keyword(*, ctx: Any) -> None: ...
    async def only_args(*ctx: Any) -> None: ...

    for function in (nothing, only_keyword, only_args):
        with pytest.raises(DefinitionError, match="must take ctx: WorkflowContext first"):
            workflow(function)  # type: ignore[type-var]


@pytest.mark.parametrize("name", ["", "x" * 201, "a\nb", "a\0", "\ud800", 5, b"x"])
def test_bad_name_is_refused(name: Any) -> None:
    with pytest.raises(DefinitionError, match="is no name"):
        workflow(name=name)(_plain)
    with pytest.raises(DefinitionError, match="is no name"):
        activity(name=name)(_plain)


@pytest.mark.parametrize("id", ["", "x" * 201, "a\nb", "\ud800", 5])
def test_bad_activity_id_is_refused(id: Any) -> None:
    @activity
    async def act() -> None: ...

    with pytest.raises(DefinitionError, match=r"act\.options\(id="):
        act.options(id=id)


@pytest.mark.parametrize("timeout", [-1, 0, "1", float("nan"), float("inf"), True])
def test_bad_timeout_is_refused(timeout: Any) -> None:
    @activity
    async def act() -> None: ...

    with pytest.raises(ConfigurationError, match="timeout="):
        act.options(timeout=timeout)
    with pytest.raises(ConfigurationError, match="timeout="):
        activity(timeout=timeout)(_plain)


def test_retry_that_is_no_policy_is_refused() -> None:
    @activity
    async def act() -> None: ...

    with pytest.raises(DefinitionError, match="retry=3 is no RetryPolicy"):
        act.options(retry=3)  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="retry=3 is no RetryPolicy"):
        activity(retry=3)(_plain)  # type: ignore[call-overload]


async def test_outside_a_workflow_an_async_activity_is_its_coroutine() -> None:
    @activity
    async def double(number: int) -> int:
        return number * 2

    coroutine = double(4)
    assert inspect.iscoroutine(coroutine)
    assert await coroutine == 8
    assert await double.options(id="x:1", retry=RetryPolicy.no_retry(), timeout=1)(5) == 10


def test_outside_a_workflow_a_plain_activity_is_its_value() -> None:
    @activity
    def double(number: int) -> int:
        return number * 2

    result: Any = double(4)
    assert result == 8
    bound: Any = double.options(id="x:1")(5)
    assert bound == 10


async def test_outside_a_workflow_nothing_is_serialised_and_there_is_no_context() -> None:
    @activity
    async def identity(thing: Any) -> Any:
        with pytest.raises(NotInActivityError):
            current_activity()
        return thing

    thing = object()
    assert await identity(thing) is thing


async def test_workflow_called_with_a_context_is_the_plain_function() -> None:
    @workflow
    async def flow(ctx: Any, number: int) -> tuple[Any, int]:
        return ctx, number

    assert await flow("a stand-in", 5) == ("a stand-in", 5)


async def test_workflow_called_inside_a_workflow_is_a_part_of_it() -> None:
    @activity
    async def step(number: int) -> int:
        return number + 1

    @workflow
    async def inner(ctx: WorkflowContext, number: int) -> int:
        return await step(number)

    @workflow
    async def outer(ctx: WorkflowContext) -> int:
        return await inner(ctx, 1) + await step(10)

    async with App(":memory:") as app:
        handle = await app.start_workflow(outer)
        assert await handle.result(timeout=10) == 13
        assert [event.activity_id for event in await app.get_history(handle.instance_id)] == ["step:1", "step:2"]


def test_definition_keeps_the_functions_face() -> None:
    @activity
    async def act() -> None:
        """What it does."""

    @workflow
    async def flow(ctx: WorkflowContext) -> None:
        """What it orders."""

    assert act.__doc__ == "What it does."
    assert flow.__doc__ == "What it orders."
    assert act.__name__ == "act"
    assert act.__module__ == flow.__module__ == __name__
    assert repr(act) == f"<activity 'act' at {act.place}>"
    assert repr(flow) == f"<workflow 'flow' at {flow.place}>"
    assert inspect.signature(act) == inspect.signature(act.fn)
    assert isinstance(act, Activity)
    assert isinstance(flow, Workflow)


def test_event_handler_is_off_unless_asked_for() -> None:
    @workflow
    async def closed(ctx: WorkflowContext) -> None: ...

    @workflow(event_handler=True)
    async def opened(ctx: WorkflowContext) -> None: ...

    assert not closed.event_handler
    assert opened.event_handler


def test_catalogues_keep_definitions_apart() -> None:
    one, two = Catalogue(), Catalogue()
    first = activity(name="same", catalogue=one)(_plain)
    second = activity(name="same", catalogue=two)(_plain)
    assert list(one) == [first]
    assert list(two) == [second]
    assert "same" not in DEFAULT_CATALOGUE.activities


def test_isolated_definitions_vanish() -> None:
    before = DEFAULT_CATALOGUE.workflows
    with isolated_catalogue():
        workflow(name="vanishes")(_plain)
        assert "vanishes" in DEFAULT_CATALOGUE.workflows
    assert DEFAULT_CATALOGUE.workflows == before


def test_app_takes_workflows_only() -> None:
    for thing in (_plain, activity(name="act")(_plain), "name"):
        with pytest.raises(DefinitionError, match="is no workflow"):
            App(":memory:", workflows=[thing])  # type: ignore[list-item]


def test_app_refuses_two_workflows_of_one_name() -> None:
    one = workflow(name="same", catalogue=Catalogue())(_plain)

    async def other(ctx: Any) -> None: ...

    two = workflow(name="same", catalogue=Catalogue())(other)
    with pytest.raises(DuplicateNameError):
        App(":memory:", workflows=[one, two])
