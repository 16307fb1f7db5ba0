"""What a forked child begins with."""

from __future__ import annotations

from typing import Any


def in_child(*arguments: Any) -> None:
    """Run the child; imported there only, for its definitions would be in the way of other tests."""
    from tests.crash import child

    child.main(*arguments)


def with_mail(*arguments: Any) -> None:
    """Run the child whose workflows send and wait."""
    from tests.crash import mail_child

    mail_child.main(*arguments)


def as_zombie(*arguments: Any) -> None:
    """Run what will be stopped."""
    from tests.crash import zombie

    zombie.main(*arguments)
