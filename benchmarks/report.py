"""From raw results to a table: medians, ratios within the same run, goals met or not."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from peers.common import Result
from plan import LINEAR_GOAL, SYSTEMS, THROUGHPUT_GOALS, Case, Goal, Line, System

Raw = dict[str, dict[str, list[Result]]]
"""Results by case, then by system, in the order of the runs."""

OTHERS: tuple[System, ...] = ("floor", "dbos", "edda")


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of some runs, and how far they spread."""

    middle: float
    least: float
    most: float

    def __str__(self) -> str:
        if self.least == self.most:
            return number(self.middle)
        return f"{number(self.middle)} ({number(self.least)} - {number(self.most)})"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    title: str
    unit: str
    figures: dict[System, Figure]
    goals: tuple[Goal, ...]

    def ratio(self, other: System) -> float | None:
        """Romancy's median divided by the other's."""
        if "romancy" not in self.figures or other not in self.figures or not self.figures[other].middle:
            return None
        return self.figures["romancy"].middle / self.figures[other].middle

    def verdict(self, goal: Goal) -> str:
        if "romancy" not in self.figures:
            return "failed"
        figure = self.figures["romancy"].middle if goal.of is None else self.ratio(goal.of)
        if figure is None:
            return "?"
        verdict = "met" if goal.is_met(figure) else "NOT MET"
        spread = self.figures["romancy"]
        if goal.of is None and goal.is_met(spread.least) != goal.is_met(spread.most):
            verdict += ", not in every run"
        return verdict


def tabulate(chosen: list[Case], raw: Raw) -> list[Row]:
    """The lines of all cases that were run, and those that are worked out from several of them."""
    rows: list[Row] = []
    for number_, case in enumerate(chosen):
        rows += [Row(line.title, line.unit, figures(line, raw.get(case.key, {})), line.goals) for line in case.lines]
        is_last_of_work = number_ + 1 == len(chosen) or chosen[number_ + 1].work != case.work
        if is_last_of_work and case.work == "throughput":
            rows.append(best_throughput([row for row in rows if row.unit == "workflows/s"]))
        elif is_last_of_work and case.work == "replay":
            rows += linearity(raw)
    return rows


def figures(line: Line, by_system: dict[str, list[Result]]) -> dict[System, Figure]:
    found: dict[System, Figure] = {}
    for system in SYSTEMS:
        metric = line.elsewhere.get(system, line.metric)
        values = [result[metric] for result in by_system.get(system, ()) if metric in result]
        if values:
            found[system] = Figure(median(values), min(values), max(values))
    return found


def best_throughput(rows: list[Row]) -> Row:
    """Each system at the concurrency that suits it best."""
    best = {
        system: max((row.figures[system] for row in rows if system in row.figures), key=lambda f: f.middle)
        for system in SYSTEMS
        if any(system in row.figures for row in rows)
    }
    return Row("3 activities, each at its best concurrency", "workflows/s", best, THROUGHPUT_GOALS)


def linearity(raw: Raw) -> list[Row]:
    """Time per activity in the longest replay, divided by that in the shortest."""
    line = Line("", "replay_seconds", "s")
    sizes = sorted(int(key.removeprefix("replay-")) for key in raw if key.startswith("replay-"))
    per_activity = [
        found["romancy"].middle / size for size in sizes if "romancy" in (found := figures(line, raw[f"replay-{size}"]))
    ]
    if len(per_activity) < 2:
        return []
    ratio = round(per_activity[-1] / per_activity[0], 3)
    title = f"replay, time per activity of {sizes[-1]:,} ÷ of {sizes[0]:,}"
    return [Row(title, "", {"romancy": Figure(ratio, ratio, ratio)}, (LINEAR_GOAL,))]


# -- writing it down -------------------------------------------------------------------------------------

HEADINGS = ("work", "unit", "Romancy", "floor", "DBOS", "Edda", "÷ floor", "÷ DBOS", "÷ Edda", "goal", "")


def number(value: float) -> str:
    """Three significant digits, thousands set apart."""
    return f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"


def cells(row: Row) -> list[str]:
    shown = [str(row.figures[system]) if system in row.figures else "-" for system in SYSTEMS]
    ratios = [row.ratio(other) for other in OTHERS]
    return [
        row.title,
        row.unit,
        *shown,
        *("-" if ratio is None else f"{ratio:.3g}" for ratio in ratios),
        "; ".join(str(goal) for goal in row.goals),
        "; ".join(row.verdict(goal) for goal in row.goals),
    ]


def plain_table(rows: list[Row]) -> str:
    """The lines in columns, for a terminal."""
    table = [HEADINGS, *map(cells, rows)]
    widths = [max(len(row[n]) for row in table) for n in range(len(HEADINGS))]
    lines = ["Medians (least - most); ÷: Romancy's median divided by the other's"]
    for row in table:
        texts = [text.ljust(widths[n]) if n in (0, 1, 9, 10) else text.rjust(widths[n]) for n, text in enumerate(row)]
        lines.append("  ".join(texts).rstrip())
    return "\n".join(lines)


def markdown(record: dict[str, Any], rows: list[Row]) -> str:
    """The same table for people who read it in the repository."""
    machine = record["environment"]
    head = [
        f"# Benchmarks of {record['date'][:10]}",
        "",
        f"{machine['cpus']} CPUs, {machine['os']}, Python {machine['python']}, SQLite {machine['sqlite']} "
        f"(WAL, synchronous=FULL); appending a page and flushing it takes {machine['fsync_ms']} ms.",
        f"Medians of {record['options']['runs']} runs (least - most), long works fewer; ÷ is Romancy's "
        "median divided by the other's: for rates more is better, for times less.",
        "Made by `just bench`; what each line means is in the [README](../README.md).",
        f"Sources: commit {machine['commit']}, digest {machine['sources']}; load average at the start "
        f"{machine['load']}.",
        "",
        "| " + " | ".join(HEADINGS) + " |",
        "|" + "---|" * len(HEADINGS),
    ]
    return "\n".join([*head, *("| " + " | ".join(cells(row)) + " |" for row in rows)]) + "\n"
