"""The options of an app, checked, in the engine's units."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from enum import Enum

from romancy.clock import Clock
from romancy.definitions import Catalogue
from romancy.errors import ConfigurationError
from romancy.retry import RetryPolicy, Seconds, as_seconds
from romancy.storage.address import Address, parse_address
from romancy.storage.given import GivenEngines

DEFAULT_PAYLOAD_BYTES = 2 * 1024 * 1024
SHORTEST_LEASE_TTL_S = 0.1


class Default(Enum):
    """What stands for an option that was not given."""

    DATABASE = "romancy.db"


@dataclass(slots=True, kw_only=True)
class Settings:
    """What the user chose, or what holds by default; :class:`romancy.App` tells what each option means.

    Attributes:
        given: engines of the application's own.
        pool: options of the pools of Romancy's own engines.
        workflows: what the app can run; ``None``: the default catalogue, as it is when the app starts.
        clock: ``None``: the database's.
    """

    address: Address
    listen_on: Address | None
    given: GivenEngines
    pool: dict[str, int]
    name: str
    workflows: Catalogue | None
    has_worker: bool
    auto_migrate: bool
    clock: Clock | None
    default_retry: RetryPolicy
    max_payload_bytes: int
    lease_ttl_s: float
    shutdown_grace_s: float
    max_instances: int
    max_hot_instances: int
    max_activities: int
    activity_threads: int
    stall_warning_s: float
    event_retention_us: int


def chosen_address(database: str | os.PathLike[str] | Default, given: GivenEngines) -> Address:
    """Where the database is: as the user says, else where the given engines lead.

    Raises:
        ConfigurationError: an engine leads elsewhere.
        DatabaseURLError: the address can't be understood.
    """
    if not isinstance(database, Default):
        address = parse_address(database)
    else:
        address = given.address() if given else parse_address(database.value)
    given.check(address)
    return address


def usual_name() -> str:
    """What a worker is called by default."""
    return f"{socket.gethostname()}-{os.getpid()}"


def pool_options(pool_size: int | None, max_overflow: int | None, given: GivenEngines) -> dict[str, int]:
    """Those that are set, for the engines that Romancy makes.

    Raises:
        ConfigurationError: they can't work, or there is no engine that they could be for.
    """
    options: dict[str, int] = {}
    if pool_size is not None:
        options["pool_size"] = positive("pool_size", pool_size)
    if max_overflow is not None:
        if isinstance(max_overflow, bool) or not isinstance(max_overflow, int) or max_overflow < 0:
            raise ConfigurationError(f"max_overflow={max_overflow!r}: give a whole number of at least 0")
        options["max_overflow"] = max_overflow
    if options and given.for_async is not None and given.for_sync is not None:
        names = " and ".join(options)
        raise ConfigurationError(
            f"{names} would change nothing, for engine= and sync_engine= bring their own pools: set it where those are "
            f"made, or leave one of them to Romancy"
        )
    return options


def long_enough_lease_s(lease_ttl: Seconds) -> float:
    """The lease in seconds.

    Raises:
        ConfigurationError: no worker could renew it in time.
    """
    lease_ttl_s = as_seconds(lease_ttl, "lease_ttl")
    if lease_ttl_s < SHORTEST_LEASE_TTL_S:
        raise ConfigurationError(f"lease_ttl={lease_ttl!r} is too short: give at least {SHORTEST_LEASE_TTL_S} s")
    return lease_ttl_s


def positive(name: str, value: int) -> int:
    """The option, if it is a whole number of at least 1.

    Raises:
        ConfigurationError: it isn't.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigurationError(f"{name}={value!r}: give a whole number of at least 1")
    return value
