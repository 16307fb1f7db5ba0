"""The mail desk: lets waits and mail meet.

Both sides hold the lock of their topic's slot when they look for each other, so none misses the other; and a delivery
is a row, so it can't be overlooked: whoever owns the instance, or claims it, finds it there.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection, text

from romancy.model import Status
from romancy.storage.mail import (
    ANYBODY,
    ANYTHING,
    BROADCAST,
    CANCEL,
    CHILD,
    EVENT,
    KEPT_US,
    MESSAGE,
    NEVER_US,
    REQUEST,
    Closing,
    Delivery,
    Mail,
    Operation,
    Post,
    Receipt,
    Unsubscription,
    Wait,
    Withdrawal,
    slot_of,
)
from romancy.storage.schema import channels, deliveries, instances, mail, seen, slots, subscriptions, waits
from romancy.storage.statements import fitting
from romancy.storage.threads import Link

ROWS_A_STATEMENT = 100

PRIMARY = "PRIMARY"
BY_SUBJECT = "romancy_mail_subject"
BY_NAME = "romancy_mail_name"
BY_TOPIC = "romancy_waits_topic"

MOST_AT_ONCE = 3
"""A statement for each way of putting some together has a plan of its own."""

Row = Sequence[Any]
Statement = tuple[str, list[Any]]
"""With ``?`` for its parameters."""

T = TypeVar("T")
Topic = tuple[int, str, str, str, str]
"""A number, and the addressee, kind, name and subject that it stands for."""


class Execute(Protocol):
    """Runs one statement whose parameters stand as ``?``; returns a cursor."""

    def __call__(self, sql: str, parameters: Sequence[Any] = (), /) -> Any: ...


def on_link(link: Link, mark: str) -> Execute:
    """Statements on a connection of the engine's own."""
    return lambda sql, parameters=(): link.execute(sql.replace("?", mark), parameters)


def on_connection(connection: Connection) -> Execute:
    """Statements in a transaction of SQLAlchemy's, whatever its driver."""

    def execute(sql: str, parameters: Sequence[Any] = ()) -> Any:
        pieces = sql.split("?")
        named = "".join(f"{piece}:p{n}" for n, piece in enumerate(pieces[:-1])) + pieces[-1]
        return connection.execute(text(named), {f"p{n}": value for n, value in enumerate(parameters)})

    return execute


