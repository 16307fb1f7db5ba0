"""``python -m torture``: see ``--help``."""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
from random import SystemRandom

from tests.databases import KINDS

from torture import report
from torture.faults import ALWAYS, ON_OWN_SERVERS, ON_SERVERS, OPTIONAL
from torture.run import Settings, torture


def main() -> int:
    """Run on each database; 1 when a promise was broken."""
    # Asked to end, end in good order: the servers are processes of sessions of their own.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    options = _parse()
    kinds = KINDS if options.database == "all" else (options.database,)
    seconds = options.seconds / len(kinds)
    wanted = None if options.faults is None else frozenset(options.faults.split(","))
    has_failed = False
    for kind in kinds:
        settings = Settings(seconds, options.seed, wanted, options.slack)
        report.console.print(f"torture of {kind}: seed {options.seed}, {seconds:.0f} s", highlight=False)
        run = torture(kind, settings)
        report.tell(run)
        has_failed = has_failed or bool(run.violations)
        if not run.violations and not options.keep:
            shutil.rmtree(run.place.removeprefix("folder ").partition(",")[0], ignore_errors=True)
    return int(has_failed)


def _parse() -> argparse.Namespace:
    known = [*ALWAYS, *ON_SERVERS, *ON_OWN_SERVERS, *OPTIONAL]
    parser = argparse.ArgumentParser(prog="torture", description="Faults at random, and a check of every promise.")
    parser.add_argument("--seconds", type=float, default=600, help="how long the faults last, over all databases")
    parser.add_argument("--database", choices=[*KINDS, "all"], default="all")
    parser.add_argument("--seed", type=int, default=SystemRandom().randrange(1_000_000), help="what happens when")
    parser.add_argument("--faults", help=f"only these, separated by commas: {', '.join(known)}")
    parser.add_argument("--slack", type=float, default=0, help="more seconds to finish, on a busy machine")
    parser.add_argument("--keep", action="store_true", help="keep the folder also when all went well")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
