"""Code run in a fresh interpreter, in which nothing is imported yet."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PATIENCE = 300  # seconds for a process of its own: one that hangs must not block the tests for ever


def python(code: str, *path: Path) -> str:
    """The output that the code prints in a fresh interpreter."""
    search = os.pathsep.join([*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env={**os.environ, "PYTHONPATH": search},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()
