"""Waits and mail meet: the desk on every database beside a few lines of plain Python that say what should happen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from romancy.storage.address import parse_address
from romancy.storage.mail import ANYBODY, NEVER_US, Closing, Delivery, Mail, Operation, Post, Receipt, Wait, Withdrawal
from romancy.storage.mail_desk import MailDesk, on_link, read_mail_of
from romancy.storage.store import Store
from romancy.storage.stores import make_store
from tests.databases import Database, execute, rows

EXAMPLES = int(os.environ.get("ROMANCY_EXAMPLES", "40"))
INSTANCES = ("A", "B", "C")
CHANNELS = {"news": "broadcast", "jobs": "competing", "desk": "direct"}
READERS = [("news", "A"), ("news", "B")]
NOW_US = 1_000_000
PAID = Wait("A", 1, "wait:1", "event", "paid", "")
MAIL = Mail("A", "00000001", "event", "paid", "", "1", NEVER_US)


@pytest.fixture
def store(any_database: Database) -> Iterator[Store]:
    store = make_store(parse_address(str(any_database)), [])
    store.open(migrate=True)
    yield store
    store.close()


def handle(store: Store, operations: list[Operation], now_us: int = NOW_US) -> Post:
    def job(link: Any) -> Post:
        with store._transaction(link):
            desk = MailDesk(on_link(link, store.mark), store.kind, now_us)
            desk.lock(operations)
            return desk.handle(operations)

    return store._write(job).result()


def database_of(store: Store, any_database: Database) -> Database:
    del store
    return any_database


@dataclass
class Model:
    """What should happen, one operation after the other."""

    waits: list[Wait] = field(default_factory=list)
    mail: dict[tuple[str, str], Mail] = field(default_factory=dict)
    deliveries: dict[tuple[str, int, str], Delivery] = field(default_factory=dict)
    kept: set[tuple[str, int, str]] = field(default_factory=set)
    since: dict[tuple[str, int, str], int] = field(default_factory=dict)
    now: int = 0

    def run(self, operation: Operation) -> None:
        match operation:
            case Wait():
                fitting = [
                    sent
                    for sent in self.mail.values()
                    if sent.to_id in (operation.instance_id, ANYBODY) and fits(operation, sent)
                ]
                if fitting:
                    sent = min(fitting, key=lambda one: (one.mail_id, one.to_id))
                    del self.mail[sent.to_id, sent.mail_id]
                    self.deliver(sent, operation, sent.to_id)
                else:
                    self.waits.append(operation)
                    self.since[operation[:3]] = self.now
            case Withdrawal(wait, returns):
                delivery = self.deliveries.get(wait[:3])
                self.waits = [known for known in self.waits if known[:3] != wait[:3]]
                if delivery is not None and returns:
                    self.kept.discard(wait[:3])
                    del self.deliveries[wait[:3]]
                    self.send(Mail(*delivery[3:]))
                elif delivery is not None:
                    self.kept.add(wait[:3])
            case Receipt():
                self.deliveries.pop(tuple(operation), None)
            case Mail():
                if operation.name == "news" and operation.to_id == ANYBODY:
                    for _, reader in READERS:
                        self.send(operation._replace(to_id=reader))
                else:
                    self.send(operation)
            case _:
                raise AssertionError(operation)

    def send(self, sent: Mail) -> None:
        takers = [wait for wait in self.waits if sent.to_id in (wait.instance_id, ANYBODY) and fits(wait, sent)]
        if sent.to_id != ANYBODY or sent.kind == "message":
            # Who has waited longest; of those who began in the same commit, the desk takes any.
            takers = sorted(takers, key=lambda wait: (self.since[wait[:3]], wait.instance_id, wait.operation_id))[:1]
        for wait in takers:
            self.waits.remove(wait)
            home = sent.to_id
            if sent.kind == "event" and home == ANYBODY and not (sent.subject and len(takers) == 1):
                home = wait.instance_id
            self.deliver(sent, wait, home)
        if not takers and (sent.to_id != ANYBODY or sent.kind == "message" or sent.subject):
            self.mail[sent.to_id, sent.mail_id] = sent

    def deliver(self, sent: Mail, wait: Wait, home: str) -> None:
        self.deliveries[wait[:3]] = Delivery(*wait[:3], home, *sent[1:-1])


def fits(wait: Wait, sent: Mail) -> bool:
    return (wait.kind, wait.name) == (sent.kind, sent.name) and wait.subject in ("", sent.subject)


topics = st.one_of(
    st.tuples(st.just("event"), st.sampled_from(["paid", "sent"]), st.sampled_from(["", "k1", "k2"])),
    st.tuples(st.just("message"), st.sampled_from(sorted(CHANNELS)), st.just("")),
)


@st.composite
def programs(draw: st.DrawFn) -> list[list[Operation]]:
    """Batches of operations as instances would hand them in: nobody waits twice under one id."""
    batches: list[list[Operation]] = []
    every_wait: list[Wait] = []
    count = 0
    for _ in range(draw(st.integers(1, 6))):
        batch: list[Operation] = []
        earlier = list(every_wait)
        for _ in range(draw(st.integers(1, 6))):
            count += 1
            what = draw(st.sampled_from(["wait", "wait", "send", "send", "send", "withdraw", "receipt"]))
            kind, name, subject = draw(topics)
            if what == "wait" and (kind, name) != ("message", "other"):
                wait = Wait(draw(st.sampled_from(INSTANCES)), 1, f"wait:{count}", kind, name, subject)
                every_wait.append(wait)
                batch.append(wait)
            elif what == "send":
                to_id = draw(st.sampled_from([*INSTANCES, ANYBODY, ANYBODY]))
                if name == "desk" and to_id == ANYBODY:
                    to_id = "A"
                batch.append(Mail(to_id, f"{count:08}", kind, name, subject, f'"{count}"', NEVER_US))
            elif what == "withdraw" and every_wait:
                batch.append(Withdrawal(draw(st.sampled_from(every_wait)), draw(st.booleans())))
            elif what == "receipt" and earlier:
                # Nobody hears of a delivery before the batch that has made it is durable.
                batch.insert(0, Receipt(*draw(st.sampled_from(earlier))[:3]))
        batches.append(batch)
    return batches


@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(program=programs())
@example(
    program=[[PAID], [Mail("A", "00000001", "event", "paid", "", "1", NEVER_US)], [Withdrawal(PAID, returns=False)]]
)
def test_desk_does_what_the_model_says(store: Store, any_database: Database, program: list[list[Operation]]) -> None:
    for table in ("waits", "mail", "deliveries", "subscriptions", "channels"):
        execute(any_database, f"DELETE FROM romancy_{table}")
    for name, mode in CHANNELS.items():
        execute(any_database, "INSERT INTO romancy_channels VALUES (?, ?)", name, mode)
    for channel, reader in READERS:
        execute(any_database, "INSERT INTO romancy_subscriptions VALUES (?, ?)", channel, reader)
    model = Model()
    received: dict[tuple[str, int, str], Delivery] = {}
    for number, batch in enumerate(program):
        before = dict(model.deliveries)
        model.kept.clear()
        model.now = number
        for operation in batch:
            model.run(operation)
        post = handle(store, batch, NOW_US + number)
        received = {delivery[:3]: delivery for delivery in post.deliveries}
        assert {delivery[:3] for delivery in post.kept} == model.kept
        news = {key: delivery for key, delivery in model.deliveries.items() if before.get(key) != delivery}
        assert news.items() <= received.items()
    found = {Delivery(*row)[:3]: Delivery(*row) for row in rows(any_database, "SELECT * FROM romancy_deliveries")}
    assert found == model.deliveries
    found_mail = rows(any_database, "SELECT to_id, mail_id FROM romancy_mail")
    assert sorted(found_mail) == sorted(model.mail)
    found_waits = rows(any_database, "SELECT instance_id, run, operation_id FROM romancy_waits")
    assert sorted(found_waits) == sorted(wait[:3] for wait in model.waits)


def wait_for(instance_id: str, operation_id: str = "wait:1", name: str = "paid", subject: str = "k") -> Wait:
    return Wait(instance_id, 1, operation_id, "event", name, subject)


def event(mail_id: str, subject: str = "k", *, to_id: str = ANYBODY, digest: str | None = None) -> Mail:
    return Mail(to_id, mail_id, "event", "paid", subject, "{}", NEVER_US, digest)


def test_same_digest_counts_once(store: Store) -> None:
    first = handle(store, [event("1", digest="d"), event("2", digest="d")])
    second = handle(store, [event("3", digest="d"), event("1", digest="d")])
    assert first.repeated == {"2"}
    assert second.repeated == {"3"}  # and "1" is the one that counts
    got = handle(store, [wait_for("A"), wait_for("B")])
    assert [delivery.mail_id for delivery in got.deliveries] == ["1"]


def test_expired_mail_is_not_there(store: Store) -> None:
    handle(store, [event("1")._replace(expires_at=NOW_US + 5)])
    assert not handle(store, [wait_for("A")], NOW_US + 5).deliveries


def test_end_of_an_instance_clears_its_mailbox(store: Store, any_database: Database) -> None:
    handle(store, [event("1", to_id="A"), event("2", to_id="B"), wait_for("A", "x"), Closing("A")])
    assert rows(any_database, "SELECT to_id FROM romancy_mail") == [("B",)]
    assert rows(any_database, "SELECT * FROM romancy_deliveries") == []


def test_repeated_registration_finds_its_delivery(store: Store) -> None:
    handle(store, [event("1"), wait_for("A")])

    def job(link: Any) -> Post:
        with store._transaction(link):
            return MailDesk(on_link(link, store.mark), store.kind, NOW_US).handle([wait_for("A")], is_repeated=True)

    assert [delivery.mail_id for delivery in store._write(job).result().deliveries] == ["1"]


def test_emptied_slots_are_filled_again(store: Store, any_database: Database) -> None:
    execute(any_database, "DELETE FROM romancy_slots")
    handle(store, [wait_for("A")])
    expected = 0 if store.kind == "sqlite" else 1
    assert len(rows(any_database, "SELECT slot FROM romancy_slots")) == expected
    clean_slots(any_database)


def clean_slots(database: Database) -> None:
    for slot in range(64):
        found = rows(database, "SELECT 1 FROM romancy_slots WHERE slot = ?", slot)
        if not found:
            execute(database, "INSERT INTO romancy_slots VALUES (?)", slot)


def test_no_meeting_is_missed_by_two_processes_at_once(any_database: Database) -> None:
    """Check, then keep: without the lock, a wait and a mail can each miss the other."""
    rounds = 150 if str(any_database).endswith(".db") else 300
    stores = [make_store(parse_address(str(any_database)), []) for _ in range(2)]
    for store in stores:
        store.open(migrate=True)
    try:
        with ThreadPoolExecutor(2) as threads:
            for number in range(rounds):
                key = f"k{number}"
                list(
                    threads.map(
                        handle,
                        stores,
                        [[wait_for("A", f"wait:{number}", subject=key)], [event(f"{number:08}", key)]],
                    )
                )
        assert len(rows(any_database, "SELECT * FROM romancy_deliveries")) == rounds
        assert rows(any_database, "SELECT * FROM romancy_mail") == []
        assert rows(any_database, "SELECT * FROM romancy_waits") == []
    finally:
        for store in stores:
            store.close()


def test_mail_with_an_older_id_that_is_committed_later_is_news_too(store: Store, any_database: Database) -> None:
    """An id is made before its commit, so an older one may come after a newer one: no cursor over ids finds it."""
    execute(
        any_database,
        "INSERT INTO romancy_instances (instance_id, run, workflow_name, status, owner, claims, created_at, "
        "updated_at, input) VALUES ('A', 1, 'flow', 'running', 'me', 0, 0, 0, '{}')",
    )
    handle(store, [wait_for("A", "wait:1", subject="k1"), wait_for("A", "wait:2", subject="k2")])
    found: list[list[str]] = []
    for mail_id, key in (("2", "k2"), ("1", "k1")):
        handle(store, [event(mail_id, key)])
        deliveries, _ = store.find_news("me").result()
        found.append(sorted(delivery.mail_id for delivery in deliveries))
    assert found == [["2"], ["1", "2"]]


def test_mail_that_meets_its_wait_while_both_are_read_is_not_overlooked(store: Store) -> None:
    """Who claims an instance and finds neither would register the wait again, for a second mail."""
    handle(store, [wait_for("A")])

    def job(link: Any) -> tuple[list[Delivery], list[Wait]]:
        execute, count = on_link(link, store.mark), 0

        def execute_with_mail_in_between(sql: str, parameters: Any = ()) -> Any:
            nonlocal count
            count += 1
            if count == 2:
                handle(store, [event("1")])
            return execute(sql, parameters)

        return read_mail_of(execute_with_mail_in_between, ["A"])

    deliveries, _ = store._read(job).result()
    assert [delivery.mail_id for delivery in deliveries] == ["1"]
