"""The command line ``romancy``: look into a database, mend it, run workers.

    romancy list | show | history | resume | retry | fork | suspend | cancel | send-event | publish | migrate | worker

``commands`` and ``changes`` say what can be asked; ``database``, ``worker`` and ``crew`` (several of them) do it;
``tables`` and ``details`` show it to people, ``documents`` to programs. Whatever comes from the database passes
``text.printable`` on its way to a terminal, and ``screen`` knows what that can show.
"""

import signal


def main() -> None:
    """Run the command line; the entry point ``romancy``."""
    # Ctrl+C during the imports, or in a query, simply ends the process; a worker catches it once it runs.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from romancy.cli.commands import run  # noqa: PLC0415

    run()


__all__ = ["main"]
