"""The command line ``romancy``: look into a database, mend it, run a worker.

    romancy list | show | history | resume | migrate | worker

``commands`` says what can be asked, ``database`` and ``worker`` do it, ``tables`` and ``details`` show it to people,
``documents`` to programs. Whatever comes from the database passes ``text.printable`` on its way to a terminal.
"""

from romancy.cli.commands import app, main

__all__ = ["app", "main"]
