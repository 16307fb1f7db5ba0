"""Who owns what: leases, claims and states of several workers on one database, without an engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from romancy.errors import FencedError
from romancy.storage.address import parse_address
from romancy.storage.batch import Batch, Party
from romancy.storage.failures import NotOwnedError
from romancy.storage.rows import HistoryRow, StartRow, StateRow, WorkerRow
from romancy.storage.store import Store
from romancy.storage.stores import make_store
from romancy.storage.writer import Recorder
from tests.databases import Database, execute, rows

NOW_US = 1_000_000
FLOW = "flow"


@pytest.fixture
def stores(any_database: Database) -> Iterator[list[Store]]:
    """Two processes' worth of stores, with a worker registered by each: ``me-0`` and ``me-1``."""
    made = [make_store(parse_address(str(any_database)), [FLOW]) for _ in range(2)]
    for number, store in enumerate(made):
        store.open(migrate=True)
        row = WorkerRow(f"me-{number}", "w", "alive", "here", 1, 1, 2 * NOW_US)
        store.register(row, started_at=0).result()
    yield made
    for store in made:
        store.close()


def flush(
    store: Store,
    worker_id: str | None,
    *,
    starts: Sequence[StartRow] = (),
    state: StateRow | None = None,
    event: HistoryRow | None = None,
) -> Batch:
    batch = Batch(1)
    party = Party(Recorder())
    party.starts, party.state = list(starts), state
    if event is not None:
        party.history = [event]
    batch.waiting.append(party)
    batch.row_count = 1
    store.flush(batch, worker_id).result()
    return batch


def event(result: str) -> HistoryRow:
    return HistoryRow("it", 1, 1, "ActivityCompleted", "a:1", "a", 1, 1, 0, None, "{}", result, None)


def pending(name: str, owner: str | None = None) -> StartRow:
    status = "pending" if owner is None else "running"
    return StartRow(name, 1, FLOW, status, owner, 0, 0, 0, 0, 0, None, "{}")


def test_lease_that_was_lost_is_not_renewed(stores: list[Store], any_database: Database) -> None:
    assert stores[1].bury("me-0", 3 * NOW_US, is_gone=False).result()
    assert not stores[0].renew("me-0", 9 * NOW_US).result()
    with pytest.raises(FencedError):
        flush(stores[0], "me-0", starts=[pending("it")])
    found = rows(any_database, "SELECT state, lease_until FROM romancy_workers WHERE worker_id = 'me-0'")
    assert found == [("dead", 2 * NOW_US)]


def test_lost_lease_is_told_before_what_came_of_it(stores: list[Store], any_database: Database) -> None:
    flush(stores[0], "me-0", event=event("first"))
    assert stores[1].bury("me-0", 3 * NOW_US, is_gone=False).result()
    with pytest.raises(FencedError):
        flush(stores[0], "me-0", event=event("second"))


def test_worker_that_has_renewed_meanwhile_is_not_buried(stores: list[Store], any_database: Database) -> None:
    # It was seen expired; before the burial it renews.
    assert stores[0].renew("me-0", 4 * NOW_US).result()
    assert not stores[1].bury("me-0", 3 * NOW_US, is_gone=False).result()
    assert rows(any_database, "SELECT state FROM romancy_workers WHERE worker_id = 'me-0'") == [("alive",)]


def test_what_is_owned_is_not_claimed(stores: list[Store], any_database: Database) -> None:
    flush(stores[0], None, starts=[pending("free"), pending("taken", "me-0")])
    assert [row.instance_id for row in stores[1].claim_ready("me-1", NOW_US, 10).result()] == ["free"]
    assert stores[1].claim_addressed("me-1", NOW_US, ["free", "taken"]).result() == []
    found = rows(any_database, "SELECT instance_id, owner FROM romancy_instances ORDER BY instance_id")
    assert found == [("free", "me-1"), ("taken", "me-0")]


def test_two_workers_that_claim_at_once_share_what_there_is(stores: list[Store]) -> None:
    """Find, then take: without locks on what was found, both would run it."""
    claimed: list[str] = []
    for turn in range(60):
        flush(stores[0], None, starts=[pending(f"{turn}-{number}") for number in range(8)])

        def claim(number: int) -> list[Any]:
            return stores[number].claim_ready(f"me-{number}", NOW_US, 5).result()

        with ThreadPoolExecutor(2) as threads:
            for taken in threads.map(claim, range(2)):
                claimed += [row.instance_id for row in taken]
    assert len(claimed) == len(set(claimed))


def test_event_that_is_there_already_is_refused_and_the_first_one_stays(
    stores: list[Store], any_database: Database
) -> None:
    """A duplicate means that somebody else owns the instance: it must never be passed over in silence."""
    flush(stores[0], None, starts=[pending("it", "me-0")])
    assert flush(stores[0], "me-0", event=event("first")).refused == []
    assert len(flush(stores[1], "me-1", event=event("second")).refused) == 1
    assert rows(any_database, "SELECT result FROM romancy_history") == [("first",)]


def test_state_of_what_is_anothers_is_refused(stores: list[Store], any_database: Database) -> None:
    flush(stores[0], None, starts=[pending("it", "me-0")])
    stolen = StateRow("it", "completed", None, None, NOW_US, NOW_US, "1", None)
    batch = flush(stores[1], "me-1", state=stolen)
    assert len(batch.refused) == 1
    cause = batch.refused[0][1].__cause__
    assert isinstance(cause, NotOwnedError) or type(cause).__module__.startswith("psycopg")
    assert rows(any_database, "SELECT status, owner FROM romancy_instances") == [("running", "me-0")]


def test_what_a_dead_worker_owned_is_taken_once(stores: list[Store], any_database: Database) -> None:
    flush(stores[0], None, starts=[pending("it", "me-0")])
    execute(any_database, "UPDATE romancy_workers SET state = 'dead' WHERE worker_id = 'me-0'")
    (taken,) = stores[1].claim_from("me-0", "me-1", NOW_US, 10).result()
    assert (taken.instance_id, taken.claims) == ("it", 1)
    assert stores[1].claim_from("me-0", "me-1", NOW_US, 10).result() == []
    assert rows(any_database, "SELECT count(*) FROM romancy_workers WHERE worker_id = 'me-0'") == [(0,)]


def test_what_was_set_aside_after_the_look_is_not_claimed_for_its_mail(
    stores: list[Store], any_database: Database
) -> None:
    """Between the look for mail and the claim another worker has had it, and was asked to set it aside."""
    for instance_id, error in (("aside", None), ("ending", None), ("parked", "{}")):
        flush(stores[0], "me-0", starts=[pending(instance_id, "me-0")])
        flush(stores[0], "me-0", state=StateRow(instance_id, "suspended", None, None, NOW_US, None, None, error))
    for instance_id, name in (("aside", "e"), ("ending", "cancel"), ("parked", "cancel")):
        kind = "event" if name == "e" else "request"
        run = int(kind == "event")
        sql = "INSERT INTO romancy_deliveries VALUES (?, ?, ?, ?, ?, ?, ?, '', '{}', 9)"
        execute(any_database, sql, instance_id, run, name, instance_id, instance_id, kind, name)
    assert stores[1].find_news("me-1").result() == ([], ["ending"])
    claimed = stores[1].claim_addressed("me-1", NOW_US, ["aside", "ending", "parked"]).result()
    assert [(row.instance_id, row.status) for row in claimed] == [("ending", "running")]
