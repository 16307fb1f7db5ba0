# Every task of the project; `just check` is exactly what CI runs.

set positional-arguments

# Show the tasks.
default:
    @just --list

# All that CI checks.
check: lint types test brief-torture

# Format, lint and the layers of the architecture.
lint:
    uv run ruff format --check
    uv run ruff check
    uv run lint-imports

# Format and mend what can be mended by machine.
fix:
    uv run ruff format
    uv run ruff check --fix

# Both type checkers, strict.
types:
    uv run mypy
    uv run pyright

# The tests, in parallel.
test *arguments:
    uv run pytest -n auto {{ arguments }}

# Line and branch coverage of the tests.
coverage:
    uv run coverage run -m pytest
    uv run coverage report --show-missing

# The property test of replay, for much longer than CI has time for.
property examples="5000":
    ROMANCY_EXAMPLES={{ examples }} uv run pytest tests/engine/test_replay_property.py --timeout 3600

# A hundred thousand races of a send against a wait, on each database.
races count="100000":
    ROMANCY_RACES={{ count }} uv run pytest tests/engine/test_races.py -k sends_against_waits

# The benchmarks beside their floor and the peers.
bench *arguments:
    uv run python benchmarks/run.py {{ arguments }}

# Faults at random on every database, and a check of every promise; see torture/__init__.py.
torture *arguments:
    uv run python -m torture {{ arguments }}

# The torture for as long as CI has time.
brief-torture:
    uv run python -m torture --seconds 90 --slack 20

# Faults planted in the engine: each must make a test fail.
mutants *arguments:
    uv run python -m torture.mutants {{ arguments }}

# The tests of MySQL and MariaDB on MySQL itself, from Debian, unpacked into build/.
mysql *arguments:
    scripts/from-debian build/mysql mysql-server-core
    ROMANCY_TEST_MYSQL_FOLDER=build/mysql ROMANCY_TEST_ALL_DATABASES=1 uv run pytest -n auto -k "mysql or packet" "$@"

# The tests on another Python, such as 3.14: this machine's, or Debian's, unpacked into build/.
python version *arguments:
    scripts/on-python "$@"