class MailDesk:
    """Lets waits and mail meet, in one transaction of one database.

    Args:
        execute: runs statements in that transaction.
        dialect: ``sqlite``, ``postgresql`` or ``mysql``.
        now_us: by the database's clock; mail that has expired by then is not there.
        most_bytes: how long a statement may be, with its values.
        run: the same as ``execute``, for statements whose result nobody looks at.
    """

    def __init__(
        self, execute: Execute, dialect: str, now_us: int, most_bytes: int | None = None, run: Execute | None = None
    ) -> None:
        self._execute = execute
        self._run = run or execute
        self._dialect = dialect
        self._now_us = now_us
        self._most_bytes = most_bytes
        self.post = Post()

    # -- the way of a batch ------------------------------------------------------------------------

    def lock(self, operations: Iterable[Operation]) -> None:
        """Take the slots of all their topics, in order; SQLite has one writer anyway."""
        self.lock_slots(slots_of(operations))

    def lock_slots(self, wanted: Sequence[int]) -> None:
        """Take these slots, which are in order."""
        if self._dialect == "sqlite" or not wanted:
            return
        while len(self._execute(locking(wanted)).fetchall()) < len(wanted):
            # Somebody has emptied the table; without its rows nobody would wait for anybody.
            self.insert(slots.name, ("slot",), [(slot,) for slot in wanted], ignore=True)

    def handle(self, operations: Sequence[Operation], *, is_repeated: bool = False) -> Post:
        """Carry the operations out, in their order, like ones together.

        Receipts come first and closings last: they concern one instance alone, which hands in nothing before its
        receipt of the same delivery and nothing after its end.

        Args:
            operations: their slots are locked.
            is_repeated: an earlier attempt may have succeeded unseen.
        """
        self.delete(deliveries.name, Receipt._fields, [one for one in operations if isinstance(one, Receipt)])
        closings = [one for one in operations if isinstance(one, Closing)]
        for kind, some in groupby([one for one in operations if not isinstance(one, Receipt | Closing)], type):
            group: list[Any] = list(some)
            if kind is Wait:
                self._register(group, is_repeated=is_repeated)
            elif kind is Withdrawal:
                self._withdraw(group)
            elif kind is Mail:
                self._send(group, is_repeated=is_repeated)
            else:
                self._unsubscribe(group)
        if closings:
            self._close(closings)
        return self.post

    # -- waiting -----------------------------------------------------------------------------------

    def _register(self, registrations: list[Wait], *, is_repeated: bool) -> None:
        if is_repeated:
            there = self._find_deliveries(registrations)
            self.post.deliveries += there
            met = {delivery[:3] for delivery in there}
            registrations = [wait for wait in registrations if wait[:3] not in met]
        open_waits = registrations
        taken: set[tuple[str, str]] = set()
        while open_waits:
            found = self._look_for_mail(open_waits)
            met_now: list[tuple[Wait, tuple[str, str]]] = []
            again: list[Wait] = []
            rest: list[Wait] = []
            for wait, candidates in zip(open_waits, found, strict=True):
                mine = next((key for key in candidates if key not in taken), None)
                if mine is not None:
                    taken.add(mine)
                    met_now.append((wait, mine))
                elif candidates:
                    again.append(wait)
                else:
                    rest.append(wait)
            self._deliver_kept(met_now)
            self._insert_waits(rest)
            open_waits = again

    def _look_for_mail(self, open_waits: list[Wait]) -> list[list[tuple[str, str]]]:
        """For each wait the keys of the oldest mail for its instance and of the oldest for anybody, oldest first."""
        found: list[list[tuple[str, str]]] = [[] for _ in open_waits]
        for with_subject in (True, False):
            some = [(n, w) for n, w in enumerate(open_waits) if (w.subject != ANYTHING) is with_subject]
            same, index = ("AND m.subject = s.subject ", BY_SUBJECT) if with_subject else ("", BY_NAME)
            # PostgreSQL would rather walk along the primary key, in the order that is asked for, past all other keys.
            order = "m.mail_id || ''" if with_subject and self._dialect == "postgresql" else "m.mail_id"
            for chunk in _chunks(some):
                topics = [
                    (n, to_id, wait.kind, wait.name, wait.subject)
                    for n, wait in chunk
                    for to_id in ((wait.instance_id,) if wait.kind == CHILD else (wait.instance_id, ANYBODY))
                ]
                wanted, asked = self._table(topics)
                rows = self._execute(
                    f"SELECT s.n, s.to_id, (SELECT m.mail_id FROM {mail.name} m{self._by(index)} "
                    f"WHERE m.to_id = s.to_id AND m.kind = s.kind AND m.name = s.name {same}AND m.expires_at > ? "
                    f"ORDER BY {order} LIMIT 1) FROM {wanted}",
                    [self._now_us, *asked],
                ).fetchall()
                for n, to_id, mail_id in rows:
                    if mail_id is not None:
                        found[n].append((mail_id, to_id))
        return [[(to_id, mail_id) for mail_id, to_id in sorted(keys)] for keys in found]

    def _deliver_kept(self, met: list[tuple[Wait, tuple[str, str]]]) -> None:
        if not met:
            return
        keys = [key for _, key in met]
        fields = ", ".join(Mail._fields[:-1])
        rows = self._select(f"SELECT {fields} FROM {mail.name}", ("to_id", "mail_id"), keys)
        by_key = {(row[0], row[1]): Mail(*row) for row in rows}
        self.delete(mail.name, ("to_id", "mail_id"), keys)
        self._insert_deliveries([_deliver(by_key[key], wait[:3], key[0]) for wait, key in met])

    def _insert_waits(self, registrations: list[Wait]) -> None:
        rows = [(*wait, self._now_us) for wait in registrations]
        self.insert(waits.name, (*Wait._fields, "since"), rows, ignore=True)

    # -- waiting no longer -------------------------------------------------------------------------

    def _withdraw(self, withdrawals: list[Withdrawal]) -> None:
        delivered = self._find_deliveries([withdrawal.wait for withdrawal in withdrawals])
        returning = {withdrawal.wait[:3] for withdrawal in withdrawals if withdrawal.returns}
        self.post.kept += [delivery for delivery in delivered if delivery[:3] not in returning]
        self.delete(waits.name, Wait._fields[:3], [withdrawal.wait[:3] for withdrawal in withdrawals])
        back = [delivery for delivery in delivered if delivery[:3] in returning]
        if back:
            self.delete(deliveries.name, Wait._fields[:3], [delivery[:3] for delivery in back])
            gone = {delivery[:3] for delivery in back}
            self.post.deliveries = [delivery for delivery in self.post.deliveries if delivery[:3] not in gone]
            self.post.kept = [delivery for delivery in self.post.kept if delivery[:3] not in gone]
            self._dispatch([Mail(*delivery[3:]) for delivery in back])

    def _find_deliveries(self, some_waits: Iterable[Wait]) -> list[Delivery]:
        fields = ", ".join(Delivery._fields)
        keys = [wait[:3] for wait in some_waits]
        return [
            Delivery(*row) for row in self._select(f"SELECT {fields} FROM {deliveries.name}", Wait._fields[:3], keys)
        ]

    # -- sending -----------------------------------------------------------------------------------

    def _send(self, mails: list[Mail], *, is_repeated: bool) -> None:
        fresh = self._leave_out_repeated(mails, is_repeated=is_repeated)
        some = [sent for sent in fresh if sent.kind in (REQUEST, CHILD)]
        open_ids = self._not_ended({sent.to_id for sent in some}) if some else set()
        requests = [sent for sent in some if sent.kind == REQUEST and sent.to_id in open_ids]
        if requests:
            self._ask(requests)
        self._dispatch(
            [sent for sent in fresh if sent.kind in (EVENT, MESSAGE) or (sent.kind == CHILD and sent.to_id in open_ids)]
        )

    def _not_ended(self, ids: set[str]) -> set[str]:
        sql = f"SELECT instance_id, completed_at FROM {instances.name}"
        rows = self._select(sql, ("instance_id",), [(instance_id,) for instance_id in sorted(ids)])
        return {instance_id for instance_id, completed_at in rows if completed_at is None}

    def _ask(self, requests: list[Mail]) -> None:
        """Requests wait for nobody: they are deliveries at once."""
        asked = [_deliver(sent, (sent.to_id, 0, sent.name), sent.to_id) for sent in requests]
        self.insert(deliveries.name, Delivery._fields, asked, ignore=True)
        self.post.deliveries += asked

    def _leave_out_repeated(self, mails: list[Mail], *, is_repeated: bool) -> list[Mail]:
        firsts: dict[str, Mail] = {}
        for sent in mails:
            if sent.digest is not None:
                firsts.setdefault(sent.digest, sent)
        if not firsts:
            return mails
        # After a lost connection a digest of this very mail may be there: that one has been sent.
        known = self._known(firsts) if is_repeated else {}
        new = [self._note(sent) for digest, sent in sorted(firsts.items()) if digest not in known]
        # Who sends the same at this very moment is waited for.
        if self._insert_new(seen.name, ("digest", "mail_id", "expires_at"), new) < len(new):
            found = self._known(firsts)
            known |= {digest: mail_id for digest, mail_id in found.items() if mail_id != firsts[digest].mail_id}
        fresh: list[Mail] = []
        for sent in mails:
            first_id = sent.mail_id if sent.digest is None else known.get(sent.digest, firsts[sent.digest].mail_id)
            if first_id != sent.mail_id:
                self.post.repeated.add(sent.mail_id)
            elif sent.digest not in known:
                fresh.append(sent)
        return fresh

    def _known(self, digests: Iterable[str]) -> dict[str, str]:
        """The mail that came first, by digest, of those that are known."""
        keys = [(digest,) for digest in sorted(digests)]
        return dict(self._select(f"SELECT digest, mail_id FROM {seen.name}", ("digest",), keys))

    def _note(self, sent: Mail) -> Row:
        # Known for a while only, also of what is kept for ever.
        known_until = sent.expires_at if sent.expires_at < NEVER_US else self._now_us + KEPT_US
        return (sent.digest, sent.mail_id, known_until)

    def _dispatch(self, mails: list[Mail]) -> None:
        if any(sent.kind == MESSAGE and sent.to_id == ANYBODY for sent in mails):
            mails = self._to_subscribers(mails)
        for way, some in groupby(mails, _way_of):
            group = list(some)
            if way == "addressed":
                self._to_one_each(group, self._waits_of_instances(group))
            elif way == "queued":
                self._to_one_each(group, self._waits_of_channels(group))
            else:
                self._to_all(group)

    def _to_subscribers(self, mails: list[Mail]) -> list[Mail]:
        """Messages of a broadcast channel as one for each subscriber."""
        names = sorted({sent.name for sent in mails if sent.kind == MESSAGE and sent.to_id == ANYBODY})
        modes = dict(self._select(f"SELECT name, mode FROM {channels.name}", ("name",), [(name,) for name in names]))
        everywhere = [(name,) for name in names if modes.get(name) == BROADCAST]
        readers: dict[str, list[str]] = {}
        for channel, instance_id in self._select(
            f"SELECT channel, instance_id FROM {subscriptions.name}", ("channel",), everywhere
        ):
            readers.setdefault(channel, []).append(instance_id)
        spread: list[Mail] = []
        for sent in mails:
            if sent.kind == MESSAGE and sent.to_id == ANYBODY and modes.get(sent.name) == BROADCAST:
                spread += [sent._replace(to_id=reader, digest=None) for reader in sorted(readers.get(sent.name, ()))]
            else:
                spread.append(sent)
        return spread

    def _waits_of_instances(self, mails: list[Mail]) -> dict[int, list[Wait]]:
        """For each mail the waits of its addressee that it fits, oldest first."""
        found: dict[int, list[Wait]] = {}
        for chunk in _chunks(list(enumerate(mails))):
            wanted, asked = self._table(_topics(chunk))
            rows = self._execute(
                f"SELECT s.n, {_of_wait()} FROM {wanted} JOIN {waits.name} w{self._by(PRIMARY)} "
                f"ON w.instance_id = s.to_id AND w.kind = s.kind AND w.name = s.name AND w.subject = s.subject "
                f"ORDER BY s.n, w.since, w.operation_id",
                asked,
            ).fetchall()
            for n, *fields in rows:
                found.setdefault(n, []).append(Wait(*fields))
        return found

    def _waits_of_channels(self, mails: list[Mail]) -> dict[int, list[Wait]]:
        """For each message of a competing channel the longest waiting consumers, as many as there are messages."""
        found: dict[int, list[Wait]] = {}
        of_channel: dict[str, list[int]] = {}
        for n, sent in enumerate(mails):
            of_channel.setdefault(sent.name, []).append(n)
        for channel, numbers in of_channel.items():
            rows = self._execute(
                f"SELECT {_of_wait()} FROM {waits.name} w WHERE w.kind = ? AND w.name = ? AND w.subject = ? "
                f"ORDER BY w.since, w.instance_id, w.operation_id LIMIT {len(numbers)}",
                [MESSAGE, channel, ANYTHING],
            ).fetchall()
            consumers = [Wait(*row) for row in rows]
            for n in numbers:
                found[n] = consumers
        return found

    def _to_one_each(self, mails: list[Mail], fitting: dict[int, list[Wait]]) -> None:
        """The first wait that is still free takes the mail; mail that nobody takes is kept."""
        met: list[Delivery] = []
        kept: list[Mail] = []
        taken: set[tuple[str, int, str]] = set()
        # A mail that came back goes before what was sent later.
        for n, sent in sorted(enumerate(mails), key=lambda numbered: numbered[1].mail_id):
            key = next((wait[:3] for wait in fitting.get(n, ()) if wait[:3] not in taken), None)
            if key is None:
                kept.append(sent)
            else:
                taken.add(key)
                met.append(_deliver(sent, key, sent.to_id))
        self._settle(met, kept)

    def _to_all(self, events: list[Mail]) -> None:
        """Everybody who waits now takes a copy; a keyed event that nobody waits for is kept."""
        topics = list({(sent.name, sent.subject): (n, sent) for n, sent in enumerate(events)}.values())
        waiting: dict[tuple[str, str], list[Wait]] = {}
        for chunk in _chunks(topics):
            wanted, asked = self._table(_topics(chunk))
            rows = self._execute(
                f"SELECT s.n, {_of_wait()} FROM {wanted} JOIN {waits.name} w{self._by(BY_TOPIC)} "
                f"ON w.kind = s.kind AND w.name = s.name AND w.subject = s.subject ORDER BY s.n, w.since",
                asked,
            ).fetchall()
            for n, *fields in rows:
                waiting.setdefault((events[n].name, events[n].subject), []).append(Wait(*fields))
        met: list[Delivery] = []
        kept: list[Mail] = []
        taken: set[tuple[str, int, str]] = set()
        for sent in events:
            takers = [wait[:3] for wait in waiting.get((sent.name, sent.subject), ()) if wait[:3] not in taken]
            taken.update(takers)
            # Should its only taker not want it any more, a keyed event is for anybody again.
            is_shared = sent.subject and len(takers) == 1
            met += [_deliver(sent, key, ANYBODY if is_shared else key[0]) for key in takers]
            if not takers and sent.subject:
                kept.append(sent)
        self._settle(met, kept)

    def _settle(self, met: list[Delivery], kept: list[Mail]) -> None:
        self._run_all(
            [
                *self._deletion(waits.name, Wait._fields[:3], [delivery[:3] for delivery in met]),
                *self._insertion(deliveries.name, Delivery._fields, met, ignore=False),
                *self._insertion(mail.name, Mail._fields[:-1], [sent[:-1] for sent in kept], ignore=True),
            ]
        )
        self.post.deliveries += met

    def _insert_deliveries(self, met: list[Delivery]) -> None:
        self.insert(deliveries.name, Delivery._fields, met)
        self.post.deliveries += met

    # -- leaving -----------------------------------------------------------------------------------

    def _close(self, closings: list[Closing]) -> None:
        ids = [(closing.instance_id,) for closing in closings]
        self.delete(subscriptions.name, ("instance_id",), ids)
        self.delete(mail.name, ("to_id",), ids)
        self.delete(deliveries.name, ("instance_id",), ids)

    def _unsubscribe(self, unsubscriptions: list[Unsubscription]) -> None:
        for instance_id, channel in unsubscriptions:
            self.delete(subscriptions.name, ("channel", "instance_id"), [(channel, instance_id)])
            self.delete(mail.name, ("to_id", "kind", "name"), [(instance_id, MESSAGE, channel)])

    # -- statements --------------------------------------------------------------------------------

    def _table(self, topics: Sequence[Topic]) -> tuple[str, list[str]]:
        """Topics as a table ``s`` to join with, and its parameters."""
        if self._dialect == "postgresql":
            # It would plan each arm of a UNION on its own.
            first = f"({topics[0][0]}" + ", CAST(? AS text)" * 4 + ")"
            rows = ", ".join([first, *(f"({topic[0]}, ?, ?, ?, ?)" for topic in topics[1:])])
            sql = f"(VALUES {rows}) AS s (n, to_id, kind, name, subject)"
        else:
            first = f"SELECT {topics[0][0]} AS n, ? AS to_id, ? AS kind, ? AS name, ? AS subject"
            arms = [first, *(f"SELECT {topic[0]}, ?, ?, ?, ?" for topic in topics[1:])]
            sql = f"({' UNION ALL '.join(arms)}) AS s"
        return sql, [value for _, *values in topics for value in values]

    def _by(self, index: str) -> str:
        """Makes MySQL take this index; its statistics may be of a time when the table was all but empty."""
        return f" FORCE INDEX ({index})" if self._dialect == "mysql" else ""

    def insert(self, table: str, fields: Sequence[str], rows: Sequence[Row], *, ignore: bool = False) -> None:
        """Insert rows; with ``ignore``, those whose keys are new."""
        for sql, values in self._insertion(table, fields, rows, ignore=ignore):
            self._run(sql, values)

    def _insert_new(self, table: str, fields: Sequence[str], rows: Sequence[Row]) -> int:
        """Insert those rows whose keys are new; returns how many they are."""
        return sum(self._execute(*one).rowcount for one in self._insertion(table, fields, rows, ignore=True))

    def delete(self, table: str, fields: Sequence[str], keys: Sequence[Row]) -> None:
        """Delete rows by these fields."""
        for sql, values in self._deletion(table, fields, keys):
            self._run(sql, values)

    def _run_all(self, statements: Sequence[Statement]) -> None:
        """Run statements that have nothing to do with each other; where it can be, a few of them at once."""
        if self._dialect != "postgresql" or not 1 < len(statements) <= MOST_AT_ONCE:
            for sql, values in statements:
                self._run(sql, values)
            return
        *others, (last, _) = statements
        parts = ", ".join(f"part_{n} AS ({sql})" for n, (sql, _) in enumerate(others))
        self._run(f"WITH {parts} {last}", [value for _, values in statements for value in values])

    def _insertion(
        self, table: str, fields: Sequence[str], rows: Sequence[Row], *, ignore: bool
    ) -> Iterable[Statement]:
        row_marks = f"({', '.join('?' * len(fields))})"
        verb = "INSERT IGNORE" if ignore and self._dialect == "mysql" else "INSERT"
        suffix = " ON CONFLICT DO NOTHING" if ignore and self._dialect != "mysql" else ""
        for chunk in [chunk for some in _chunks(rows) for chunk in fitting(some, self._most_bytes)]:
            sql = f"{verb} INTO {table} ({', '.join(fields)}) VALUES {', '.join([row_marks] * len(chunk))}{suffix}"
            yield sql, [value for row in chunk for value in row]

    def _deletion(self, table: str, fields: Sequence[str], keys: Sequence[Row]) -> Iterable[Statement]:
        for condition, values in _conditions(fields, keys, self._dialect):
            yield f"DELETE FROM {table} WHERE {condition}", values

    def _select(self, select: str, fields: Sequence[str], keys: Sequence[Row]) -> list[Any]:
        rows: list[Any] = []
        for condition, values in _conditions(fields, keys, self._dialect):
            rows += self._execute(f"{select} WHERE {condition}", values).fetchall()
        return rows


