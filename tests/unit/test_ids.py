"""Instance ids: version 7, unique, sorted in the order in which they were made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from uuid import RFC_4122, UUID

import pytest

from romancy.ids import IdSource


def test_id_is_a_uuid_of_version_7() -> None:
    text = IdSource().new_id()
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", text)
    assert UUID(text).version == 7
    assert UUID(text).variant == RFC_4122


def test_id_begins_with_the_time_in_milliseconds() -> None:
    before = time.time_ns() // 1_000_000
    millisecond = UUID(IdSource().new_id()).int >> 80
    assert before <= millisecond <= time.time_ns() // 1_000_000 + 1


def test_ids_of_one_source_sort_in_the_order_of_making() -> None:
    source = IdSource()
    ids = [source.new_id() for _ in range(20_000)]
    assert ids == sorted(ids)
    assert len(set(ids)) == len(ids)


def test_ids_of_many_threads_and_sources_are_unique() -> None:
    shared, made, lock = IdSource(), [], threading.Lock()
    start = threading.Barrier(8)

    def make(source: IdSource) -> None:
        start.wait()
        mine = [source.new_id() for _ in range(2_000)]
        assert mine == sorted(mine)
        with lock:
            made.extend(mine)

    threads = [threading.Thread(target=make, args=(shared if n % 2 else IdSource(),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == len(made) == 16_000


def test_clock_that_is_set_back_does_not_unsort_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    source = IdSource()
    first = source.new_id()
    monkeypatch.setattr("romancy.ids.time.time_ns", lambda: 0)
    assert [source.new_id() for _ in range(5_000)] > [first]


def test_more_ids_than_fit_a_millisecond_spill_into_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("romancy.ids.time.time_ns", lambda: 1_700_000_000_000_000_000)
    source = IdSource()
    ids = [source.new_id() for _ in range(10_000)]
    assert ids == sorted(set(ids))
    assert {UUID(text).version for text in ids} == {7}
    assert (UUID(ids[-1]).int >> 80) - (UUID(ids[0]).int >> 80) == 2


FORKS_WITHOUT_HOOKS = """
import ctypes, os, time
from romancy.ids import IdSource

now = time.time_ns()
time.time_ns = lambda: now
source = IdSource()
source.new_id()
reading, writing = os.pipe()
child = ctypes.PyDLL(None).fork()
made = [source.new_id() for _ in range(5)]
if child == 0:
    os.write(writing, " ".join(made).encode())
    os._exit(0)
os.waitpid(child, 0)
print(len({*made, *os.read(reading, 1_000).decode().split()}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks")
def test_fork_by_c_code_shares_no_ids() -> None:
    """It need not run Python's hooks; some servers fork like that."""
    done = subprocess.run([sys.executable, "-c", FORKS_WITHOUT_HOOKS], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("10\n", "")
