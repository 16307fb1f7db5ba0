"""The public names, and the tree of errors as it is drawn."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import romancy
from romancy import errors
from romancy.errors import RomancyError

PUBLIC = [
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


def test_public_names_are_these() -> None:
    assert sorted(romancy.__all__) == sorted(PUBLIC)
    assert len(set(romancy.__all__)) == len(romancy.__all__)


def test_every_public_name_exists_and_is_documented() -> None:
    for name in set(romancy.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(romancy, name)), name
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", romancy.__version__)


def test_public_names_are_those_that_type_checkers_see() -> None:
    tree = ast.parse(Path(romancy.__file__).read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "romancy" in str(node.module)]
    seen = {alias.name: str(node.module) for node in imports for alias in node.names}
    assert sorted(seen) == sorted(romancy.__all__)
    for name, module in seen.items():
        assert getattr(romancy, name) is getattr(import_module(module), name), name


def test_names_that_are_none_are_no_attributes_and_modules_are() -> None:
    assert not hasattr(romancy, "Worklfow")
    assert not hasattr(romancy, "__wrapped__")
    assert romancy.tuning.tune_garbage_collector
    assert set(romancy.__all__) <= set(dir(romancy))


def _drawn() -> dict[str, tuple[str | None, str]]:
    """Each error of the drawing with its parent and its remark."""
    lines = (errors.__doc__ or "").splitlines()
    tree: dict[str, tuple[str | None, str]] = {}
    path: list[str] = []
    for line in lines:
        match = re.match(r"^    ([│ ├└─]*)(\w+Error)\b(.*)$", line)
        if match:
            depth = len(match[1]) // 4
            path[depth:] = [match[2]]
            tree[match[2]] = (path[depth - 1] if depth else None, match[3])
    return tree


def test_tree_of_errors_is_drawn_as_it_is() -> None:
    drawn = _drawn()
    found = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, RomancyError) and kind.__module__ == errors.__name__
    }
    assert set(drawn) == set(found)
    for name, (parent, remark) in drawn.items():
        bases = [base.__name__ for base in found[name].__bases__]
        assert bases[0] == (parent or "Exception"), name
        also = re.findall(r"also a (\w+)", remark)
        assert bases[1:] == also, name


@pytest.mark.parametrize("name", [name for name in errors.__dict__ if name.endswith("Error")])
def test_every_error_is_public_and_under_one_root(name: str) -> None:
    assert name in romancy.__all__
    assert issubclass(getattr(romancy, name), RomancyError)


@pytest.mark.parametrize(
    ("kind", "also"),
    [
        (romancy.ActivityTimeoutError, TimeoutError),
        (romancy.ResultTimeoutError, TimeoutError),
        (romancy.EventTimeoutError, TimeoutError),
        (romancy.MessageTimeoutError, TimeoutError),
        (romancy.InstanceNotFoundError, LookupError),
        (romancy.UnknownWorkflowError, LookupError),
        (romancy.InvalidFilterError, ValueError),
        (romancy.InvalidPageTokenError, ValueError),
        (romancy.ConfigurationError, ValueError),
        (romancy.DatabaseURLError, ValueError),
    ],
)
def test_error_is_also_what_python_calls_it(kind: type[Exception], also: type[Exception]) -> None:
    assert issubclass(kind, also)


def test_app_loads_no_dialect_of_a_server() -> None:
    """They take a sixth of the time in which a process starts."""
    program = "import sys, romancy\nromancy.App\nprint([name for name in sys.modules if '.dialects.' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True)
    assert "sqlalchemy.dialects.sqlite.base" in done.stdout
    assert "mysql" not in done.stdout
    assert "postgresql" not in done.stdout