def slots_of(operations: Iterable[Operation]) -> list[int]:
    """The slots of all topics that these operations have to do with, in order."""
    wanted: set[int] = set()
    for operation in operations:
        match operation:
            case Wait() | Mail():
                wanted.add(slot_of(operation.kind, operation.name))
            case Withdrawal():
                wanted.add(slot_of(operation.wait.kind, operation.wait.name))
            case Unsubscription():
                wanted.add(slot_of(MESSAGE, operation.channel))
            case _:
                pass
    return sorted(wanted)


def locking(wanted: Sequence[int]) -> str:
    """The statement that locks these slots, and returns them."""
    numbers = ", ".join(map(str, wanted))
    return f"SELECT slot FROM {slots.name} WHERE slot IN ({numbers}) ORDER BY slot FOR UPDATE"


def _way_of(sent: Mail) -> str:
    if sent.to_id != ANYBODY:
        return "addressed"
    return "queued" if sent.kind == MESSAGE else "open"


def _deliver(sent: Mail, key: Any, home: str) -> Delivery:
    instance_id, run, operation_id = key
    return Delivery(instance_id, run, operation_id, home, *sent[1:-1])


def _of_wait() -> str:
    return ", ".join(f"w.{field}" for field in Wait._fields)


def _topics(numbered: Sequence[tuple[int, Mail]]) -> list[Topic]:
    """The topics that these mails fit, by their numbers: their own, and that of whoever takes any."""
    return [
        (n, sent.to_id, sent.kind, sent.name, subject)
        for n, sent in numbered
        for subject in dict.fromkeys((sent.subject, ANYTHING))
    ]


