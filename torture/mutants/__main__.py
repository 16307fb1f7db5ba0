"""``python -m torture.mutants``: plants each mutant, and says which test has caught it; 1 when one has survived."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from torture.mutants.catalogue import MUTANTS
from torture.mutants.gate import Finding, Mutant, Verdict, copy_tree, run_tests, try_out

console = Console(soft_wrap=True)


def main() -> int:
    """First all tests on the source as it is, then each mutant with its own."""
    parser = argparse.ArgumentParser(prog="mutants", description="Do the tests see faults that are planted?")
    parser.add_argument("names", nargs="*", help="only mutants whose name contains one of these")
    parser.add_argument("--unchecked", action="store_true", help="do not first run the tests on the source as it is")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if not options.names or any(name in m.name for name in options.names)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copy = Path(folder)
        copy_tree(copy)
        if not options.unchecked and not _pass_without(chosen, copy):
            return 1
        findings = [_told(try_out(mutant, copy)) for mutant in chosen]
    _tell(findings)
    return int(any(finding.verdict is not Verdict.CAUGHT for finding in findings))


def _pass_without(mutants: list[Mutant], copy: Path) -> bool:
    code, output = run_tests(copy, [test for mutant in mutants for test in mutant.tests])
    if code != 0:
        console.print(output[-5_000:], markup=False, highlight=False)
        console.print("the tests fail already without any mutant, or can't be found: mend that first")
    return code == 0


def _told(finding: Finding) -> Finding:
    console.print(f"{finding.mutant}: {finding.verdict}", markup=False, highlight=False)
    return finding


def _tell(findings: list[Finding]) -> None:
    table = Table(title="planted faults", title_justify="left")
    table.add_column("mutant")
    table.add_column("verdict")
    table.add_column("by")
    table.add_column("s", justify="right")
    for finding in findings:
        style = "green" if finding.verdict is Verdict.CAUGHT else "bold red"
        by = finding.details.replace("[", "\\[")
        table.add_row(finding.mutant, f"[{style}]{finding.verdict}[/]", by, f"{finding.seconds:.1f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
