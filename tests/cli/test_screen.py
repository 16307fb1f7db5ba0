"""What a terminal, a pipe or a file can show."""

from __future__ import annotations

import io
import os
import pty

import pytest

from romancy.cli.screen import UNBROKEN, Screen


class Terminal(io.TextIOWrapper):
    """Says that it is one; its size is that of the descriptor, if there is one."""

    def __init__(self, descriptor: int | None = None, encoding: str = "utf-8") -> None:
        super().__init__(io.BytesIO(), encoding=encoding)
        self._descriptor = descriptor

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._descriptor is None:
            raise io.UnsupportedOperation("fileno")
        return self._descriptor


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_a_pipe_is_never_broken_nor_painted() -> None:
    assert Screen.of(io.TextIOWrapper(io.BytesIO(), encoding="ascii")) == Screen(UNBROKEN, "ascii", has_color=False)


def test_a_terminal_has_its_width_and_colors() -> None:
    other, descriptor = pty.openpty()
    try:
        assert Screen.of(Terminal(descriptor)).width == 80  # a terminal that knows no size says 0
        import termios

        termios.tcsetwinsize(descriptor, (24, 133))
        assert Screen.of(Terminal(descriptor)) == Screen(133, "utf-8", has_color=True)
    finally:
        os.close(other)
        os.close(descriptor)
    assert Screen.of(Terminal()).width == 80


@pytest.mark.parametrize(
    ("environment", "width", "has_color"),
    [
        ({"COLUMNS": "42"}, 42, True),
        ({"COLUMNS": "0"}, 80, True),
        ({"COLUMNS": "wide"}, 80, True),
        ({"NO_COLOR": "1"}, 80, False),
        ({"NO_COLOR": ""}, 80, True),
        ({"TERM": "dumb"}, 80, False),
        ({"TERM": "dumb", "FORCE_COLOR": "1"}, 80, True),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, 80, False),
    ],
)
def test_the_environment_overrules(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], width: int, has_color: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Screen.of(Terminal()) == Screen(width, "utf-8", has_color)


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [("utf-8", "é 東 …"), ("latin-1", "é \\u6771 ..."), ("ascii", "\\xe9 \\u6771 ..."), ("cp1252", "é \\u6771 …")],
)
def test_what_an_encoding_lacks_is_escaped(encoding: str, shown: str) -> None:
    assert Screen(80, encoding).show("é 東 …") == shown


def test_paint_is_for_screens_with_colors() -> None:
    assert Screen(80).paint("x", "bold red") == "x"
    assert Screen(80, has_color=True).paint("x", "bold red") == "\x1b[1;31mx\x1b[0m"
    assert Screen(80, has_color=True).paint("", "bold") == ""