def _conditions(fields: Sequence[str], keys: Sequence[Row], dialect: str) -> Iterable[tuple[str, list[Any]]]:
    """Rows by their keys, in a form for which every database takes its index."""
    for chunk in _chunks(keys):
        if len(fields) == 1:
            yield f"{fields[0]} IN ({', '.join('?' * len(chunk))})", [key[0] for key in chunk]
        elif dialect == "postgresql":
            # Of many ANDs it takes what they have in common for the index, and filters by the rest.
            first = ", ".join(f"CAST(? AS {'int' if field == 'run' else 'text'})" for field in fields)
            others = f", ({', '.join('?' * len(fields))})" * (len(chunk) - 1)
            yield f"({', '.join(fields)}) IN (VALUES ({first}){others})", [value for key in chunk for value in key]
        else:
            one = f"({' AND '.join(f'{field} = ?' for field in fields)})"
            yield " OR ".join([one] * len(chunk)), [value for key in chunk for value in key]


def _chunks(rows: Sequence[T]) -> Iterable[Sequence[T]]:
    for start in range(0, len(rows), ROWS_A_STATEMENT):
        yield rows[start : start + ROWS_A_STATEMENT]


_DELIVERY = ", ".join(f"d.{field}" for field in Delivery._fields)


def find_news(
    execute: Execute, worker_id: str, workflow_names: Sequence[str], limit: int
) -> tuple[list[Delivery], list[str]]:
    """Mail that has not been recorded yet.

    Returns:
        All deliveries for instances of this worker; and ids of instances that nobody owns, that have mail, and that an
        app with these workflows can run. A suspended one is among them when it was asked to end, unless it was parked
        with an error.
    """
    to_instances = f"FROM {deliveries.name} d CROSS JOIN {instances.name} i WHERE i.instance_id = d.instance_id"
    rows = execute(f"SELECT {_DELIVERY} {to_instances} AND i.owner = ?", (worker_id,)).fetchall()
    found = [Delivery(*row) for row in rows]
    if not workflow_names:
        return found, []
    known = ", ".join("?" * len(workflow_names))
    sql = (
        f"SELECT DISTINCT d.instance_id {to_instances} AND i.owner IS NULL AND i.completed_at IS NULL "
        f"AND (i.status <> ? OR (d.kind = ? AND d.name = ? AND i.error IS NULL)) "
        f"AND i.workflow_name IN ({known}) LIMIT {limit}"
    )
    asked = (Status.SUSPENDED.value, REQUEST, CANCEL, *workflow_names)
    return found, [row[0] for row in execute(sql, asked).fetchall()]


