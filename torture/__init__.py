"""The torture: workers that run everything the library has, faults at random, and a checker that joins all the traces.

``just torture`` runs it; ``python -m torture --help`` tells the options. One run, for each database:

    run.py       prepares the database, starts the processes, lets the faults loose, waits for the end, judges
    flows.py     the workflows and activities; each activity leaves a token in a table and a line in a file
    jobs.py      what the client starts, by number and seed, and what must come of it: pure
    client.py    the process that starts, sends events, cancels, suspends, retries and forks, and notes what was taken
    worker.py    the processes that run the workflows
    crew.py      starts, kills, stops and restarts them
    faults.py    what is done to them, and to the database
    audit.py     a trigger that sees who writes history
    evidence.py  what all of them have left behind, as records
    checker.py   the rules: evidence in, violations out: pure
    report.py    the lines and tables for people
"""
