"""The listener's thread, on connections that the test plays."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest

from romancy.storage import listener as listener_module
from romancy.storage.address import parse_address
from romancy.storage.listener import LONGEST_WAIT_S, Listener
from romancy.storage.mysql import Ear
from romancy.storage.stores import make_store
from tests.support import RESULT_TIMEOUT_S


class SilentLink:
    """Hears nothing until it is closed or broken."""

    def __init__(self) -> None:
        self.ended = threading.Event()
        self.is_broken = False

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        raise AssertionError

    def close(self) -> None:
        self.ended.set()


def test_listener_looks_once_it_listens_and_again_after_each_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was said before it listened, or while its connection was lost, nobody says again."""
    monkeypatch.setattr(listener_module, "RECONNECT_WAIT_S", 0.01)
    links: list[SilentLink] = []
    steps: list[str] = []
    looked = threading.Semaphore(0)

    def connect() -> SilentLink:
        steps.append("listens")
        links.append(SilentLink())
        return links[-1]

    def wait(link: Any, timeout_s: float) -> None:
        link.ended.wait(RESULT_TIMEOUT_S)
        if link.is_broken:
            raise ConnectionError

    def look() -> None:
        steps.append("looks")
        looked.release()

    listener = Listener(connect, wait, SilentLink.close, look)  # type: ignore[arg-type]
    listener.start()
    try:
        assert looked.acquire(timeout=RESULT_TIMEOUT_S)
        links[-1].is_broken = True
        links[-1].ended.set()
        assert looked.acquire(timeout=RESULT_TIMEOUT_S)
    finally:
        listener.stop()
    assert steps == ["listens", "looks", "listens", "looks"]


@pytest.fixture(params=["postgresql", "mysql"])
def url(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(f"{request.param}_url"))


def test_listener_hears_and_ends_in_the_middle_of_its_wait(url: str) -> None:
    store = make_store(parse_address(url), [])
    store.open(migrate=True)
    hints = threading.Semaphore(0)
    try:
        store.start_listening(hints.release)
        assert hints.acquire(timeout=RESULT_TIMEOUT_S)  # it listens
        while not hints.acquire(timeout=0.05):  # a sleeper of MySQL may not yet be asleep
            store.tell_others().result()
        begin = time.monotonic()
        store.stop_listening()
        assert time.monotonic() - begin < LONGEST_WAIT_S / 4
    finally:
        store.close()


def test_who_wakes_others_does_not_wait_for_them(url: str) -> None:
    """On MariaDB all that sleep share one mutex: many that wake many would stand still with it for 2 s."""
    heard = threading.Semaphore(0)
    with ExitStack() as stack:
        stores = [make_store(parse_address(url), []) for _ in range(4)]
        for store in stores:
            store.open(migrate=True)
            stack.callback(store.close)
            store.start_listening(heard.release)
            stack.callback(store.stop_listening)

        def wake_often(store: Any) -> float:
            longest_s = 0.0
            for _ in range(150):
                began_at = time.monotonic()
                store.tell_others().result(RESULT_TIMEOUT_S)
                longest_s = max(longest_s, time.monotonic() - began_at)
            return longest_s

        with ThreadPoolExecutor(len(stores)) as threads:
            assert max(threads.map(wake_often, stores)) < 1.5
        for _ in stores:
            assert heard.acquire(timeout=RESULT_TIMEOUT_S)


def test_listener_whose_lock_was_let_go_gets_another(mysql_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener_module, "RECONNECT_WAIT_S", 0.01)
    store = make_store(parse_address(mysql_url), [])
    store.open(migrate=True)
    hints = threading.Semaphore(0)
    try:
        store.start_listening(hints.release)
        assert hints.acquire(timeout=RESULT_TIMEOUT_S)
        assert store._listener is not None
        assert isinstance(store._listener._link, Ear)
        holder = store._listener._link._holder
        if holder is None:
            pytest.skip("MySQL's listener sleeps, and holds no lock")
        holder.line.cut()
        while not isinstance(store._listener._link, Ear) or store._listener._link._holder is holder:
            assert hints.acquire(timeout=RESULT_TIMEOUT_S)
        while not hints.acquire(timeout=0.05):
            store.tell_others().result()
    finally:
        store.stop_listening()
        store.close()
