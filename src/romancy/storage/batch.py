"""What a group commit carries, and what becomes of it when one row is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from romancy.errors import DatabaseError
from romancy.storage.failures import is_row_error
from romancy.storage.mail import Operation, Post
from romancy.storage.rows import Change, HistoryRow, StartRow, StateRow


class Member(Protocol):
    """Whoever has rows in a batch: a live instance, or one start."""

    def on_refused(self, error: DatabaseError) -> None:
        """The database refused these rows for good; none of them was written."""
        ...


NO_ROWS: list[Any] = []
"""Shared by all parties until they have rows of that kind; never changed."""


class Party:
    """The rows of one member; they are written together or not at all.

    Attributes:
        state: the latest; it says all that earlier ones said.
        mail: what the member sends, waits for, and has received.
        changes: what else changes of its instance.
        needs_fence: what it writes is a worker's alone to write.
    """

    __slots__ = ("changes", "history", "keyed_starts", "mail", "member", "starts", "state")
    needs_fence = True

    def __init__(self, member: Member) -> None:
        self.member = member
        self.starts: list[StartRow] = NO_ROWS
        self.keyed_starts: list[StartRow] = NO_ROWS
        self.history: list[HistoryRow] = NO_ROWS
        self.state: StateRow | None = None
        self.mail: list[Operation] = NO_ROWS
        self.changes: list[Change] = NO_ROWS


class OutsideParty(Party):
    """Mail from outside any instance, which anybody may send."""

    __slots__ = ()
    needs_fence = False


class Batch:
    """Everything that waits for one commit, by party, in order of arrival.

    Attributes:
        number: counts up; a batch is durable before the next one begins.
        waiting: parties that are not durable yet; shrinks while the batch is written.
        inserted: ids of keyed starts that were new; the others existed already.
        refused: parties that a constraint refused, each with the error.
        makes_work: it leaves an instance that any worker may claim at once.
        is_unsure: a connection was lost while the batch was written, so that part of it may be durable.
        posts: what came of the mail in it.
    """

    __slots__ = ("inserted", "is_unsure", "makes_work", "number", "posts", "refused", "row_count", "waiting")

    def __init__(self, number: int) -> None:
        self.number = number
        self.waiting: list[Party] = []
        self.row_count = 0
        self.inserted: set[str] = set()
        self.refused: list[tuple[Party, DatabaseError]] = []
        self.makes_work = False
        self.is_unsure = False
        self.posts: list[Post] = []

    def note(self, parties: int, written: Written) -> None:
        """The first of those that wait, so many, are durable."""
        self.inserted |= written.inserted
        if written.post is not None:
            self.posts.append(written.post)
        del self.waiting[:parties]


class Written(NamedTuple):
    """What came of some parties' rows: the ids of keyed starts that were new, and what became of their mail."""

    inserted: set[str]
    post: Post | None = None


def run_batch(batch: Batch, commit: Callable[[list[Party]], Written]) -> None:
    """Commit a batch, as a whole if possible; else in halves, until each guilty party stands alone.

    After any other error the batch knows what is durable already, and may be run again.
    """

    _attempt(batch, list(batch.waiting), commit)


def _attempt(batch: Batch, parties: list[Party], commit: Callable[[list[Party]], Written]) -> None:
    try:
        written = commit(parties)
    except Exception as error:
        if not is_row_error(error):
            raise
        if len(parties) > 1:
            middle = len(parties) // 2
            _attempt(batch, parties[:middle], commit)
            _attempt(batch, parties[middle:], commit)
            return
        batch.refused.append((parties[0], _refusal(error)))
        del batch.waiting[0]
    else:
        batch.note(len(parties), written)


def _refusal(error: Exception) -> DatabaseError:
    if isinstance(error, DatabaseError):
        return error
    refusal = DatabaseError(f"the database refused a row: {error}")
    refusal.__cause__ = error
    return refusal