def read_mail_of(execute: Execute, instance_ids: Sequence[str]) -> tuple[list[Delivery], list[Wait]]:
    """What the database has of instances that were just claimed: their deliveries and their open waits."""
    keys = [(instance_id,) for instance_id in instance_ids]
    found: list[Delivery] = []
    still_open: list[Wait] = []
    for condition, values in _conditions(("instance_id",), keys, ""):
        # Waits first: one that becomes a delivery meanwhile is seen as both. The other way round it would be seen as
        # neither, and registered once more: that wait would take a further mail, for nobody.
        fields = ", ".join(Wait._fields)
        rows = execute(f"SELECT {fields} FROM {waits.name} WHERE {condition}", values).fetchall()
        still_open += [Wait(*row) for row in rows]
        fields = ", ".join(Delivery._fields)
        rows = execute(f"SELECT {fields} FROM {deliveries.name} WHERE {condition}", values).fetchall()
        found += [Delivery(*row) for row in rows]
    return found, still_open


def open_channel(execute: Execute, dialect: str, channel: str, mode: str | None, subscriber: str | None) -> str | None:
    """The channel's mode; where it has none yet, it gets this one. Then subscribes, if that is its mode.

    Returns:
        ``None`` for a channel that nobody has given a mode.
    """
    desk = MailDesk(execute, dialect, 0)
    if mode is not None:
        # Under the lock: what is published at this moment goes to this subscriber, or was published before.
        desk.lock([Unsubscription("", channel)])
    row = execute(f"SELECT mode FROM {channels.name} WHERE name = ?", (channel,)).fetchone()
    found: str | None = None if row is None else row[0]
    if found is None and mode is not None:
        desk.insert(channels.name, ("name", "mode"), [(channel, mode)])
        if mode == BROADCAST:
            desk.delete(mail.name, ("to_id", "kind", "name"), [(ANYBODY, MESSAGE, channel)])
        found = mode
    if subscriber is not None and found == mode:
        desk.insert(subscriptions.name, ("channel", "instance_id"), [(channel, subscriber)], ignore=True)
    return found


def clear_expired(execute: Execute, dialect: str, now_us: int, limit: int) -> int:
    """Remove mail and digests that have expired, and requests that came when an instance ended; returns how many.

    Some at a time; call it again when it has removed as many as it may.
    """
    desk = MailDesk(execute, dialect, now_us)
    removed = 0
    for table, fields in ((mail.name, ("to_id", "mail_id")), (seen.name, ("digest",))):
        columns = ", ".join(fields)
        sql = f"SELECT {columns} FROM {table} WHERE expires_at <= ? ORDER BY expires_at LIMIT {limit}"
        keys = execute(sql, (now_us,)).fetchall()
        desk.delete(table, fields, keys)
        removed += len(keys)
    late = execute(
        f"SELECT d.instance_id, d.run, d.operation_id FROM {deliveries.name} d JOIN {instances.name} i "
        f"ON i.instance_id = d.instance_id WHERE i.completed_at IS NOT NULL LIMIT {limit}"
    ).fetchall()
    desk.delete(deliveries.name, Receipt._fields, late)
    return removed + len(late)
