"""The watchdog's thread, on sockets of the test's own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from romancy.storage.watchdog import Watchdog, answered_within
from tests.support import RESULT_TIMEOUT_S


@pytest.fixture
def watchdog() -> Iterator[Watchdog]:
    dog = Watchdog(0.1)
    dog.start()
    yield dog
    dog.stop()


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection: ours, and the peer's, which says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = socket.create_connection(server.getsockname())
        theirs, _ = server.accept()
    with ours, theirs:
        yield ours, theirs


def test_line_whose_answer_is_overdue_is_cut(watchdog: Watchdog, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    ours.settimeout(RESULT_TIMEOUT_S)
    with answered_within(watchdog.hold(ours.fileno()), 0.05):
        assert ours.recv(1) == b""


def test_line_is_left_alone_while_nobody_waits(watchdog: Watchdog, ends: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = ends
    line = watchdog.hold(ours.fileno())
    with answered_within(line, 0.05):
        theirs.sendall(b"answer")
        assert ours.recv(6) == b"answer"
    assert line.deadline is None
    ours.settimeout(0.5)
    with pytest.raises(TimeoutError):
        ours.recv(1)


def test_inner_limits_give_way_to_outer_ones(watchdog: Watchdog, ends: tuple[socket.socket, socket.socket]) -> None:
    line = watchdog.hold(ends[0].fileno())
    with answered_within(line, 100):
        outer = line.deadline
        with answered_within(line, 50):
            assert line.deadline != outer
        assert line.deadline == outer


def test_all_lines_can_be_cut_from_another_thread(
    watchdog: Watchdog, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = ends
    ours.settimeout(RESULT_TIMEOUT_S)
    line = watchdog.hold(ours.fileno())
    threading.Thread(target=watchdog.cut_all).start()
    assert ours.recv(1) == b""
    line.close()
    line.cut()  # harmless by then


def test_system_is_to_ask_whether_the_peer_is_there(ends: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = ends
    line = Watchdog(10).hold(ours.fileno())
    assert ours.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT, socket.TCP_USER_TIMEOUT)
        assert [ours.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [5, 1, 3, 10_000]
    del line


def test_connection_that_is_closed_already_is_left_to_its_driver(
    watchdog: Watchdog, ends: tuple[socket.socket, socket.socket]
) -> None:
    ours, _ = ends
    ours.close()
    line = watchdog.hold(ours.fileno())
    line.cut()
    line.close()
