"""When a failed attempt is tried again: a pure rule over attempts, time and the error."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from datetime import timedelta
from random import Random

from romancy.errors import ConfigurationError, SerializationError, TerminalError

Seconds = float | timedelta

LONGEST_S = 100 * 365 * 86_400
"""No duration is longer: a time further off could not be stored, nor shown as a date."""


def as_seconds(value: Seconds, name: str) -> float:
    """A duration in seconds, from a number or a ``timedelta``.

    Raises:
        ConfigurationError: it is negative, endless, or not a duration.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LONGEST_S:
        raise ConfigurationError(
            f"{name}={value!r} is not a duration: give seconds from 0 to {LONGEST_S:,} (100 years), or a timedelta"
        )
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_types(name: str, types: object) -> None:
    if not isinstance(types, tuple) or not all(isinstance(t, type) and issubclass(t, BaseException) for t in types):
        raise ConfigurationError(f"{name}={types!r}: give a tuple of exception types, such as (ConnectionError,)")


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often, and after which waits, an activity that raised is tried again.

    Args:
        max_attempts: all attempts together, the first included; 0 means without end.
        initial_interval: the wait before the second attempt, in seconds or as a ``timedelta``.
        multiplier: each wait is the one before times this.
        max_interval: no wait is longer, in seconds or as a ``timedelta``.
        jitter: a fraction between 0 and 1: each wait is lengthened or shortened by up to that part, at random.
        max_duration: no attempt starts later than this after the first one began; ``None``: no limit.
        retry_on: only these exception types are retried.
        dont_retry_on: these exception types are not retried, whatever ``retry_on`` says.

    ``TerminalError`` is never retried. Attempts and the time of the next one are durable.

    Example:
        >>> RetryPolicy(max_attempts=4, initial_interval=0.5).schedule()
        (0.5, 1.0, 2.0)
    """

    max_attempts: int = 5
    initial_interval: Seconds = 1.0
    multiplier: float = 2.0
    max_interval: Seconds = 60.0
    jitter: float = 0.0
    max_duration: Seconds | None = None
    retry_on: tuple[type[BaseException], ...] = (Exception,)
    dont_retry_on: tuple[type[BaseException], ...] = ()
    _initial_s: float = field(init=False, repr=False, compare=False)
    _max_s: float = field(init=False, repr=False, compare=False)
    _duration_s: float | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int) or self.max_attempts < 0:
            raise ConfigurationError(f"max_attempts={self.max_attempts!r}: give a whole number, 0 for no limit")
        if not _is_number(self.multiplier) or not 1 <= self.multiplier < math.inf:
            raise ConfigurationError(f"multiplier={self.multiplier!r}: give a number of at least 1")
        if not _is_number(self.jitter) or not 0 <= self.jitter <= 1:
            raise ConfigurationError(f"jitter={self.jitter!r}: give a fraction between 0 and 1")
        _check_types("retry_on", self.retry_on)
        _check_types("dont_retry_on", self.dont_retry_on)
        put = object.__setattr__
        put(self, "_initial_s", as_seconds(self.initial_interval, "initial_interval"))
        put(self, "_max_s", as_seconds(self.max_interval, "max_interval"))
        duration = None if self.max_duration is None else as_seconds(self.max_duration, "max_duration")
        put(self, "_duration_s", duration)

    @classmethod
    def default(cls) -> RetryPolicy:
        """Five attempts, waiting 1, 2, 4 and 8 seconds."""
        return cls()

    @classmethod
    def no_retry(cls) -> RetryPolicy:
        """One attempt."""
        return cls(max_attempts=1)

    @classmethod
    def fixed(cls, max_attempts: int, interval: Seconds) -> RetryPolicy:
        """The same wait each time."""
        return cls(max_attempts, interval, 1.0, interval)

    @classmethod
    def exponential(cls, max_attempts: int, initial_interval: Seconds, max_interval: Seconds) -> RetryPolicy:
        """Waits that double, up to ``max_interval``."""
        return cls(max_attempts, initial_interval, 2.0, max_interval)

    def interval_after(self, attempt: int, random: Random | None = None) -> float:
        """Seconds to wait after failed attempt number ``attempt`` (from 1)."""
        try:
            wait = min(self._initial_s * self.multiplier ** (attempt - 1), self._max_s)
        except OverflowError:
            wait = self._max_s if self._initial_s else 0.0
        if self.jitter and random is not None:
            wait *= 1 + self.jitter * (2 * random.random() - 1)
        return min(wait, self._max_s)

    def schedule(self) -> tuple[float, ...]:
        """All waits of a policy with an end, without jitter."""
        return tuple(self.interval_after(n) for n in range(1, self.max_attempts))

    def allows_retry_of(self, error: BaseException) -> bool:
        """Whether an error of this type may be tried again at all."""
        if isinstance(error, (TerminalError, SerializationError, *self.dont_retry_on)):
            return False
        return isinstance(error, self.retry_on)

    def next_wait(
        self, attempt: int, elapsed_s: float, error: BaseException, random: Random | None = None
    ) -> float | None:
        """Seconds until the next attempt, or ``None`` when there is to be none.

        Args:
            attempt: the number of the attempt that just failed, from 1.
            elapsed_s: seconds since the first attempt began.
            error: what it raised.
            random: where jitter comes from; without it there is none.
        """
        if not self.allows_retry_of(error):
            return None
        if self.max_attempts and attempt >= self.max_attempts:
            return None
        wait = self.interval_after(attempt, random)
        if self._duration_s is not None and elapsed_s + wait > self._duration_s:
            return None
        return wait
