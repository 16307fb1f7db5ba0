"""The examples in public docstrings do what they show."""

from __future__ import annotations

import doctest
import inspect
from types import ModuleType
from typing import Any

import pytest

import romancy
from romancy import app, definitions, errors, retry, testing

OPTIONS = doctest.ELLIPSIS | doctest.IGNORE_EXCEPTION_DETAIL


async def _remind(ctx: romancy.WorkflowContext, user_id: str) -> str:
    await ctx.sleep(7 * 86_400)
    return "reminded"


def _globals(module: ModuleType) -> dict[str, Any]:
    return {name: getattr(romancy, name) for name in romancy.__all__} | vars(module)


@pytest.mark.parametrize("module", [definitions, errors, retry, testing, app], ids=lambda module: module.__name__)
def test_examples_run_as_shown(module: ModuleType) -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(optionflags=OPTIONS)
    examples = [test for test in finder.find(module, extraglobs=_globals(module)) if test.examples]
    assert examples, "the module has no examples any more"
    reports: list[str] = []
    for example in examples:
        runner.run(example, out=reports.append)
    assert not runner.summarize(verbose=False).failed, "".join(reports)


async def test_example_of_the_virtual_clock_does_what_it_shows() -> None:
    from datetime import timedelta

    remind = romancy.workflow(name="remind")(_remind)
    doc = inspect.getdoc(testing.VirtualClock) or ""
    lines = [line.strip()[4:] for line in doc.splitlines() if line.strip().startswith((">>> ", "... "))]
    scope: dict[str, Any] = {
        "App": romancy.App,
        "VirtualClock": testing.VirtualClock,
        "timedelta": timedelta,
        "remind": remind,
    }
    exec("\n".join(lines), scope)
    await scope["test_reminder_comes_after_a_week"]()
