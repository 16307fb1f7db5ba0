"""From raw results to a table: medians, ratios within the same run, goals met or not."""

from dataclasses import dataclass
from statistics import median
from typing import Any

from peers.common import Result
from plan import LINEAR_GOAL, NO_LOSS_GOAL, SYSTEMS, THROUGHPUT_GOALS, WORKERS, Case, Goal, Line, System

from databases import KINDS, Kind

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


Section = tuple[Kind | None, list[Row]]
"""The lines of one database; ``None``: of what needs none."""


def tabulate(chosen: list[Case], raw: Raw) -> list[Section]:
    """For each database the lines of all cases that were run, and those that are worked out from several of them."""
    found: list[Section] = []
    for on in (*KINDS, None):
        rows: list[Row] = []
        cases = [case for case in chosen if case.on == on and case.key in raw]
        for work in dict.fromkeys(case.work for case in cases):
            rows += rows_of_work(on, work, [case for case in cases if case.work == work], raw)
        if rows:
            found.append((on, rows))
    return found


def rows_of_work(on: Kind | None, work: str, cases: list[Case], raw: Raw) -> list[Row]:
    rows = [
        Row(line.title, line.unit, figures(line, raw[case.key]), line.goals) for case in cases for line in case.lines
    ]
    if work == "throughput":
        assert on is not None
        rows.append(best_throughput(rows, THROUGHPUT_GOALS[on]))
    elif work == "replay":
        rows += linearity(raw)
    elif work == "workers":
        rows += gains(on, raw)
    return rows


def figures(line: Line, by_system: dict[str, list[Result]]) -> dict[System, Figure]:
    found: dict[System, Figure] = {}
    for system in SYSTEMS:
        metric = line.elsewhere.get(system, line.metric)
        values = [result[metric] for result in by_system.get(system, ()) if metric in result]
        if values:
            found[system] = Figure(median(values), min(values), max(values))
    return found


def best_throughput(rows: list[Row], goals: tuple[Goal, ...]) -> Row:
    """Each system at the concurrency that suits it best."""
    best = {
        system: max((row.figures[system] for row in rows if system in row.figures), key=lambda f: f.middle)
        for system in SYSTEMS
        if any(system in row.figures for row in rows)
    }
    return Row("3 activities, each at its best concurrency", "workflows/s", best, goals)


def linearity(raw: Raw) -> list[Row]:
    """Time per activity in the longest replay, divided by that in the shortest."""
    line, prefix = Line("", "replay_seconds", "s"), "sqlite-replay-"
    sizes = sorted(int(key.removeprefix(prefix)) for key in raw if key.startswith(prefix))
    per_activity = [
        found["romancy"].middle / size
        for size in sizes
        if "romancy" in (found := figures(line, raw[f"{prefix}{size}"]))
    ]
    if len(per_activity) < 2:
        return []
    ratio = round(per_activity[-1] / per_activity[0], 3)
    title = f"replay, time per activity of {sizes[-1]:,} ÷ of {sizes[0]:,}"
    return [Row(title, "", {"romancy": Figure(ratio, ratio, ratio)}, (LINEAR_GOAL,))]


def gains(on: Kind | None, raw: Raw) -> list[Row]:
    """What more worker processes give, with one as the measure."""
    rows = []
    for work, title in (("drain", "stored before"), ("feed", "stored meanwhile")):
        by_number = {
            number: found["romancy"].middle
            for number in WORKERS
            if "romancy" in (found := figures(Line("", "workflows_per_s", ""), raw.get(f"{on}-{work}-{number}", {})))
        }
        for number in WORKERS[1:]:
            if 1 in by_number and number in by_number:
                ratio = round(by_number[number] / by_number[1], 3)
                goals = (NO_LOSS_GOAL,) if number == 2 else ()
                heading = f"{number} worker processes ÷ 1, {title}"
                rows.append(Row(heading, "", {"romancy": Figure(ratio, ratio, ratio)}, goals))
    return rows


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


NAMES: dict[Kind | None, str] = {
    "sqlite": "SQLite",
    "postgresql": "PostgreSQL",
    "mysql": "MySQL",
    None: "Without a database",
}


def heading(on: Kind | None, environment: Result) -> str:
    """The database's name, as the server itself says it."""
    if on == "mysql" and "mariadb" in str(environment["servers"].get("mysql", "")).lower():
        return "MariaDB"
    return NAMES[on]


def durability_of(on: Kind | None, environment: Result) -> str:
    """What the database said of itself."""
    if on is None:
        return ""
    if on == "sqlite":
        return f"SQLite {environment['sqlite']}, WAL, synchronous=FULL."
    settings = environment["servers"].get(on, {})
    return ", ".join(f"{name} = {value}" for name, value in settings.items()) + "."


def plain_tables(record: dict[str, Any], sections: list[Section]) -> str:
    """The lines in columns, for a terminal."""
    lines = ["Medians (least - most); ÷: Romancy's median divided by the other's"]
    for on, rows in sections:
        lines += ["", heading(on, record["environment"]), durability_of(on, record["environment"])]
        table = [HEADINGS, *map(cells, rows)]
        widths = [max(len(row[n]) for row in table) for n in range(len(HEADINGS))]
        for row in table:
            texts = [
                cell.ljust(widths[n]) if n in (0, 1, 9, 10) else cell.rjust(widths[n]) for n, cell in enumerate(row)
            ]
            lines.append("  ".join(texts).rstrip())
    return "\n".join([*lines, "", *missing(record)])


def missing(record: dict[str, Any]) -> list[str]:
    """A line for each server that did not answer."""
    return [f"NOT MEASURED: {why}" for why in record["environment"]["missing"].values()]


def markdown(record: dict[str, Any], sections: list[Section]) -> str:
    """The same tables for people who read them in the repository."""
    machine = record["environment"]
    parts = [
        f"# Benchmarks of {record['date'][:10]}",
        "",
        f"{machine['cpus']} CPUs, {machine['os']}, Python {machine['python']}; appending a page and flushing it takes "
        f"{machine['fsync_ms']} ms.",
        f"Medians of {record['options']['runs']} runs (least - most), long works and the peers fewer; ÷ is Romancy's "
        "median divided by the other's: for rates more is better, for times less.",
        "Made by `just bench`; what each line means is in the [README](../README.md).",
        f"Sources: commit {machine['commit']}, digest {machine['sources']}; load average at the start "
        f"{machine['load']}.",
        *(f"\n**{line}**" for line in missing(record)),
    ]
    for on, rows in sections:
        parts += ["", f"## {heading(on, machine)}", ""]
        if said := durability_of(on, machine):
            parts += [said, ""]
        parts += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
        parts += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(parts) + "\n"
