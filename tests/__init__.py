"""The tests; what stands here holds for every process of theirs, from before its first import of anything."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Workers of pytest-xdist, and the many processes that tests start, find what the first process has compiled.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
sys.pycache_prefix = os.environ.setdefault("PYTHONPYCACHEPREFIX", str(Path(__file__).parents[1] / "build" / "pycache"))

# No test talks to anybody whom a certificate authority vouches for; PyMySQL would read the system's hundred and more
# of them for every connection, which takes longer than all else in it.
os.environ["SSL_CERT_FILE"] = os.devnull
