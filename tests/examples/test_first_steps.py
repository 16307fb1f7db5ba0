"""The example of the README runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

FIRST_STEPS = Path(__file__).parents[2] / "examples" / "first_steps.py"


def test_first_steps_print_the_result(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", FIRST_STEPS], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert (done.returncode, done.stderr) == (0, "")
    instance_id, result = done.stdout.rstrip("\n").split(" ", 1)
    assert len(instance_id) == 36
    assert result == "UserResult(user_id='user_123', account_id='ACC-user_123', status='completed')"
    assert (tmp_path / "users.db").exists()
