"""When an attempt is repeated: pure, without a clock."""

from __future__ import annotations

import math
from datetime import timedelta
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from romancy.errors import ConfigurationError, SerializationError, TerminalError
from romancy.retry import LONGEST_S, RetryPolicy, as_seconds


def test_default_is_five_attempts_waiting_1_2_4_8_seconds() -> None:
    assert RetryPolicy.default() == RetryPolicy()
    assert RetryPolicy.default().schedule() == (1.0, 2.0, 4.0, 8.0)
    assert RetryPolicy().max_attempts == 5


@pytest.mark.parametrize(
    ("policy", "waits"),
    [
        (RetryPolicy.no_retry(), ()),
        (RetryPolicy.fixed(5, 2.0), (2.0,) * 4),
        (RetryPolicy.fixed(3, timedelta(minutes=2)), (120.0, 120.0)),
        (RetryPolicy.exponential(10, 0.1, 30.0), (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6)),
        (RetryPolicy.exponential(12, 0.1, 30.0), (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0)),
        (RetryPolicy(max_attempts=4, initial_interval=timedelta(milliseconds=500), multiplier=3), (0.5, 1.5, 4.5)),
        (RetryPolicy(max_attempts=4, initial_interval=5, max_interval=2), (2.0, 2.0, 2.0)),
        (RetryPolicy(max_attempts=3, initial_interval=0), (0.0, 0.0)),
        (RetryPolicy(max_attempts=9, multiplier=1), (1.0,) * 8),
        (RetryPolicy(max_attempts=8), (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)),
    ],
)
def test_schedule(policy: RetryPolicy, waits: tuple[float, ...]) -> None:
    assert policy.schedule() == pytest.approx(waits)


def test_no_attempts_means_attempts_without_end_and_no_overflow() -> None:
    policy = RetryPolicy(max_attempts=0)
    assert policy.next_wait(10**9, 0.0, ValueError()) == 60.0
    assert RetryPolicy(max_attempts=0, initial_interval=0).next_wait(10**9, 0.0, ValueError()) == 0.0
    assert RetryPolicy(max_attempts=0, multiplier=1e308).next_wait(50, 0.0, ValueError()) == 60.0


def test_attempts_end() -> None:
    policy = RetryPolicy(max_attempts=3)
    assert [policy.next_wait(n, 0.0, ValueError()) for n in (1, 2, 3, 4)] == [1.0, 2.0, None, None]


def test_no_attempt_starts_after_max_duration() -> None:
    policy = RetryPolicy(max_attempts=0, initial_interval=4, max_duration=timedelta(seconds=10))
    assert policy.next_wait(1, 6.0, ValueError()) == 4.0
    assert policy.next_wait(1, 6.001, ValueError()) is None
    assert RetryPolicy(max_duration=0).next_wait(1, 0.0, ValueError()) is None


def test_types_choose_what_is_retried() -> None:
    policy = RetryPolicy(retry_on=(OSError, KeyError), dont_retry_on=(FileNotFoundError,))
    assert policy.allows_retry_of(ConnectionError())
    assert policy.allows_retry_of(KeyError())
    assert not policy.allows_retry_of(FileNotFoundError())
    assert not policy.allows_retry_of(ValueError())
    assert policy.next_wait(1, 0.0, ValueError()) is None


def test_terminal_and_serialization_errors_are_never_retried() -> None:
    class OwnError(TerminalError):
        pass

    policy = RetryPolicy(max_attempts=0, retry_on=(BaseException,))
    for error in (TerminalError("x"), OwnError("x"), SerializationError("x")):
        assert policy.next_wait(1, 0.0, error) is None


def test_what_ends_a_process_is_not_retried_by_default() -> None:
    assert not RetryPolicy().allows_retry_of(KeyboardInterrupt())
    assert not RetryPolicy().allows_retry_of(SystemExit())


def test_there_is_no_jitter_by_default() -> None:
    assert RetryPolicy().interval_after(2, Random(1)) == 2.0


@settings(deadline=None)
@given(st.floats(0, 1), st.integers(1, 2_000), st.integers())
def test_jitter_stays_within_its_part_and_no_wait_exceeds_the_longest(jitter: float, attempt: int, seed: int) -> None:
    plain = RetryPolicy(max_attempts=0)
    policy = RetryPolicy(max_attempts=0, jitter=jitter)
    wait = policy.interval_after(attempt, Random(seed))
    middle = plain.interval_after(attempt)
    assert middle * (1 - jitter) - 1e-9 <= wait <= min(middle * (1 + jitter) + 1e-9, 60.0)


def test_jitter_uses_its_whole_range() -> None:
    random = Random(7)
    policy = RetryPolicy(jitter=0.5)
    waits = [policy.interval_after(1, random) for _ in range(2_000)]
    assert min(waits) < 0.51
    assert max(waits) > 1.49


@settings(deadline=None)
@given(st.floats(0, LONGEST_S), st.floats(1, 1e300), st.floats(0, LONGEST_S), st.integers(1, 10**6))
def test_every_wait_can_be_stored_as_a_time(initial: float, multiplier: float, longest: float, attempt: int) -> None:
    policy = RetryPolicy(0, initial, multiplier, longest)
    wait = policy.interval_after(attempt)
    assert 0 <= wait <= longest
    assert round(wait * 1_000_000) < 2**62


BAD_OPTIONS: list[dict[str, Any]] = [
    {"max_attempts": -1},
    {"max_attempts": 1.5},
    {"max_attempts": True},
    {"max_attempts": "3"},
    {"max_attempts": None},
    {"initial_interval": -1},
    {"initial_interval": "1"},
    {"initial_interval": True},
    {"initial_interval": math.nan},
    {"initial_interval": math.inf},
    {"initial_interval": 1e300},
    {"initial_interval": 10**400},
    {"initial_interval": timedelta(seconds=-1)},
    {"initial_interval": None},
    {"max_interval": -0.1},
    {"max_interval": math.inf},
    {"multiplier": 0.5},
    {"multiplier": math.nan},
    {"multiplier": math.inf},
    {"multiplier": "2"},
    {"multiplier": None},
    {"jitter": -0.1},
    {"jitter": 1.1},
    {"jitter": math.nan},
    {"jitter": "0.1"},
    {"max_duration": -1},
    {"max_duration": "1"},
    {"retry_on": ValueError},
    {"retry_on": [ValueError]},
    {"retry_on": ("ValueError",)},
    {"retry_on": (int,)},
    {"dont_retry_on": KeyError},
    {"dont_retry_on": None},
]


@pytest.mark.parametrize("options", BAD_OPTIONS, ids=[f"{n}-{next(iter(o))}" for n, o in enumerate(BAD_OPTIONS)])
def test_option_that_cannot_work_is_refused_by_name_at_once(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(ConfigurationError, match=rf"^{name}="):
        RetryPolicy(**options)


def test_durations_are_seconds_or_timedeltas() -> None:
    assert as_seconds(1, "x") == 1.0
    assert as_seconds(timedelta(days=1), "x") == 86_400.0
    assert as_seconds(0, "x") == 0.0
    with pytest.raises(ValueError, match="x=-1 is not a duration"):
        as_seconds(-1, "x")


def test_policies_are_values() -> None:
    assert RetryPolicy(max_attempts=3) == RetryPolicy(max_attempts=3)
    assert len({RetryPolicy(), RetryPolicy.default(), RetryPolicy.no_retry()}) == 2
    with pytest.raises(AttributeError):
        RetryPolicy().max_attempts = 3  # type: ignore[misc]
