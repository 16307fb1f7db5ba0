"""What people see: a line of progress, a table for each database, and what is needed to look into a violation."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from torture.checker import Violation
from torture.evidence import Evidence

console = Console(soft_wrap=True)

MOST_VIOLATIONS = 20
STEPS_IN = {"cancel": "cancels", "rest": "suspends and resumes", "retry": "retries", "fork": "forks"}
"""What the client has noted as acknowledged, and how it is called here."""
MOST_HISTORIES = 5


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one run.

    Attributes:
        finish_s: from the end of the faults to the end of the last instance.
        place: where the database is kept, and how to look at it.
    """

    database: str
    seed: int
    seconds: float
    evidence: Evidence
    violations: list[Violation]
    faults: Counter[str]
    finish_s: float
    place: str
    notes: list[str] = field(default_factory=list)


def progress(database: str, passed_s: float, total_s: float, counts: dict[str, int], faults: Counter[str]) -> None:
    """One line."""
    states = ", ".join(f"{count} {status}" for status, count in sorted(counts.items())) or "nothing yet"
    console.print(
        f"{database:<10} {passed_s:4.0f}/{total_s:.0f} s   instances: {states}   faults: {sum(faults.values())}",
        highlight=False,
    )


def tell(run: Run) -> None:
    """The table of a run, and its violations."""
    table = Table(title=f"{run.database}, seed {run.seed}, {run.seconds:.0f} s of faults", title_justify="left")
    table.add_column("what")
    table.add_column("figure", justify="right")
    activities = sum(event.kind in ("ActivityCompleted", "CompensationExecuted") for event in run.evidence.history)
    table.add_row("instances", str(len(run.evidence.instances)))
    table.add_row("activities and compensations recorded", str(activities))
    table.add_row("events of history", str(len(run.evidence.history)))
    table.add_row("attempts run", str(len(run.evidence.lines)))
    taken = Counter(record["what"] for record in run.evidence.acknowledged)
    for what, title in STEPS_IN.items():
        table.add_row(title, str(taken[what]))
    table.add_row("instances parked and resumed, for code that differs", str(run.evidence.parked))
    for kind, count in sorted(run.faults.items()):
        table.add_row(f"faults: {kind}", str(count))
    table.add_row("time to finish after the faults", f"{run.finish_s:.1f} s")
    style = "bold red" if run.violations else "bold green"
    table.add_row("violations", f"[{style}]{len(run.violations)}[/]")
    console.print(table)
    for note in run.notes:
        console.print(note, markup=False, highlight=False)
    if run.violations:
        _tell_violations(run)


def _tell_violations(run: Run) -> None:
    by_rule = Counter(violation.rule for violation in run.violations)
    console.print(f"violations by rule: {dict(by_rule)}", markup=False)
    for violation in run.violations[:MOST_VIOLATIONS]:
        console.print(f"  {violation.rule}: {violation.what}", markup=False, highlight=False)
    if len(run.violations) > MOST_VIOLATIONS:
        console.print(f"  … and {len(run.violations) - MOST_VIOLATIONS} more")
    ids = list(dict.fromkeys(v.instance_id for v in run.violations if v.instance_id))
    for instance_id in ids[:MOST_HISTORIES]:
        _tell_history(run.evidence, instance_id)
    console.print(f"to look into it: seed {run.seed}; {run.place}", markup=False, highlight=False)


def _tell_history(evidence: Evidence, instance_id: str) -> None:
    (instance, *_) = [i for i in evidence.instances if i.instance_id == instance_id] or [None]
    console.print(f"history of {instance_id}: {instance}", markup=False, highlight=False)
    for event in evidence.history:
        if event.instance_id == instance_id:
            text = f"{event.input or ''} -> {event.result or ''}"
            where = f"{event.run}.{event.seq:<3} {event.kind:<24} {event.operation_id or '':<22}"
            console.print(
                f"    {where} {event.attempt} {text}",
                markup=False,
                highlight=False,
            )
