"""``romancy worker``: find an app, run it until a signal comes, hand its instances back."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import logging
import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Any, Literal

from romancy.cli.lifeline import Lifeline
from romancy.errors import ConfigurationError, DatabaseError
from romancy.tuning import tune_garbage_collector

if TYPE_CHECKING:
    from romancy.app import App

HEALTH_CHECK_INTERVAL_S = 2.0
LONGEST_FAREWELLS_S = 15.0
"""After the grace: for transactions to end, for the rest to be written and handed back, and to leave."""
_NOT_THEIRS = {__file__, importlib.__file__}
Moment = Literal["started", "stopping", "stopped"]


def load_app(target: str) -> App:
    """The app that ``module:attribute`` names: an ``App``, or a callable that returns one.

    The current directory comes first on the import path.

    Raises:
        ConfigurationError: it can't be imported, or is no app; the message names the line at fault.
    """
    from romancy.app import App  # noqa: PLC0415

    module_name, _, attributes = target.partition(":")
    parts = [*module_name.split("."), *attributes.split(".")]
    if module_name.endswith(".py") or not all(part.isidentifier() for part in parts):
        raise ConfigurationError(f"{target!r} names no app: give module:attribute, such as {_suggestion(target)}")
    found: Any = _import(module_name)
    for part in attributes.split("."):
        if not hasattr(found, part):
            raise ConfigurationError(f"{target!r}: there is no {part!r}; {_apps_of(sys.modules[module_name])}")
        found = getattr(found, part)
    if not isinstance(found, App) and callable(found):
        found = _call(found, target)
    if not isinstance(found, App):
        kind = type(found).__name__
        raise ConfigurationError(f"{target!r} is of type {kind}, no App; {_apps_of(sys.modules[module_name])}")
    return found


async def run_until_signal(app: App, tell: Callable[[Moment], None], lifeline: Lifeline | None = None) -> None:
    """Run the app until SIGTERM or SIGINT, then shut it down in good order; a second signal ends the process.

    Args:
        tell: called once the app runs, when it is asked to stop, and once it has stopped.
        lifeline: asks it to stop, too, when it is cut.

    Raises:
        RomancyError: the app can't start, or stopped by itself.
    """
    loop = asyncio.get_running_loop()
    with _signals_caught(loop) as asked:
        tune_garbage_collector()
        stop_s = app.shutdown_grace_s + LONGEST_FAREWELLS_S
        if lifeline is not None:
            lifeline.when_cut(partial(_ask_from_thread, loop, asked), stop_s)
        await app.start()
        try:
            if lifeline is not None:
                lifeline.tell("started", stop_s)
            tell("started")
            await _until_asked_or_broken(app, asked)
            tell("stopping")
        finally:
            await app.shutdown()
        tell("stopped")


def _ask_from_thread(loop: asyncio.AbstractEventLoop, asked: asyncio.Event) -> None:
    with suppress(RuntimeError):  # the loop is closed: it has stopped already
        loop.call_soon_threadsafe(asked.set)


def leave(exit_code: int) -> None:
    """End the process if threads of activities that outlived their grace would hold it up."""
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        logging.shutdown()
        _exit_at_once(exit_code)


def number_process(app: App, number: int) -> None:
    """Show in names and in log lines which of several processes this is."""
    if not app.name.endswith(f"-{os.getpid()}"):
        app.name = f"{app.name}-{number}"
    multiprocessing.current_process().name = f"romancy-{number}"  # %(processName)s
    # Only where the app has set up no logging of its own.
    logging.basicConfig(format=f"process {number}: %(levelname)s %(name)s: %(message)s", level=logging.WARNING)


@contextmanager
def _signals_caught(loop: asyncio.AbstractEventLoop) -> Iterator[asyncio.Event]:
    """The event is set by the first signal.

    Not by ``loop.add_signal_handler``: a second signal must end a process whose loop is blocked, too.
    """
    asked = asyncio.Event()
    caught: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        # Counted in one step, for a second signal may interrupt the handler of the first.
        caught.append(number)
        if len(caught) > 1:
            _exit_at_once(128 + number)
        loop.call_soon_threadsafe(asked.set)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


async def _until_asked_or_broken(app: App, asked: asyncio.Event) -> None:
    while True:
        try:
            async with asyncio.timeout(HEALTH_CHECK_INTERVAL_S):
                await asked.wait()
        except TimeoutError:
            await _check(app)
        else:
            return


async def _check(app: App) -> None:
    """Raise if the app has stopped by itself, for then this process is of no use."""
    try:
        await app.get_instance("")
    except DatabaseError:
        # A database that is away for a while is the app's own business.
        return


def _import(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigurationError(
                f"there is no module {name!r} in {here} or among the installed packages"
            ) from error
        raise _failed(f"importing {name!r}", error) from error
    except (Exception, SystemExit) as error:
        raise _failed(f"importing {name!r}", error) from error


def _call(factory: Callable[[], Any], target: str) -> Any:
    try:
        made = factory()
    except (Exception, SystemExit) as error:
        raise _failed(f"{target!r} is called for an App, and", error) from error
    if inspect.iscoroutine(made):
        made.close()
    return made


def _failed(what: str, error: BaseException) -> ConfigurationError:
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    place = _place(error)
    return ConfigurationError(f"{what} failed with {text}" + (f" ({place})" if place else ""))


def _place(error: BaseException) -> str | None:
    """``file:line`` of the user's own code where it went wrong; a library's only when there is no other."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in _NOT_THEIRS]
    frames = [f for f in frames if not f.filename.startswith("<")]
    if not frames:
        return None
    here = str(Path.cwd())
    own = [f for f in frames if f.filename.startswith(here) and "site-packages" not in f.filename]
    frame = (own or frames)[-1]
    return f"{frame.filename}:{frame.lineno}"


def _suggestion(target: str) -> str:
    module, _, attribute = target.partition(":")
    module = module.removesuffix(".py").replace("\\", "/").strip("./").replace("/", ".")
    is_module = all(part.isidentifier() for part in module.split("."))
    return f"{module if is_module else 'shop.main'}:{attribute if attribute.isidentifier() else 'app'}"


def _apps_of(module: ModuleType) -> str:
    from romancy.app import App  # noqa: PLC0415

    apps = [f"{module.__name__}:{name}" for name, value in vars(module).items() if isinstance(value, App)]
    return f"apps there: {', '.join(apps)}" if apps else f"module {module.__name__!r} holds no App object"
