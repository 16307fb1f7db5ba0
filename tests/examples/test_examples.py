"""Each small example runs as it stands, and prints what its first lines say that it prints."""

from __future__ import annotations

import asyncio
import runpy
import textwrap
from pathlib import Path

import pytest

from romancy.testing import isolated_catalogue

EXAMPLES = Path(__file__).parents[2] / "examples"
SMALL = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem not in ("first_steps", "order"))


def test_there_are_examples() -> None:
    assert len(SMALL) >= 9


@pytest.mark.parametrize("name", SMALL)
def test_example_prints_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with isolated_catalogue():
        module = runpy.run_path(str(EXAMPLES / f"{name}.py"))
        asyncio.run(module["main"]())
    _, _, expected = (module["__doc__"] or "").partition("It prints:\n\n")
    assert expected
    assert capsys.readouterr().out.splitlines() == textwrap.dedent(expected).splitlines()
