"""Words and figures for a terminal."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from romancy.cli.text import (
    cell_len,
    crop,
    day_or_time,
    duration,
    fold,
    printable,
    printable_lines,
    short_time,
    wrap,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, Müller 東京 👩\u200d🚀", "plain, Müller 東京 👩\u200d🚀"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\x9b31m\x7f", "\\x9b31m\\x7f"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u202eabc\u2066", "\\u202eabc\\u2066"),
        ("\udcff", "\\udcff"),
    ],
)
def test_what_a_terminal_obeys_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_stay_lines_and_tabs_become_blanks() -> None:
    assert printable_lines("a\n\tb\x1b\r\nc") == "a\n    b\\x1b\\r\nc"


@pytest.mark.parametrize(
    ("span", "shown"),
    [
        (timedelta(seconds=-3), "0ms"),
        (timedelta(milliseconds=350), "350ms"),
        (timedelta(seconds=59.99), "59.9s"),
        (timedelta(seconds=60), "1m00s"),
        (timedelta(hours=2, minutes=7, seconds=59), "2h07m"),
        (timedelta(days=12, hours=4), "12d04h"),
        (timedelta(days=400), "400d"),
    ],
)
def test_duration_is_short(span: timedelta, shown: str) -> None:
    assert duration(span) == shown


@pytest.mark.usefixtures("_utc")
def test_short_time_says_what_is_not_obvious() -> None:
    now = datetime(2026, 11, 20, 14, 0, tzinfo=UTC)
    assert short_time(now, now) == "14:00:00"
    assert short_time(now - timedelta(days=1), now) == "11-19 14:00"
    assert short_time(now - timedelta(days=365), now) == "2025-11-20"
    assert [day_or_time(now - timedelta(days=days), now) for days in (0, 1, 365)] == ["14:00:00", "Nov 19", "Nov 2025"]


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("process_order", 20, ["process_order"]),
        ("waiting_for_message", 12, ["waiting_for_", "message"]),
        ("ActivityRetryScheduled", 13, ["ActivityRetry", "Scheduled"]),
        ("a_xxxxxxxxxx", 6, ["a_xxxx", "xxxxxx"]),
        ("東京東京", 5, ["東京", "東京"]),
        ("abcde", 5, ["abcde"]),
        ("", 5, [""]),
    ],
)
def test_names_are_folded_between_their_parts(text: str, width: int, lines: list[str]) -> None:
    assert fold(text, width) == lines


@pytest.mark.parametrize("width", [1, 2, 3, 10])
def test_folding_and_cropping_keep_to_the_width(width: int) -> None:
    text = "a_b東京-c.d" * 5
    folded = fold(text, max(width, 2))
    assert "".join(folded) == text
    assert all(cell_len(line) <= max(width, 2) for line in folded)
    assert cell_len(crop(text, width)) <= width


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("plain", 5),
        ("Müller", 6),
        ("Mu\u0308ller", 6),
        ("東京", 4),
        ("🚀", 2),
        ("ﾊﾛｰ", 3),
        ("한국", 4),
        ("\u1112\u1161\u11ab", 2),
    ],
)
def test_wide_characters_take_two_cells_and_accents_none(text: str, cells: int) -> None:
    assert cell_len(text) == cells


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("the bank says no", 8, ["the bank", "says no"]),
        ("the bank says no", 9, ["the bank", "says no"]),
        ('    "sku": 17', 11, ['    "sku":', "17"]),
        ("no_such_word here", 8, ["no_such_", "word", "here"]),
        ("東京 東京 x", 5, ["東京", "東京", "x"]),
        ("", 5, [""]),
    ],
)
def test_prose_is_broken_between_words(text: str, width: int, lines: list[str]) -> None:
    assert wrap(text, width) == lines


def test_a_payload_of_megabytes_is_folded_at_once() -> None:
    text = "x" * 2_000_000
    assert "".join(wrap(text, 78)) == text
    assert "".join(fold("ü" + text, 78)) == "ü" + text
