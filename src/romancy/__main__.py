"""``python -m romancy`` is the command line ``romancy``."""

from romancy.cli import main

if __name__ == "__main__":
    main()
