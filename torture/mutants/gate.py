"""Plants one mutant in a copy of the source tree, and runs the tests that must see it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = ("src", "tests", "torture")
FILES = ("pyproject.toml", "README.md")
LONGEST_TEST_S = 60
LONGEST_RUN_S = 600
TESTS_FAILED = 1
"""Exit code of pytest; other codes than this and 0 say that it could not do its work."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """A fault to be planted.

    Attributes:
        file: below ``src/romancy``.
        old: text that stands there exactly once.
        new: what stands there instead.
        tests: ids of tests of which one at least must fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


class Verdict(StrEnum):
    """What became of a mutant."""

    CAUGHT = "caught"
    SURVIVED = "SURVIVED"
    BROKEN = "NEEDS MENDING"


@dataclass(frozen=True, slots=True)
class Finding:
    """What the gate says of one mutant: the first test that failed, or what is wrong."""

    mutant: str
    verdict: Verdict
    details: str
    seconds: float


def copy_tree(target: Path) -> None:
    """Copy what the tests need."""
    for tree in TREES:
        shutil.copytree(ROOT / tree, target / tree, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, target / file)


def try_out(mutant: Mutant, copy: Path) -> Finding:
    """Plant the mutant in the copy, run its tests, take it out again."""
    began = time.monotonic()
    path = copy / "src" / "romancy" / mutant.file
    source = path.read_text()
    count = source.count(mutant.old)
    if count != 1:
        what = f"its old text stands {count} times in {mutant.file}: bring it up to date with the source"
        return Finding(mutant.name, Verdict.BROKEN, what, 0.0)
    path.write_text(source.replace(mutant.old, mutant.new))
    try:
        code, output = run_tests(copy, mutant.tests)
    finally:
        path.write_text(source)
    return Finding(mutant.name, *_judge(code, output), time.monotonic() - began)


def _judge(code: int | None, output: str) -> tuple[Verdict, str]:
    if code is None:
        return Verdict.CAUGHT, f"the tests did not end within {LONGEST_RUN_S} s"
    if code == TESTS_FAILED:
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return Verdict.CAUGHT, failed[1] if failed else "a test that has no name"
    if code == 0:
        return Verdict.SURVIVED, "all its tests passed: write one that sees it"
    return Verdict.BROKEN, f"pytest ended with code {code}: {output[-500:].strip()}"


def run_tests(copy: Path, tests: Sequence[str]) -> tuple[int | None, str]:
    """Run tests in the copy up to the first failure; returns pytest's exit code, ``None`` if it did not end."""
    environment = {**os.environ, "PYTHONPATH": f"{copy / 'src'}{os.pathsep}{copy}"}
    command = [
        sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--timeout", str(LONGEST_TEST_S),
        *dict.fromkeys(tests),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=LONGEST_RUN_S, check=False
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout + done.stderr
